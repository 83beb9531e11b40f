"""The quickstart's script under real launchers, small: what it leaves behind is complete and opens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed import free_port

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(sys.executable).parent
SMALL = [
    *("--text", "text.txt", "--vocab-size", "300", "--hidden-size", "32", "--layers", "2", "--heads", "2"),
    *("--seq-length", "32", "--batch-size", "4", "--rank", "8", "--update-proj-gap", "5", "--eval-every", "6"),
    *("--output-dir", "out", "--cache-dir", "cache"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a text: this project's own files, of which blank lines make documents."""
    pages = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "ds_fira").glob("*.py"))]
    (tmp_path / "text.txt").write_text("\n\n".join(page.read_text() for page in pages))
    return tmp_path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment in a folder, as a user would."""
    environment = {**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(PROGRAMS / command[0]), *command[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_deepspeed_launcher_two_ranks(folder: Path) -> None:
    """ZeRO-2, bf16 and activation checkpointing on two ranks: summary, plot, checkpoint and sample."""
    script = str(ROOT / "examples" / "pretrain_llama.py")
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    done = run([*launcher, script, *SMALL, "--steps", "18"], folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["steps"] == 18
    assert summary["tokens"] == 18 * 2 * 4 * 32
    assert summary["zero_stage"] == 2
    assert summary["projected_matrices"] == 14
    assert summary["refreshes"] == 14 * 4  # before steps 1, 6, 11 and 16
    assert 0.0 < summary["captured_energy"] <= 1.0
    assert summary["matrix_steps"] == 14 * 18
    assert 0 <= summary["limiter_activations"] <= summary["matrix_steps"]
    states = summary["optimizer_state_bytes"]
    assert len(states) == 2
    assert max(states) <= 1.1 * sum(states) / 2
    assert summary["optimizer_state_bytes_paper_formula"] == pytest.approx(sum(states), rel=0.01)
    assert summary["optimizer_state_bytes_adamw"] > sum(states)
    first = float((folder / "out" / "history.csv").read_text().splitlines()[1].rpartition(",")[2])
    assert summary["val_loss"] < first
    assert summary["val_perplexity"] == pytest.approx(torch.tensor(summary["val_loss"]).double().exp().item())
    assert summary["sample"]
    assert (folder / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")

    model = AutoModelForCausalLM.from_pretrained(folder / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "model")
    ids = tokenizer("the state of a matrix", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


def test_one_process_without_a_launcher(folder: Path) -> None:
    """`python examples/pretrain_llama.py` needs no launcher; AdamW trains by the same script for comparison."""
    script = str(ROOT / "examples" / "pretrain_llama.py")
    plain = [argument for argument in SMALL if argument not in ("--rank", "8", "--update-proj-gap", "5")]
    done = run(["python", script, *plain, "--steps", "6", "--optimizer", "AdamW"], folder)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert (summary["world_size"], summary["optimizer"]) == (1, "AdamW")


def test_wrong_options_stop_with_one_sentence(folder: Path) -> None:
    """A missing file and a contradiction are named before anything is loaded."""
    script = str(ROOT / "examples" / "pretrain_llama.py")
    missing = run(["python", script, "--text", "no.txt"], folder)
    assert missing.returncode == 2
    assert (
        missing.stderr.strip()
        .splitlines()[-1]
        .endswith("--data no.txt does not exist: it takes a file, a folder, a glob, c4 or a hub's owner/name")
    )
    contradiction = run(["python", script, *SMALL, "--optimizer", "AdamW"], folder)
    assert contradiction.returncode == 2
    assert "--rank belongs to FiraAdam" in contradiction.stderr
