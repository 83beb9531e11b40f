"""Running a command for so long and no longer, with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Seconds that a command has after its interrupt to write what it knows.
GRACE = 3.0
# Of the output of one command, so many bytes of its beginning and of its end are kept.
KEPT_FIRST, KEPT_LAST = 100_000, 400_000


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status; None where it was stopped at its limit.
        seconds: it ran.
    """

    status: int | None
    seconds: float


def run(command: Sequence[str], limit: float, output: Path, environment: Mapping[str, str], folder: Path) -> Ended:
    """Run a command in a session of its own; at its limit interrupt it, and then end every process of it.

    Args:
        command: program and arguments.
        limit: seconds.
        output: a file that gets what it prints.
        environment: all its variables.
        folder: it runs in.
    """
    start = time.monotonic()
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
            preexec_fn=_take_interrupts,
        )
        status: int | None = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            _signal(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            # Also after a good end, and where this process is interrupted: nothing may hold the device.
            _signal(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(status, time.monotonic() - start)


def _take_interrupts() -> None:
    """Undo what a shell does to a job behind an `&`: its commands would ignore interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def shortened(output: Path) -> bytes:
    """What a command printed, without the middle of a very long text."""
    text = output.read_bytes()
    if len(text) <= KEPT_FIRST + KEPT_LAST:
        return text
    left_out = len(text) - KEPT_FIRST - KEPT_LAST
    return text[:KEPT_FIRST] + f"\n... {left_out} bytes left out ...\n".encode() + text[-KEPT_LAST:]


def last_lines(output: Path, count: int = 3) -> str:
    """The end of what a command printed, in one line."""
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-count:])[-500:]
