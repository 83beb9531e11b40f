"""Of a checkpoint each rank reads its share of the bytes, once: counted by the kernel, from another process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import load_jobs
from tests.grids import full_if
from tests.ranks import Pools

MODULE = "tests.distributed.load_jobs"
MOST = 1.2
# Stage, dtype, ranks that save, ranks that load.
GRID = [(stage, "bf16", *sizes) for stage in range(4) for sizes in ((4, 4), (4, 2), (2, 4), (2, 2))]
GRID += [(0, "fp32", 2, 2), (0, "fp32", 2, 4), (2, "fp32", 2, 3)]
QUICK = {(1, "bf16", 2, 2), (0, "fp32", 2, 2)}


def measured(ranks: Pools, folder: Path, case: tuple[int, str, int, int], **arguments: Any) -> list[int]:
    """The bytes that each rank reads of a checkpoint while it loads it."""
    stage, dtype, before, after = case
    ranks.run(before, "save", MODULE, folder=str(folder), stage=stage, dtype=dtype)
    ranks.run(after, "prepare", MODULE, stage=arguments.pop("new_stage", stage), dtype=dtype)
    start = load_jobs.bytes_read(ranks, after)
    ranks.run(after, "load", MODULE, folder=str(folder), **arguments)
    return [now - then for now, then in zip(load_jobs.bytes_read(ranks, after), start, strict=True)]


def shares(folder: Path, stage: int, before: int, after: int) -> list[float]:
    """What each rank has to read: its own files where there is one a rank, and an even part of the others."""
    found = [0.0] * after
    for path in sorted((folder / "global_step2").glob("*.pt")):
        size = path.stat().st_size
        if path.name.startswith(("zero_", "bf16_zero_")) and before == after:
            found[int(path.name.split("rank_")[1].split("_")[0])] += size
        else:
            found = [share + size / after for share in found]
    return found


@pytest.mark.parametrize(
    "case", full_if(lambda case: case not in QUICK, GRID), ids=lambda case: "-".join(map(str, case))
)
def test_a_rank_reads_its_share_once(ranks: Pools, tmp_path: Path, case: tuple[int, str, int, int]) -> None:
    stage, _, before, after = case
    read = measured(ranks, tmp_path, case)
    ratios = [one / share for one, share in zip(read, shares(tmp_path, stage, before, after), strict=True)]
    ranks.run(after, "finish", MODULE)
    print(case, read, [round(ratio, 3) for ratio in ratios])
    assert max(ratios) <= MOST


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_ranks_exchange_what_they_have_read(ranks: Pools, tmp_path: Path, size: int) -> None:
    for seed in range(3):
        sizes = [70_001, 123_456, 0, 1, 9_999]
        assert not any(ranks.run(size, "exchange", MODULE, folder=str(tmp_path), sizes=sizes, seed=seed))
