"""Saves that all ranks write together, and saves from behind: what is written by whom, what is said, what survives.

DS_FIRA_KILLS_BEHIND is the number of kills of the long series; DS_FIRA_KILL_SEED repeats one, which each failure shows.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from ds_fira.checkpoint.manifest import find_damage, find_fault
from ds_fira.checkpoint.tag_folder import find_complete, read_latest
from ds_fira.optim.settings import check_params
from tests.distributed.crash_jobs import TIMEOUT, Kill, Run
from tests.distributed.test_crash import SENTENCE, flat, last
from tests.ranks import Pools

MODULE = "tests.distributed.async_jobs"
KILLS = int(os.environ.get("DS_FIRA_KILLS_BEHIND", "100"))
SEED = int(os.environ.get("DS_FIRA_KILL_SEED", time.time_ns() % 10**6))
SHARED = 0.1  # by how much of its share a rank may write more
full = pytest.mark.full


@pytest.mark.parametrize(
    ("size", "stage", "dtype", "behind"),
    [
        (2, 0, "fp32", False),
        (2, 2, "bf16", True),
        (3, 1, "bf16", False),
        pytest.param(2, 1, "bf16", False, marks=full),
        pytest.param(2, 3, "bf16", True, marks=full),
        pytest.param(3, 0, "bf16", True, marks=full),
        pytest.param(4, 2, "bf16", False, marks=full),
        pytest.param(4, 3, "bf16", False, marks=full),
    ],
)
def test_every_rank_writes_its_share(
    size: int, stage: int, dtype: str, behind: bool, ranks: Pools, tmp_path: Path
) -> None:
    """Of the module's file an even part, of DeepSpeed's files of a rank its own; counted from another process."""
    arguments = {"folder": str(tmp_path), "stage": stage, "dtype": dtype, "async_save": behind}
    for seen in ranks.run(size, "count_written", MODULE, **arguments):
        files = seen["files"]
        own = [count for name, count in files.items() if f"zero_pp_rank_{seen['rank']}_" in name]
        together = [count for name, count in files.items() if "zero_pp_rank" not in name]
        assert (len(own), len(together)) == ((2, 0) if stage == 3 else (stage > 0, 1))
        share = sum(own) + sum(together) / size
        assert 0.9 * share < seen["written"] <= (1 + SHARED) * share, (seen, share)
        assert seen["damage"] is None
        assert not seen.get("bad records")
        assert seen.get("mapped", True)
        assert seen.get("weights", True)


@pytest.mark.parametrize(
    ("size", "stage", "dtype"),
    [(2, 2, "bf16"), pytest.param(1, 0, "fp32", marks=full), pytest.param(2, 3, "bf16", marks=full)],
)
def test_the_training_goes_on(size: int, stage: int, dtype: str, ranks: Pools, tmp_path: Path) -> None:
    """What is saved is what was there at the call; steps are made meanwhile; a later save waits; older ones go."""
    answers = ranks.run(size, "save_behind", MODULE, folder=str(tmp_path), stage=stage, dtype=dtype)
    for rank, seen in enumerate(answers):
        assert seen["steps"] == answers[0]["steps"] >= 2
        assert {"second", "third"} == {name for name in seen["left"] if name in ("first", "second", "third")}
        assert not [name for name in seen["left"] if name.startswith(".saving")]
        assert (seen["latest"], seen["at"], seen["weights"]) == ("third", True, True)
        assert Path(seen["path"]).parent.name == "third"
        assert seen["damage"] is seen["fault"] is None
        assert seen["events"] == [f"Train/Fira/save_{name}" for name in ("bytes", "seconds", "stall_seconds")]
        if rank == 0:
            saved = [re.match(r"FiraAdam: saved '(\w+)': [\d.]+ MB in [\d.]+ s, for ", text) for text in seen["told"]]
            tags = [match[1] for match in saved if match]
            assert tags == ["first", "second", "third", "fourth", "fifth", "last"]
            assert any("save_checkpoint waited" in text for text in seen["told"])
            assert any("load_checkpoint waited" in text for text in seen["told"])


@pytest.mark.parametrize("stage", [2, pytest.param(1, marks=full), pytest.param(3, marks=full)])
def test_an_error_is_raised_at_the_same_step_on_every_rank(stage: int, ranks: Pools, tmp_path: Path) -> None:
    """A disk without room, a folder that vanishes, a state that cannot be pickled; the training goes on behind each."""
    first, second = ranks.run(2, "fail_behind", MODULE, folder=str(tmp_path), stage=stage)
    paths = [Path(seen.pop("path")) for seen in (first, second)]  # a file of the rank's own at stage 3
    assert first == second
    assert first["the former"] is None
    for name, reason in (("full", "rank 1 could not write .*: File too large"), ("vanished", "rank \\d .*could not")):
        number, error = first[name]
        assert number >= 1
        assert re.match(f"CheckpointError: FiraAdam: {reason}.*earlier checkpoints are as they were", error), error
        assert "\n" not in error
    assert re.match("CheckpointError: FiraAdam: rank 0 could not save .*lambda", first["at the next save"])
    assert re.match("CheckpointError: FiraAdam: rank 0 could not save .*lambda", first["at the end"])
    assert [path.parent.name for path in paths] == ["next", "next"]
    assert {"kept", "next", "latest"} <= set(first["names"])
    assert not {"full", "vanished", "bad", "after"} & set(first["names"])


def test_ranks_that_do_not_agree_hear_of_it_later(ranks: Pools, tmp_path: Path) -> None:
    """Several tags, tensors that one rank alone has: they end a save, on all ranks at one step; the next is whole."""
    first, second = ranks.run(2, "disagree", MODULE, folder=str(tmp_path))
    assert first == second
    assert first["tags"][0] >= 1
    assert re.match("TagsDiffer: FiraAdam: .* 2 different tags, .*not consistent across all ranks", first["tags"][1])
    assert re.match(r"CheckpointError: FiraAdam: .*'changed' was given .* on ranks \[1\] .*again", first["changed"][1])
    assert (Path(first["path"]).parent.name, first["weights"]) == ("apart", True)
    assert first["names"] == ["alike", "apart"]
    assert find_damage(tmp_path / "apart") is None


@pytest.mark.parametrize("size", [2, pytest.param(1, marks=full)])
def test_the_end_of_a_process_waits(size: int, tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=size, function=f"{MODULE}.leave", stage=2)
    assert run.wait()[0] == [0] * size, run.log(0)
    assert "left False" in run.log(0)
    assert find_complete(tmp_path / "state") == "only"
    assert find_damage(tmp_path / "state" / "only") is None


def test_sigterm_while_a_save_is_under_way(tmp_path: Path) -> None:
    """The save ends, another one follows, and the processes leave with the signal's status."""
    run = Run(tmp_path, function=f"{MODULE}.terminate")
    end = time.monotonic() + 100
    while "saving" not in run.log(0) and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    assert run.wait()[0] == [128 + signal.SIGTERM] * 2, run.log(0) + run.log(1)
    assert "under way True" in run.log(0)
    assert (tmp_path / "state" / "latest").read_text() == "end"
    assert find_damage(tmp_path / "state" / "end") is None
    client = torch.load(tmp_path / "state" / "end" / "mp_rank_00_model_states.pt", weights_only=False)
    assert client["step"] == last("saved", run.log(1))


