"""Trainings at several precisions of the products: what is kept of them, and how they are compared."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers, which has the model, is not installed")

from benchmarks.quality import paired, precision_training


@pytest.mark.full
def test_a_run_that_is_done_is_not_made_again(tmp_path: Path) -> None:
    options = argparse.Namespace(
        folder=tmp_path, steps=4, batch_size=1, seq_length=8, layers=1, rank=4, gap=2, seeds=[0], preset=None
    )
    kept = tmp_path / "precision-bfloat16-0-steps4-batch_size1-seq_length8-layers1-rank4-gap2.json"
    kept.write_text(json.dumps({"loss": 4.5, "seconds": 1.0}))
    assert precision_training.loss_of(None, "bfloat16", 0, options) == 4.5
    # One of other options needs its data.
    with pytest.raises(AttributeError, match="NoneType"):
        precision_training.loss_of(None, "bfloat16", 1, options)


@pytest.mark.full
def test_differences_are_paired_by_seed() -> None:
    found = paired.differences({"float32": [4.0, 5.0], "bfloat16": [4.25, 4.75], "tf32": [4.5]}, "float32")
    assert found == {"bfloat16": [0.25, -0.25], "tf32": [0.5]}
    said = " ".join(paired.said("bfloat16", found["bfloat16"], "float32").split())
    assert said == "bfloat16 to float32: +0.0000 +- 0.2500 by seed +0.2500 -0.2500"
