"""The quickstart's script without a launcher, small; tests/integration/test_launchers.py has the launchers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.programs import ROOT, Forked, write_text

SMALL = [
    *("--text", "text.txt", "--vocab-size", "300", "--hidden-size", "32", "--layers", "2", "--heads", "2"),
    *("--seq-length", "32", "--batch-size", "4", "--rank", "8", "--update-proj-gap", "5", "--eval-every", "6"),
    *("--output-dir", "out", "--cache-dir", "cache"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a text."""
    write_text(tmp_path)
    return tmp_path


def test_one_process_without_a_launcher(folder: Path) -> None:
    """`python examples/pretrain_llama.py` needs no launcher; AdamW trains by the same script for comparison."""
    script = str(ROOT / "examples" / "pretrain_llama.py")
    plain = [argument for argument in SMALL if argument not in ("--rank", "8", "--update-proj-gap", "5")]
    (done,) = Forked(script, [*plain, "--steps", "6", "--optimizer", "AdamW"], folder).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert (summary["world_size"], summary["optimizer"]) == (1, "AdamW")


def test_wrong_options_stop_with_one_sentence(folder: Path) -> None:
    """A missing file and a contradiction are named before anything is loaded."""
    script = str(ROOT / "examples" / "pretrain_llama.py")
    (missing,) = Forked(script, ["--text", "no.txt"], folder).wait()
    assert missing.returncode == 2
    assert (
        missing.stderr.strip()
        .splitlines()[-1]
        .endswith("--data no.txt does not exist: it takes a file, a folder, a glob, c4 or a hub's owner/name")
    )
    (contradiction,) = Forked(script, [*SMALL, "--optimizer", "AdamW"], folder).wait()
    assert contradiction.returncode == 2
    assert "--rank belongs to FiraAdam" in contradiction.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--hidden-size", "65536", "--layers", "25"], "the model needs about .* GiB for each process with Fira and"),
        (["--total-batch-size", "5"], "a batch of 5 sequences .* does not divide by 2 processes: .*batch-size 6$"),
    ],
    ids=["memory", "batch"],
)
def test_what_cannot_run_stops_every_process(folder: Path, options: list[str], sentence: str) -> None:
    """A model too large for the memory, and processes that do not divide the batch: one sentence from each process."""
    script = str(ROOT / "examples" / "pretrain_llama.py")
    # A later option wins over an earlier one of the same name.
    for done in Forked(script, [*SMALL, *options], folder, ranks=2).wait():
        assert done.returncode == 2
        assert len(re.findall(rf"^pretrain_llama.py: error: {sentence}", done.stderr, re.MULTILINE)) == 1
        assert "Traceback" not in done.stderr
    assert not (folder / "cache").exists()
