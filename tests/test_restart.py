"""The launcher's restart: one killed process of two, and the run ends with the weights of one that nobody touched."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.programs import PROGRAMS, ROOT, Forked, write_text
from tests.test_pretrain_example import SMALL

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
