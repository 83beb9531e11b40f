"""DeepSpeed with torch's AdamW is the same, to the bit, whether this package is imported or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.distributed import plain_training
from tests.programs import Forked
from tests.ranks import free_port

SCRIPT = str(plain_training.__file__)


def train(how: str, folder: Path) -> list[Any]:
    """What a process of its own gives: without this package a new interpreter, with it a fork, which has it already."""
    arguments = [how, str(free_port()), str(folder / how)]
    if how == "alone":
        done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=280)
    else:
        (done,) = Forked(SCRIPT, arguments, folder).wait()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_adamw_is_left_alone(tmp_path: Path) -> None:
    """Losses, weights, loss scales, a resume and the files of a checkpoint; given as an object and by a function."""
    found = train("imported", tmp_path)
    assert found == train("alone", tmp_path)
    before, after = ([run[-1] for run in found[start:-1:2]] for start in (0, 1))
    assert all(64.0 < before[fp16] < after[fp16] for fp16 in (1, 2))  # it has grown, and went on from there