def test_ranks_meet_beside_their_collectives(ranks: Pools) -> None:
    """In order, whatever else they send; and not for ever where one has gone."""
    answers = ranks.run(3, "meet", MODULE, patience=2.5)
    for seen in answers:
        assert seen["found"] == [[(rank, number) for rank in range(3)] for number in range(20)]
        assert seen["total"] == 1
    for seen in answers[:2]:
        assert seen["error"] == "RankGone: the process of rank 2 has not answered for 2 s"
        assert seen["waited"] > 2


def test_what_cannot_be_saved_behind_is_refused(ranks: Pools) -> None:
    """Before training, on every rank; and a setting that would have no effect."""
    for told in ranks.run(2, "refuse", MODULE):
        assert re.match("ValueError: FiraAdam: async_save = True is not possible, because checkpoint.checkpoint_", told)
        assert told.endswith("remove it, or set async_save to false.")
    with pytest.raises(ValueError, match=r"keep_every = 10 says .* add keep_last, such as 3, or remove keep_every"):
        check_params({"rank": 4, "keep_every": 10})


@full
@pytest.mark.parametrize(("size", "most"), [(1, 1.2), (2, 1.2), (4, 1.4)])
def test_the_stall_is_the_copy(size: int, most: float, ranks: Pools, tmp_path: Path) -> None:
    """Of 63 million parameters, in processor time: all else in the call is a fifth of the copy on a quiet machine.

    On four ranks, which copy a quarter as much each, it is more.
    """
    of_ranks = ranks.run(size, "stall", MODULE, folder=str(tmp_path), stage=2, width=2048)
    turns = [[max(times) for times in zip(*pairs, strict=True)] for pairs in zip(*of_ranks, strict=True)]
    ratios = sorted(save / copy for copy, save in turns)
    print(f"{size} ranks: processor seconds of a copy and of the call: {turns}")
    assert ratios[len(ratios) // 2] <= most


def kill_behind(chance: random.Random, folder: Path, size: int, stage: int, case: str) -> bool:
    """One kill in a run with slow saves from behind, and what is left; returns whether it fell into a save."""
    victims = sorted(chance.sample(range(size), chance.randint(1, size)))
    given = {"stage": stage, "pause": 0.01, "async_save": True}
    kind = chance.choice(["operation", "torn", "time", "time"])
    kills = {}
    if kind != "time":
        kills = {rank: Kill(**{kind: chance.randint(1, 60 if kind == "operation" else 6)}) for rank in victims}
    run = Run(folder, kills, size, **given)
    if kind == "time":
        run.wait_for_training()
        time.sleep(chance.random() * 1.5)
        for rank in victims:
            run.processes[rank].kill()
    statuses, waited = run.wait()
    case = f"{case}: {kind} {kills} {statuses}"
    logs = [run.log(rank) for rank in range(size)]
    assert waited < TIMEOUT, f"{case}\n{logs}"
    for rank, status in enumerate(statuses):
        gone = status == -signal.SIGKILL and rank in victims
        told = SENTENCE in logs[rank] or "has not answered for" in logs[rank]
        assert gone or status == 0 or (status == 1 and told), f"{case}\n{logs}"
    state = folder / "state"
    latest = read_latest(state) if state.is_dir() else None
    # A call that has returned has waited for the save before it, which is there. `latest` names one that is whole.
    calls = [[int(number) for number in re.findall(r"^saved (\d+)", log, re.MULTILINE)] for log in logs]
    sure = max([number for returned in calls for number in returned[:-1]], default=0)
    begun = {int(number) for log in logs for number in re.findall(r"^saving (\d+)", log, re.MULTILINE)}
    if latest is not None:
        found = find_complete(state)
        assert found is not None, case
        assert find_fault(state / found) is find_damage(state / found) is None, case
    assert latest is not None or sure == 0, f"{case}\n{logs}"
    resumed = Run(folder, None, size, stage=stage)
    assert resumed.wait()[0] == [0] * size, f"{case}\n{resumed.log(0)}"
    start = last("starting at step", resumed.log(0))
    assert start >= sure, f"{case}\n{logs}\n{resumed.log(0)}"
    assert start in begun | {0}, f"{case}\n{logs}\n{resumed.log(0)}"
    return bool(begun) and start < max(begun)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], list[torch.Tensor]]:
    """The ends of runs that nobody kills, by ranks and stage, as they are needed."""
    return {}


