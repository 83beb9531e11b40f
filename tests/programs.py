"""Programs run as a user runs them, and a text for them to read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(sys.executable).parent


def write_text(folder: Path) -> None:
    """Make `folder / "text.txt"` of this project's own files, of which blank lines make documents."""
    pages = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "ds_fira").glob("*.py"))]
    (folder / "text.txt").write_text("\n\n".join(page.read_text() for page in pages))


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, as a user would: one of the environment, or of the system where that has none.

    Args:
        command: program and arguments.
        folder: to run in.
        **variables: of the process's environment, over the usual ones.
    """
    path = f"{PROGRAMS}:{os.environ['PATH']}"
    return subprocess.run(
        [str(shutil.which(command[0], path=path)), *command[1:]],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=280,
    )
