"""Identify the process that wrote something down, and tell whether it still runs.

A process is known by the boot of its machine, its PID namespace, its number and its start.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path


def is_near(owner: Mapping[str, object]) -> bool:
    """Whether the owner's process would be seen from here, if it were still there."""
    here = (boot(), namespace())
    return all(here) and here == (owner.get("boot"), owner.get("namespace")) and isinstance(owner.get("pid"), int)


def is_gone(owner: Mapping[str, object]) -> bool:
    """Whether the owner's process is known to have ended."""
    if not is_near(owner):
        return False
    found = started(owner["pid"])
    if found is not None:
        return found != owner.get("started")
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False  # another user's, whose start may be hidden
    return True  # what is left of a process that ended


def boot() -> str | None:
    """Which start of which machine this is."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def namespace() -> str | None:
    """In which set of processes this one is: of a machine or of a container."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def started(process: int) -> str | None:
    """When a process started, in the kernel's ticks; None where there is none, or only what is left of it."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None
