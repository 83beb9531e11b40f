"""The launcher's restarts, and its end: a killed process of two, SIGTERM; the weights are those of an untouched run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.test_pretrain_example import SMALL
from tests.programs import PROGRAMS, ROOT, Forked, write_text

SCRIPT = str(ROOT / "examples" / "pretrain_llama.py")
ENVIRONMENT = {
    **os.environ,
    "VIRTUAL_ENV": sys.prefix,
    "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}


@contextlib.contextmanager
def started(folder: Path, arguments: list[str], log: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """launch/run.sh with a script; whatever is left of it is killed."""
    with (folder / log).open("w") as output:
        process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "run.sh"), *arguments],
            cwd=folder,
            env={**ENVIRONMENT, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            left = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
            for each in left:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    each.kill()
            process.wait()


def worker(launched: subprocess.Popen[bytes], rank: int) -> psutil.Process | None:
    """The process of a rank, None where there is none yet."""
    for process in psutil.Process(launched.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank) and SCRIPT in process.cmdline():
                return process
    return None


@pytest.mark.full
@pytest.mark.timeout(900)  # three trainings of two processes, for machines that are busy
def test_a_killed_rank_is_restarted_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL for rank 1 behind the first training state: MAX_RESTARTS and --resume auto do the rest."""
    write_text(tmp_path)
    options = [*SMALL, "--steps", "30", "--save-every", "5", "--keep-checkpoints", "2", "--resume", "auto"]
    settings = {"LAUNCHER": "torchrun", "NPROC": "2", "MAX_RESTARTS": "1"}
    whole = Forked(SCRIPT, [*options, "--output-dir", "whole"], tmp_path, "whole", ranks=2)
    with started(tmp_path, [SCRIPT, *options, "--output-dir", "cut"], "cut.txt", **settings) as killed:
        latest, deadline = tmp_path / "cut" / "state" / "latest", time.monotonic() + 400
        while not latest.exists() and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        victim = worker(killed, 1)
        assert victim is not None, (tmp_path / "cut.txt").read_text()[-3000:]
        victim.send_signal(signal.SIGKILL)
        status = killed.wait(400)
    output = (tmp_path / "cut.txt").read_text()
    assert status == 0, output[-6000:]
    for done in whole.wait():
        assert done.returncode == 0, done.stderr[-4000:]
    assert output.count("restart 1 of 1") == 1
    assert "starting anew" in output.partition("restart 1 of 1")[0]
    assert "starting anew" not in output.partition("restart 1 of 1")[2]
    files = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert files[0] == files[1]
    for run in ("whole", "cut"):
        kept = sorted(path.name for path in (tmp_path / run / "state").glob("[!lz]*"))
        assert kept == ["global_step25", "global_step30"]


FAILS_TWICE = """
import os, sys, pathlib
runs = len(list(pathlib.Path().glob("run*")))
pathlib.Path(f"run{runs}").touch()
sys.exit(int(sys.argv[1]) if runs < 2 else 0)
"""


@pytest.mark.parametrize(
    ("restarts", "fails_with", "status", "runs"),
    [("2", "1", 0, 3), ("1", "1", 1, 2), ("0", "1", 1, 1), ("5", "2", 2, 1)],
    ids=["enough", "too few", "none", "wrong option"],
)
def test_how_often_a_run_is_started(restarts: str, fails_with: str, status: int, runs: int, tmp_path: Path) -> None:
    """Until it ends well or MAX_RESTARTS is reached; a wrong option would be as wrong the next time."""
    (tmp_path / "fails.py").write_text(FAILS_TWICE)
    with started(tmp_path, ["fails.py", fails_with], "log", LAUNCHER="python", MAX_RESTARTS=restarts) as process:
        assert process.wait(120) == status, (tmp_path / "log").read_text()
    assert len(list(tmp_path.glob("run*"))) == runs


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize(("fails_with", "status", "runs"), [("2", 2, 1), ("1", 0, 3)], ids=["wrong option", "failure"])
def test_a_launcher_passes_the_status_of_a_wrong_option_on(
    launcher: str, fails_with: str, status: int, runs: int, tmp_path: Path
) -> None:
    """By itself torchrun would end with 1, and the run would be started again."""
    (tmp_path / "fails.py").write_text(FAILS_TWICE)
    settings = {"LAUNCHER": launcher, "NPROC": "1", "MAX_RESTARTS": "3"}
    with started(tmp_path, ["fails.py", fails_with], "log", **settings) as process:
        assert process.wait(200) == status, (tmp_path / "log").read_text()
    assert len(list(tmp_path.glob("run*"))) == runs


def test_a_run_that_is_told_to_end_is_not_started_again(tmp_path: Path) -> None:
    """SIGTERM, as from a scheduler, goes on to the launcher and ends the restarts."""
    (tmp_path / "waits.py").write_text("import pathlib, time; pathlib.Path('runs').touch(); time.sleep(300)")
    with started(tmp_path, ["waits.py"], "log", LAUNCHER="python", MAX_RESTARTS="3") as process:
        while not (tmp_path / "runs").exists():
            time.sleep(0.02)
        [child] = psutil.Process(process.pid).children()
        process.terminate()
        assert process.wait(30) == 143
        assert not child.is_running()
    assert "restart" not in (tmp_path / "log").read_text()


