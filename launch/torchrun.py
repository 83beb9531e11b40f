"""torchrun that ends with status 2 where a process of the training does: a wrong option, for which it has 1 too."""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

WRONG = 2

if __name__ == "__main__":
    sys.argv[0] = "torchrun"
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != WRONG:
            raise
        sys.exit(WRONG)
