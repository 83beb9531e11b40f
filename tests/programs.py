"""Programs run as a user runs them, and a text for them to read."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.ranks import START, free_port

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(sys.executable).parent
KINDS = ("out", "err")


def write_text(folder: Path) -> None:
    """Make `folder / "text.txt"` of this project's own files, of which blank lines make documents."""
    pages = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "ds_fira").glob("*.py"))]
    (folder / "text.txt").write_text("\n\n".join(page.read_text() for page in pages))


def run(command: list[str], folder: Path, limit: float = 280.0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, as a user would: one of the environment, or of the system where that has none.

    Args:
        command: program and arguments.
        folder: to run in.
        limit: seconds after which it is ended.
        **variables: of the process's environment, over the usual ones.
    """
    path = f"{PROGRAMS}:{os.environ['PATH']}"
    return subprocess.run(
        [str(shutil.which(command[0], path=path)), *command[1:]],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=limit,
    )


class Forked:
    """A Python script as `python SCRIPT ARGUMENTS` runs it, on one rank or several, without the seconds of its imports.

    Each process is a fork of one that has imported the libraries (`tests.preloaded`). For what a launcher does, or the
    command itself, there is `run`.

    Args:
        script: its path.
        arguments: its command line.
        folder: to run in; also gets `NAME-RANK.out` and `.err`, what each process printed.
        name: of those files.
        ranks: processes that meet, or 0 for one that nothing was told.
        dies_at: a file; SIGKILL comes as a process is about to put it in its place by a rename for the second time.
        variables: of the processes' environment, over the usual ones; None removes one.
    """

    def __init__(
        self,
        script: str,
        arguments: list[str],
        folder: Path,
        name: str = "forked",
        ranks: int = 0,
        dies_at: Path | None = None,
        variables: Mapping[str, str | None] | None = None,
    ) -> None:
        self.outputs = [folder / f"{name}-{rank}" for rank in range(ranks or 1)]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        self.processes: list[BaseProcess] = []
        place: dict[str, str | None]
        for rank, output in enumerate(self.outputs):
            place = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {}
            place |= variables or {}
            given = (script, arguments, str(folder), str(output), place, dies_at)
            process = START.Process(target=_run_script, args=given, daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self, limit: float = 280.0) -> list[subprocess.CompletedProcess[str]]:
        """Wait for all processes; returns how each ended and what it printed, and kills what runs on at the limit."""
        end = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.kill()
        return [
            subprocess.CompletedProcess([], process.exitcode, *(Path(f"{output}.{kind}").read_text() for kind in KINDS))
            for process, output in zip(self.processes, self.outputs, strict=True)
        ]

    def kill(self) -> None:
        """SIGKILL for what still runs."""
        for process in self.processes:
            process.kill()
            process.join()


def run_code(
    code: str, arguments: list[str], folder: Path, variables: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -c CODE ARGUMENTS` in a fork; see `Forked`."""
    script = folder / "code.py"
    script.write_text(code)
    return Forked(str(script), arguments, folder, "code", variables=variables).wait()[0]


def run_command(
    arguments: list[str], folder: Path, variables: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ds_fira ARGUMENTS` in a fork; see `Forked`."""
    return run_code("import runpy; runpy.run_module('ds_fira', run_name='__main__')", arguments, folder, variables)


def _run_script(
    script: str, arguments: list[str], folder: str, output: str, place: dict[str, str | None], dies_at: Path | None
) -> None:
    for number, kind in enumerate(KINDS, start=1):
        with open(f"{output}.{kind}", "w") as file:
            os.dup2(file.fileno(), number)
    for name, value in place.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    multiprocessing.current_process().daemon = False  # it may have children, as a script that a user runs
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    if dies_at is not None:
        _die_at(dies_at)
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        # As at the end of a script; multiprocessing would print the traceback alone.
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def _die_at(path: Path) -> None:
    found = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and Path(os.fsdecode(arguments[1])).absolute() == path:
            found.append(path)
            if len(found) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