@pytest.mark.timeout(200 + 60 * KILLS)
@pytest.mark.parametrize("count", [1, pytest.param(KILLS, marks=full)], ids=["short", "long"])
def test_killed_while_it_saves_behind(
    count: int, whole: dict[tuple[int, int], list[torch.Tensor]], tmp_path: Path
) -> None:
    """Whatever is killed, and when: the former checkpoint is whole, and the next run ends as one that nobody killed."""
    chance, in_save = random.Random(SEED), 0
    for number in range(count):
        size, stage = (chance.randint(1, 4), chance.randint(1, 3)) if count > 1 else (2, 3)
        if (size, stage) not in whole:
            folder = tmp_path / f"whole {size} {stage}"
            folder.mkdir()
            assert Run(folder, None, size, stage=stage).wait()[0] == [0] * size
            whole[size, stage] = ends(folder, size)
        folder = tmp_path / str(number)
        folder.mkdir()
        case = f"seed {SEED}, kill {number}, {size} ranks, stage {stage}"
        in_save += kill_behind(chance, folder, size, stage, case)
        for a, b in zip(ends(folder, size), whole[size, stage], strict=True):
            assert torch.equal(a, b), case
        shutil.rmtree(folder)
    print(f"seed {SEED}: {count} kills, {in_save} of them took the save under way with them")


def ends(folder: Path, size: int) -> list[torch.Tensor]:
    """Weights and states at the end of a run, of all ranks."""
    return flat([torch.load(folder / f"final-{rank}.pt", weights_only=True) for rank in range(size)])
