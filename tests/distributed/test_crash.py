"""Real processes that are really killed, in a save or between two, and what the next run makes of what they leave.

DS_FIRA_KILLS is the number of kills of the long series; DS_FIRA_KILL_SEED repeats one, whose seed each failure shows.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fira.checkpoint.manifest import MANIFEST
from tests.distributed.crash_jobs import SAVE_EVERY, STEPS, TIMEOUT, Kill, Run

KILLS = int(os.environ.get("DS_FIRA_KILLS", "12"))
SEED = int(os.environ.get("DS_FIRA_KILL_SEED", time.time_ns() % 10**6))
SENTENCE = "because another process ended or did not answer in time"


def final(run: Run) -> list[dict[str, Any]]:
    """Weights and states at the end, by rank."""
    return [torch.load(run.folder / f"final-{rank}.pt", weights_only=True) for rank in range(2)]


def flat(item: Any) -> list[torch.Tensor]:
    """All tensors of nested lists and dicts."""
    if isinstance(item, torch.Tensor):
        return [item]
    return [tensor for part in (item.values() if isinstance(item, dict) else item) for tensor in flat(part)]


def last(pattern: str, text: str, default: int = 0) -> int:
    """The number in the last line that reads `pattern`."""
    found = re.findall(rf"^{pattern} (\d+)", text, re.MULTILINE)
    return int(found[-1]) if found else default


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nobody kills."""
    run = Run(tmp_path_factory.mktemp("whole"))
    assert run.wait()[0] == [0, 0], run.log(0) + run.log(1)
    return run


