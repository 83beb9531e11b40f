"""Fixtures and options shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Read when the libraries are imported. The tests' own process computes as the ranks do: with more threads a
# decomposition may round otherwise, and the two are compared to the bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
FOLDERS = ("compatibility", "integration", "distributed", "gpu", "reference", "unit")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `--full` run the slow tests too."""
    parser.addoption("--full", action="store_true", help="also run the tests that are marked full")


def pytest_configure(config: pytest.Config) -> None:
    """Get ready to run tests, unless this process only hands them out to others (pytest -n)."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    if hasattr(config, "workerinput"):
        _take_a_share_of_the_cores(config.workerinput)
    import torch

    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    if not on_gpu:
        # Read when Triton is imported: without a GPU the tests of the kernels run in its interpreter.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    without_ranks = {"unit", "gpu"}
    needs_ranks = not all(without_ranks & {*Path(argument.partition("::")[0]).parts} for argument in config.args)
    if needs_ranks and not config.option.collectonly:
        from tests.ranks import preload

        # As early as it can be: it goes on while pytest collects the tests.
        preload()


def _take_a_share_of_the_cores(worker: dict[str, Any]) -> None:
    """Keep a worker and the ranks that it starts on cores of their own: they wake each other up more cheaply there."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores, number = sorted(os.sched_getaffinity(0)), int(worker["workerid"].removeprefix("gw"))
    share = len(cores) // worker["workercount"]
    if share:
        os.sched_setaffinity(0, cores[number * share :][:share])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long files first, for two processes to end together; leave out what is slow or needs a GPU."""
    import torch

    tests = Path(__file__).parent
    items.sort(key=lambda item: FOLDERS.index(item.path.relative_to(tests).parts[0]))
    if not config.getoption("full"):
        slow = [item for item in items if "full" in item.keywords]
        items[:] = [item for item in items if "full" not in item.keywords]
        config.hook.pytest_deselected(items=slow)
    if not torch.cuda.is_available():
        for item in items:
            # The mark alone: among the keywords is the name of the folder too.
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[object]:
    """Real processes over gloo: `ranks.run(world_size, "function of tests.distributed.zero_jobs", **arguments)`."""
    from tests.ranks import Pools

    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture
def kernels_allowed() -> Iterator[None]:
    """The kernels, on CPU tensors where there is no GPU."""
    import torch

    # After the environment above, which the import reads.
    from ds_fira.core import kernels

    if not torch.cuda.is_available():
        kernels.interpret_on_cpu(True)
    yield
    kernels.interpret_on_cpu(False)
