"""The quickstart's script over a stream: killed and resumed, it trains on as it would have; broken data ends it."""

from __future__ import annotations

import csv
import json
import re
import signal
from pathlib import Path

import pytest

from tests.integration.data_jobs import CUT_SHORT, write_broken, write_c4
from tests.programs import ROOT, Forked

SCRIPT = str(ROOT / "examples" / "pretrain_llama.py")
# Files of 40 documents hold about 25 batches each: the run meets several, and the end of an epoch.
OPTIONS = [
    *("--data", "./c4", "--streaming", "--block-rows", "16", "--vocab-size", "300", "--hidden-size", "32"),
    *("--layers", "1", "--heads", "2", "--seq-length", "32", "--batch-size", "4", "--rank", "8"),
    *("--update-proj-gap", "5", "--eval-every", "6", "--cache-dir", "cache", "--activation-checkpointing", "none"),
]


def history(folder: Path) -> dict[tuple[int, str], float]:
    """Losses by step and split."""
    with (folder / "history.csv").open() as file:
        return {(int(row["step"]), row["split"]): float(row["loss"]) for row in csv.DictReader(file)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a corpus in C4's layout."""
    write_c4(tmp_path / "c4", [40, 40, 40])
    return tmp_path


@pytest.mark.timeout(900)  # three runs of the script, for machines that are busy
def test_killed_and_resumed_run_equals_the_uninterrupted_one(folder: Path) -> None:
    """SIGKILL at the end of the second save; the losses after the resume are those of the run that went on."""
    options = [*OPTIONS, "--save-every", "6", "--steps", "24", "--output-dir"]
    latest = folder / "cut" / "state" / "latest"
    # Both at a time, which tests that they may prepare the text at a time, too.
    cut = Forked(SCRIPT, [*options, "cut"], folder, "cut", dies_at=latest)
    uninterrupted = Forked(SCRIPT, [*options, "whole"], folder, "whole")
    (killed,), (whole,) = cut.wait(), uninterrupted.wait()
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    assert whole.returncode == 0, whole.stderr[-4000:]
    assert latest.read_text() == "global_step6", "killed as the complete state of step 12 was about to take its place"
    (resumed,) = Forked(SCRIPT, [*options, "cut", "--resume"], folder, "resumed").wait()
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    expected, found = history(folder / "whole"), history(folder / "cut")
    assert {step for step, _ in found} == {step for step, _ in expected if step >= 12}
    for key in found.keys() - {(20, "train")}:  # its mean begins at the step of the start
        assert found[key] == expected[key], key
    summary = json.loads((folder / "cut" / "summary.json").read_text())
    assert summary["text"]["streaming"]
    assert 0 <= summary["data_wait_share"] < 1


def test_broken_data_ends_two_processes(tmp_path: Path) -> None:
    """A file that one process cannot read in the middle of training ends both, with its sentence and status 1."""
    seed, broken = write_broken(tmp_path / "c4")
    options = [*OPTIONS, "--seed", str(seed), "--steps", "900", "--eval-every", "900", "--output-dir", "out"]
    for done in Forked(SCRIPT, options, tmp_path, ranks=2).wait():
        assert done.returncode == 1
        sentence = f"pretrain_llama.py: error: c4/{broken.name} cannot be read: {CUT_SHORT}"
        assert done.stderr.count(sentence) == 1
        assert "Traceback" not in done.stderr
    assert re.search(r"\b[1-9]\d*/900 \[", (tmp_path / "forked-0.err").read_text()), "training had not begun"
