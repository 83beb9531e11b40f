"""Run PyTorch's own tests of FSDP2 and of state dicts with FiraAdam in the place of its optimizers, on CPUs over gloo.

python -m tests.compatibility.torch_tests --folder pytorch/test distributed/checkpoint/test_state_dict.py

The folder is the `test` of a checkout of the PyTorch release that is installed. In a copy of it every file that is
named imports `torch_on_cpu.py`, which lets tests that want GPUs run on two CPU ranks, and "cuda" reads "cpu"; then
`torch_swap.py`. The control runs on CPUs too.
"""

from __future__ import annotations

from pathlib import Path

from tests.compatibility.foreign_tests import Suite

ON_CPU = "import tests.compatibility.torch_on_cpu  # noqa"
SWAP = "import tests.compatibility.torch_swap  # noqa"
# Names of devices, and DDP's argument for GPUs.
REPLACED = (('"cuda"', '"cpu"'), (".cuda()", ".cpu()"), (", device_ids=[self.rank]", ""))


def prepare(copy: Path, swap: bool) -> None:
    """Let a copy of the tests run on CPUs, and train with FiraAdam."""
    for file in copy.rglob("test_*.py"):
        text = file.read_text()
        for old, new in REPLACED:
            text = text.replace(old, new)
        file.write_text("\n".join([ON_CPU, *([SWAP] if swap else []), text]))


SUITE = Suite(prepare)

if __name__ == "__main__":
    SUITE.main(__doc__, "`test` of a checkout of PyTorch")
