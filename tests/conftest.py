"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.ranks import Pools, preload

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
if not torch.cuda.is_available():
    # Read when Triton is imported: without a GPU the tests of the kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# As the ranks have: with more threads a decomposition may round otherwise, and the two are compared to the bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# As early as it can be: it goes on while pytest collects the tests.
preload()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pools]:
    """Real processes over gloo: `ranks.run(world_size, "function of tests.distributed.zero_jobs", **arguments)`."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture
def kernels_allowed() -> Iterator[None]:
    """The kernels, on CPU tensors where there is no GPU."""
    # After the environment above, which the import reads.
    from ds_fira.core import kernels

    if not torch.cuda.is_available():
        kernels.interpret_on_cpu(True)
    yield
    kernels.interpret_on_cpu(False)
