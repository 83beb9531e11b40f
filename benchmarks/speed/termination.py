"""What `ds_fira.Termination.requested` costs a step, beside an all_reduce that waits for its answer.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.speed.termination [--steps 1000]

Between two calls each process sleeps for 5 ms in place of a step; medians are over the steps, on the first rank.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from deepspeed import comm as dist

import ds_fira


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="timed calls of each")
    args = parser.parse_args()
    ds_fira.init_distributed()
    asked, waited = [], []
    with ds_fira.Termination() as termination:
        for _ in range(args.steps):
            time.sleep(0.005)
            begin = time.perf_counter()
            termination.requested()
            middle = time.perf_counter()
            dist.all_reduce(torch.ones(1))
            asked.append(middle - begin)
            waited.append(time.perf_counter() - middle)
    if dist.get_rank() == 0:
        print(
            f"requested {1e6 * statistics.median(asked):.0f} us, an all_reduce {1e6 * statistics.median(waited):.0f} us"
        )
    ds_fira.shutdown()


if __name__ == "__main__":
    main()