SAVES_AT_THE_END = """
import os, pathlib, signal, sys, time
rank = os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
pathlib.Path(f"started-{rank}").touch()
while not told:
    time.sleep(0.02)
time.sleep(2)
pathlib.Path(f"saved-{rank}").touch()
sys.exit(143)
"""


def ends_with(process: subprocess.Popen[bytes], folder: Path, ranks: int) -> int:
    """Send SIGTERM when all ranks have started; returns the exit status."""
    deadline = time.monotonic() + 400  # a busy machine
    while len(list(folder.glob("started-*"))) < ranks and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    return process.wait(60)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("launcher", "restarts"),
    [
        ("torchrun", "0"),
        *(pytest.param(launcher, "0", marks=pytest.mark.full) for launcher in ("python", "mpirun", "deepspeed")),
        # Restarts are one level above the launcher: what is below is the same for the others.
        *(pytest.param(launcher, "2", marks=pytest.mark.full) for launcher in ("python", "torchrun")),
    ],
)
def test_sigterm_reaches_every_rank_and_gives_it_time(launcher: str, restarts: str, tmp_path: Path) -> None:
    """To launch/run.sh alone: each rank does what it has to do first, the status is 143, nothing starts again."""
    if shutil.which(launcher, path=ENVIRONMENT["PATH"]) is None:
        pytest.skip(f"no {launcher}")
    (tmp_path / "saves.py").write_text(SAVES_AT_THE_END)
    settings = {"LAUNCHER": launcher, "NPROC": "2", "MAX_RESTARTS": restarts}
    if launcher == "torchrun" and restarts != "0":
        settings["LAUNCHER_ARGS"] = "--max-restarts 2"
    ranks = 1 if launcher == "python" else 2
    with started(tmp_path, ["saves.py"], "log", **settings) as process:
        status = ends_with(process, tmp_path, ranks)
        left = [each for each in psutil.process_iter() if "saves.py" in " ".join(_command(each))]
        assert not [each for each in left if _folder(each) == str(tmp_path)]
    assert status == 143, (tmp_path / "log").read_text()
    assert len(list(tmp_path.glob("saved-*"))) == ranks, (tmp_path / "log").read_text()
    assert "launch/run.sh: the run ended" not in (tmp_path / "log").read_text()


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def _folder(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.cwd()
    return ""


def test_a_rank_that_ends_with_143_by_itself_is_a_failure(tmp_path: Path) -> None:
    """A notice to the processes alone, as on a spot machine: the status says so, and the run is started again."""
    (tmp_path / "fails.py").write_text(FAILS_TWICE)
    with started(tmp_path, ["fails.py", "143"], "log", LAUNCHER="python", MAX_RESTARTS="1") as process:
        assert process.wait(120) == 143
    assert len(list(tmp_path.glob("run*"))) == 2


def wait_for_step_3(log: Path, alive: Callable[[], bool]) -> None:
    """Wait until the bar of the third of 25 steps is in a log."""
    deadline = time.monotonic() + 400
    while not re.search(r"\b[3-9]/25", log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        assert alive(), log.read_text()[-6000:]
        time.sleep(0.01)


def check_resumed(folder: Path, options: list[str], told: str, whole: Forked) -> None:
    """What a run that SIGTERM ended has left, and that the next one ends with the weights of the whole run."""
    step = int(re.findall(r"SIGTERM: saved the training state of step (\d+)", told)[0])
    assert 3 <= step < 25
    assert (folder / "cut" / "state" / "latest").read_text() == f"global_step{step}"
    assert not (folder / "cut" / "model").exists()
    again = Forked(SCRIPT, [*options, "--output-dir", "cut"], folder, "again", ranks=2)
    for done in [*whole.wait(), *again.wait()]:
        assert done.returncode == 0, done.stderr[-4000:]
    files = [(folder / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert files[0] == files[1]


OPTIONS = [*SMALL, "--steps", "25", "--resume", "auto"]


@pytest.mark.timeout(600)
def test_sigterm_to_one_process_saves_for_both(tmp_path: Path) -> None:
    """In mid-training, without --save-every: both end with status 143, and --resume auto goes on from that step."""
    write_text(tmp_path)
    whole = Forked(SCRIPT, [*OPTIONS, "--output-dir", "whole"], tmp_path, "whole", ranks=2)
    cut = Forked(SCRIPT, [*OPTIONS, "--output-dir", "cut"], tmp_path, "cut", ranks=2)
    wait_for_step_3(tmp_path / "cut-0.err", lambda: cut.processes[0].is_alive())
    cut.processes[1].terminate()
    ended = cut.wait()
    assert [done.returncode for done in ended] == [143, 143], ended[0].stderr[-4000:]
    check_resumed(tmp_path, OPTIONS, "".join(done.stdout + done.stderr for done in ended), whole)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_sigterm_saves_and_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """The same to launch/run.sh, which passes it on."""
    write_text(tmp_path)
    whole = Forked(SCRIPT, [*OPTIONS, "--output-dir", "whole"], tmp_path, "whole", ranks=2)
    with started(tmp_path, [SCRIPT, *OPTIONS, "--output-dir", "cut"], "cut.txt", NPROC="2") as process:
        log = tmp_path / "cut.txt"
        wait_for_step_3(log, lambda: process.poll() is None)
        process.terminate()
        assert process.wait(200) == 143, log.read_text()[-6000:]
    check_resumed(tmp_path, OPTIONS, log.read_text(), whole)
