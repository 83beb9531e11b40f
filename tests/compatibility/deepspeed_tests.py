"""Run DeepSpeed's own tests with FiraAdam in Adam's place, and say what passed, what is refused and what failed.

python -m tests.compatibility.deepspeed_tests --folder DeepSpeed/tests unit/moe/test_moe.py unit/checkpoint

The folder is the `tests` of a checkout of the DeepSpeed release that is installed. In a copy of it `unit/common.py`,
which every process of a test imports, imports `adam_swap.py` first.
"""

from __future__ import annotations

from pathlib import Path

from tests.compatibility.foreign_tests import Suite

SWAP = "import tests.compatibility.adam_swap  # noqa"


def prepare(copy: Path, swap: bool) -> None:
    """Let a copy of the tests train with FiraAdam."""
    if swap:
        common = copy / "unit" / "common.py"
        common.write_text(f"{SWAP}\n{common.read_text()}")


SUITE = Suite(prepare, {"DS_TEST_USE_INSTALLED_DEEPSPEED": "1"})

if __name__ == "__main__":
    SUITE.main(__doc__, "`tests` of a checkout of DeepSpeed")
