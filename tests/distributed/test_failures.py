"""One rank that raises in a step ends the others with its sentence within ten seconds, whatever they wait in."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.distributed.crash_jobs import Run
from tests.grids import full_if
from tests.ranks import Pools

LIMIT = 10.0  # seconds
# World size, stage, dtype, the rank that raises, where, and whether its process lives on.
CASES = [
    (2, 0, "fp32", 0, "step", "dies"),
    (2, 0, "bf16", 1, "refresh", "caught"),
    (3, 2, "bf16", 0, "step", "caught"),
    (2, 2, "fp32", 1, "refresh", "dies"),
    (2, 3, "bf16", 0, "refresh", "caught"),
    (3, 3, "fp32", 2, "step", "dies"),
    (2, 1, "bf16", 1, "after", "caught"),
    (2, 2, "fp32", 0, "forward", "dies"),
    (3, 2, "fp32", 1, "travelling", "dies"),
    (2, 3, "bf16", 1, "travelling", "caught"),
]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("half", full_if(bool, [0, 1]))
def test_the_others_end_with_the_sentence_of_the_rank_that_failed(tmp_path: Path, half: int) -> None:
    """In a refresh, in and behind a step, with a collective under way; on rank 0, which holds the store, and the last;
    caught or not.
    """
    runs = []
    for number, (world, stage, dtype, odd, where, how) in enumerate(CASES[half::2]):
        folder = tmp_path / str(number)
        folder.mkdir()
        given = {"stage": stage, "odd": odd, "where": where, "how": how, "dtype": dtype}
        run = Run(folder, world_size=world, function="tests.distributed.failure_jobs.fail", timeout=200, **given)
        runs.append((run, world, odd, where, how))
    ended: dict[tuple[int, int], float] = {}
    end = time.monotonic() + 150
    others = [(i, rank) for i, (_, world, odd, *_) in enumerate(runs) for rank in range(world) if rank != odd]
    while len(ended) < len(others) and time.monotonic() < end:
        for i, rank in others:
            if (i, rank) not in ended and runs[i][0].processes[rank].exitcode is not None:
                ended[i, rank] = time.time()
        time.sleep(0.02)
    waits = []
    for i, (run, world, odd, where, how) in enumerate(runs):
        case = f"{CASES[half::2][i]}\n" + "\n".join(run.log(rank) for rank in range(world))
        began = float(re.findall(r"failed at (\S+)", run.log(odd))[0])
        doing = "and ended" if where == "forward" else "in step 3"
        name = "ds_fira" if where == "forward" else "FiraAdam"
        sentence = (
            f"{name}: rank {odd} failed {doing}, so every rank ends (mend what it says, then go on from the newest "
            "complete checkpoint): OwnError: a fault of this rank alone"
        )
        for rank in range(world):
            if rank != odd:
                assert (i, rank) in ended, case
                waits.append(ended[i, rank] - began)
                assert waits[-1] < LIMIT, case
                assert run.processes[rank].exitcode == 1, case
                assert sentence in run.log(rank), case
        if how == "caught":
            assert "caught" in run.log(odd)
        else:
            run.processes[odd].join(10)
            assert run.processes[odd].exitcode == 1
            assert "tests.distributed.failure_jobs.OwnError: a fault" in run.log(odd), case
        assert "so every rank ends" not in run.log(odd), case
        for process in run.processes:
            process.kill()
    print(f"the others ended within {', '.join(f'{wait:.1f}' for wait in waits)} s")


def test_what_all_ranks_raise_and_catch_ends_nobody(ranks: Pools) -> None:
    """A refused gradient, say, under stage 0 and 2: each has its own error, and the processes train on."""
    for results in zip(*ranks.run(2, "all_fail", "tests.distributed.failure_jobs", stages=[0, 2]), strict=True):
        assert [text for text, *_ in results] == ["a fault\nof this rank alone"] * 2
        assert [made for *_, made in results] == [2, 2]
        assert max(seconds for _, seconds, _ in results) < 2.5
