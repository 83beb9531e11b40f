"""The text of the runs: tokenised once by the pre-training example's own preparation, then read as one array."""

from __future__ import annotations

import dataclasses
import functools
import json
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import load_from_disk
from torch import Tensor

from examples.pretraining.text_data import TextRecipe, prepare
from examples.reproduction.lib.spec import Size

CACHE = Path(__file__).resolve().parents[3] / "runs" / "paper"
VALIDATION_SHARE = 0.02
# The split and the tokenizer are the same for all runs; a run's seed shuffles the training rows.
SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True)
class Text:
    """`train` and `validation` are (rows, seq_length) arrays of token ids; `facts` describes where they come from."""

    train: np.ndarray
    validation: Tensor
    facts: dict

    def batches(self, seed: int, batch: int) -> np.ndarray:
        """Row numbers of the steps of an epoch, (steps, batch): no row comes twice."""
        order = np.random.default_rng(seed).permutation(len(self.train))
        return order[: len(order) // batch * batch].reshape(-1, batch)


def folder_of(text: str, size: Size) -> Path:
    """Prepare a text for a size unless that has been done, and return its folder."""
    source = None if text == "reviews" else standard_library(CACHE / "python.jsonl")
    recipe = TextRecipe(
        text=source,
        vocab_size=size.vocabulary,
        seq_length=size.seq_length,
        seed=SPLIT_SEED,
        validation_share=VALIDATION_SHARE,
    )
    return prepare(recipe, CACHE / "text")


@functools.cache
def load(text: str, size: Size) -> Text:
    """The prepared text of a size; read once in a process."""
    folder = folder_of(text, size)

    def rows(split: str) -> np.ndarray:
        table = load_from_disk(str(folder / split)).with_format("numpy")
        return np.asarray(table["input_ids"][:])

    validation = torch.from_numpy(rows("validation")[: size.validation_rows]).long()
    return Text(rows("train"), validation, json.loads((folder / "facts.json").read_text()))


def standard_library(path: Path) -> Path:
    """Python's own standard library as a text, a document per source file; without its tests and what is installed."""
    if not path.exists():
        root = Path(sysconfig.get_paths()["stdlib"])
        sources = sorted(root.rglob("*.py"))
        skipped = {"test", "tests", "site-packages", "dist-packages", "idle_test"}
        kept = [source for source in sources if not skipped & set(source.relative_to(root).parts)]
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: trainings that start together may all find it missing.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial.jsonl", delete=False) as lines:
            for source in kept:
                lines.write(json.dumps({"text": source.read_text(errors="replace")}) + "\n")
        Path(lines.name).replace(path)
    return path
