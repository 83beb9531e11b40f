"""Run DeepSpeed's own tests with FiraAdam in Adam's place, and say what passed, what is refused and what failed.

python -m tests.compatibility.deepspeed_tests --folder DeepSpeed/tests unit/moe/test_moe.py unit/checkpoint

The folder is the `tests` of a checkout of the DeepSpeed release that is installed. In a copy of it `unit/common.py`,
which every process of a test imports, imports `deepspeed_ranks.py` first, and for FiraAdam `adam_swap.py`.
"""

from __future__ import annotations

from pathlib import Path

from tests.compatibility.foreign_tests import Suite

RANKS = "import tests.compatibility.deepspeed_ranks  # noqa"
ERRORS = "tests.compatibility.deepspeed_ranks.raise_errors(DistributedExec)"
SWAP = "import tests.compatibility.adam_swap  # noqa"


def prepare(copy: Path, swap: bool) -> None:
    """Let the ranks of a copy of the tests start quickly, and train with FiraAdam."""
    common = copy / "unit" / "common.py"
    common.write_text("\n".join([RANKS, *([SWAP] if swap else []), common.read_text(), ERRORS, ""]))


SUITE = Suite(
    prepare,
    {
        "DS_TEST_USE_INSTALLED_DEEPSPEED": "1",
        "OMP_NUM_THREADS": "1",  # a rank is a fork, which threads would not outlive
        "LOCAL_SIZE": "4",  # the ranks that a machine without GPUs is to run; a test that wants more is skipped
    },
)

if __name__ == "__main__":
    SUITE.main(__doc__, "`tests` of a checkout of DeepSpeed")
