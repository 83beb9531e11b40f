"""Commands as programs of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.programs import run_command


def test_estimate_as_a_program(tmp_path: Path) -> None:
    """The table and the JSON of the clause's example, in a process of its own."""
    file = tmp_path / "deep" / "estimate.json"
    command = ["estimate", "--model", "llama_1b", "--rank", "512", "--gpus", "8"]
    command += ["--zero-stage", "2", "--gpu-memory", "a100-40", "--batch-size", "16", "--seq-length", "256"]
    done = run_command([*command, "--json", str(file)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "61.1% less than AdamW's" in done.stdout
    for word in ("AdamW", "GaLore", "LoRA", "Fira", "optimizer states", "fits 40 GiB", "largest micro-batch"):
        assert word in done.stdout
    written = json.loads(file.read_text())
    assert written["methods"]["Fira"]["fits"] is True
    assert len(written["methods"]["Fira"]["by_rank"]) == 8
    assert written["state_saving"] == pytest.approx(0.611, abs=5e-4)
