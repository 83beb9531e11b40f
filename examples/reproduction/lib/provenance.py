"""What a result came from: the commit, the versions, the machine and the day."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import default_device, device_name
from ds_fira.version import __version__

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "peft", "scipy", "numpy", "matplotlib")
# Written by the experiments themselves: a result that was computed before this one is no change of the code.
OWN_OUTPUT = ("examples/reproduction/results", "docs/reproduction", "docs/reproduction.md")
GIT_SECONDS = 20.0


def stamp() -> dict[str, Any]:
    """The origin of a result, JSON-able; call it where the result is computed, not where it is shown.

    Returns:
        `commit`: of the repository, None where git or its folder is absent. `dirty`: whether tracked files other than
        the experiments' own output differ from the commit, or untracked Python files are there; None without a
        commit. `versions`: of Python, `ds_fira` and `PACKAGES`, None for a package that is not installed. `device`:
        name of the GPU, or of the processor with the threads that torch uses. `threads`. `date`: UTC, ISO 8601, to
        the second.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "commit": commit,
        "dirty": None if commit is None else _dirty(),
        "versions": {
            "python": platform.python_version(),
            "ds_fira": __version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "device": device_name(default_device()),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def stamp_line(stamp: dict[str, Any]) -> str:
    """One line of Markdown that tells a stamp."""
    commit = "no git commit" if stamp["commit"] is None else f"commit `{stamp['commit'][:12]}`"
    changed = " with uncommitted changes" if stamp["dirty"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items() if version is not None)
    return f"Measured {stamp['date']} at {commit}{changed} on {stamp['device']}; {versions}."


def _dirty() -> bool | None:
    """Whether the code differs from the commit; None where git does not answer."""
    excluded = [f":(exclude){path}" for path in OWN_OUTPUT]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
    new = _git("ls-files", "--others", "--exclude-standard", "--", "*.py")
    return None if changed is None or new is None else bool(changed or new)


def _git(*arguments: str) -> str | None:
    """The output of a git command in the repository, None where it fails.

    The folder above a copy without its own .git is not asked: its commit would say nothing of this code.
    """
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