@pytest.fixture(scope="module")
def duration(whole: Run, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds that the training takes once the engine is built."""
    run = Run(tmp_path_factory.mktemp("timed"))
    run.wait_for_training()
    began = time.monotonic()
    run.wait()
    return time.monotonic() - began


def choose(chance: random.Random, whole: Run) -> tuple[dict[int, Kill], list[int], float | None]:
    """A kill: how ranks kill themselves, which ranks are killed, and after which share of a run from outside."""
    victims = chance.choice([[0], [1], [0, 1]])
    kind = chance.choice(["operation", "operation", "torn", "time"])
    if kind == "time":
        return {}, victims, chance.random()
    kills = {}
    for rank in victims:
        operations, saves = map(int, re.findall(r"file operations and saves: (\d+) (\d+)", whole.log(rank))[-1])
        number = chance.randint(1, operations if kind == "operation" else saves)
        kills[rank] = Kill(**{kind: number})
    return kills, victims, None


def kill_from_outside(run: Run, victims: list[int], share: float, duration: float) -> None:
    """SIGKILL at a share of the duration behind the start of the training."""
    run.wait_for_training()
    time.sleep(share * duration)
    for rank in victims:
        run.processes[rank].kill()


@pytest.mark.timeout(200 + 60 * KILLS)
@pytest.mark.parametrize("count", [2, pytest.param(KILLS, marks=pytest.mark.full)], ids=["short", "long"])
def test_killed_runs_continue_to_the_same_weights(whole: Run, duration: float, tmp_path: Path, count: int) -> None:
    """Whatever was killed, and when: the rest ends in time with a sentence, and the next run ends as the whole one."""
    chance = random.Random(SEED)
    expected = final(whole)
    in_save, waits = 0, []
    for number in range(count):
        kills, victims, share = choose(chance, whole)
        case = f"seed {SEED}, kill {number}: {kills or victims} {share}"
        folder = tmp_path / str(number)
        folder.mkdir()
        run = Run(folder, kills)
        if share is not None:
            kill_from_outside(run, victims, share, duration)
        statuses, waited = run.wait()
        waits.append(waited)
        logs = [run.log(rank) for rank in range(2)]
        assert waited < TIMEOUT, f"{case}\n{logs}"
        in_save += any(last("saving", log) > last("saved", log) for log in logs)
        for rank, status in enumerate(statuses):
            # Of two that kill themselves, the one whose time comes later may find the other gone.
            gone = status == -signal.SIGKILL and rank in victims
            stopped = status == 1 and SENTENCE in logs[rank]
            # A signal that comes behind the last step and save finds nobody in need of the victim any more.
            ended = status == 0 and all(last("saved", log) >= STEPS - STEPS % SAVE_EVERY for log in logs)
            assert gone or stopped or ended, f"{case}\n{statuses}\n{logs}"
        saved = max(last("saved", log) for log in logs)
        begun = max(last("saving", log) for log in logs)
        resumed = Run(folder)
        assert resumed.wait()[0] == [0, 0], f"{case}\n{resumed.log(0)}{resumed.log(1)}"
        starts = [last("starting at step", resumed.log(rank)) for rank in range(2)]
        assert starts[0] == starts[1], case
        # A save whose `latest` had moved before the kill counts, though nobody lived to say so.
        assert saved <= starts[0] <= max(saved, begun), f"{case}\n{resumed.log(0)}"
        found = final(resumed)
        assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(expected), strict=True)), case
        left = {path.name for path in (folder / "state").iterdir()}
        assert not [name for name in left if name.startswith(".")] or starts[0] >= STEPS - STEPS % SAVE_EVERY, case
        shutil.rmtree(folder)
    print(
        f"seed {SEED}: {count} kills, {in_save} during a save; the other processes ended within {max(waits):.2f} s; "
        "all resumed runs ended with the weights and states of the whole run"
    )


def test_a_frozen_process_ends_the_run_within_the_timeout(tmp_path: Path) -> None:
    """A process that stops answering without ending: no closed connection tells the other one."""
    run = Run(tmp_path, {1: Kill(operation=6, signal=signal.SIGSTOP)}, timeout=6)
    end = time.monotonic() + 100
    while run.processes[0].exitcode is None and time.monotonic() < end:
        time.sleep(0.01)
    assert run.processes[0].exitcode == 1
    assert SENTENCE in run.log(0)
    run.processes[1].kill()


def check_room(seen: list[dict[str, Any]], reason: str, ranks: str) -> None:
    """What `_save_thrice` has to have seen on both ranks."""
    assert seen[0] == seen[1]
    pattern = rf"FiraAdam: rank {ranks} could not write \S+\.pt: {reason}; the save of 'kept' was given up and earlier "
    assert re.match(pattern, seen[0]["error"]), seen[0]["error"]
    assert "\n" not in seen[0]["error"]
    names = ["kept", "latest", "zero_to_fp32.py", "zero_to_torch.py"]
    assert seen[0]["before"] == ["kept", names]
    assert [name for name in seen[0]["after"][1] if name != "filler"] == names
    assert seen[0]["after"][0] == "kept"
    assert seen[0]["step"] == [True, 1]
    assert seen[0]["end"] == ["next", sorted([*names, "next"])]


def test_one_rank_that_cannot_write(tmp_path: Path) -> None:
    """The kernel refuses rank 1 a file above 4 kB: both ranks learn it, nothing is lost, the training goes on."""
    run = Run(tmp_path, function="run_out_of_room")
    assert run.wait()[0] == [0, 0], run.log(0) + run.log(1)
    check_room([json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)], "File too large", "1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process in whose mount namespace a folder is a file system of 512 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"mount -t tmpfs -o size=512k tmpfs '{disk}' && echo mounted && exec sleep 300"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    try:
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare program: util-linux is missing")
    try:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"no mount namespace with a tmpfs: {holder.stderr.read().strip()}")
        yield holder.pid, disk
    finally:
        holder.kill()
        holder.communicate()


def test_full_disk(small_disk: tuple[int, Path], tmp_path: Path) -> None:
    """A file system without room for a second checkpoint: the same, once it has room again."""
    namespace, disk = small_disk
    run = Run(tmp_path, function="fill_the_disk", namespace=namespace, disk=str(disk))
    assert run.wait()[0] == [0, 0], run.log(0) + run.log(1)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    check_room(seen, "No space left on device", r"\d(?: \(and 1 more ranks\))?")


def test_a_checkpoint_holds_no_trace_of_how_it_was_made(whole: Run) -> None:
    """Nothing in any file names the staging folder, and nothing is left of it."""
    for path in (whole.folder / "state").rglob("*"):
        assert path.is_dir() or b".saving-" not in path.read_bytes(), path
    assert (whole.folder / "state" / "latest").read_text() == "again"
    names = {path.name for path in (whole.folder / "state").iterdir()}
    assert names == {"again", "global_step2", "global_step6", "latest", "zero_to_fp32.py", "zero_to_torch.py"}
    listed = json.loads((whole.folder / "state" / "again" / MANIFEST).read_text())["files"]
    assert len(listed) == 3
