"""What is trained: sizes, methods and runs. A run is fully described by a frozen record, and known by its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

# The grid from which the paper tunes the baselines' learning rates (Appendix A.2).
LEARNING_RATES = (0.01, 0.005, 0.001, 0.0005, 0.0001)
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model and a training length; every run of a report shares them unless it says otherwise.

    Attributes:
        name: of the folder of results.
        hidden, intermediate, layers, heads: of the LLaMA.
        vocabulary: of a tokenizer trained on the text.
        seq_length: tokens of a row.
        batch: rows of a step.
        steps: optimizer steps.
        gap: steps between refreshes of the subspace.
        rank: the subspace rank of Table 2, a quarter of the hidden width as in the paper's LLaMA 60M.
        low_rank: a sixteenth of the width, as in Figure 2.
        dtype: of weights and gradients.
        validation_rows: rows of the validation loss.
        micro_batch: rows of one pass, None for the whole batch.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    seq_length: int
    batch: int
    steps: int
    gap: int
    rank: int
    low_rank: int
    dtype: str
    validation_rows: int
    micro_batch: int | None = None


SIZES = {
    # All runs of the report in about an hour and a half on two cores. The gap is a tenth of the run: 10 refreshes.
    "cpu": Size(
        name="cpu",
        hidden=128,
        intermediate=344,
        layers=2,
        heads=4,
        vocabulary=512,
        seq_length=64,
        batch=16,
        steps=300,
        gap=30,
        rank=32,
        low_rank=8,
        dtype="float32",
        validation_rows=512,
    ),
    # LLaMA 60M as the paper trains it (Table 5): 131K tokens a step, gap 200, bf16. The paper makes 10,000 steps.
    "gpu": Size(
        name="gpu",
        hidden=512,
        intermediate=1376,
        layers=8,
        heads=8,
        vocabulary=32000,
        seq_length=256,
        batch=512,
        steps=10_000,
        gap=200,
        rank=128,
        low_rank=32,
        dtype="bfloat16",
        validation_rows=4096,
        micro_batch=128,
    ),
    # Seconds: for tests, and to see that everything works.
    "tiny": Size(
        name="tiny",
        hidden=64,
        intermediate=96,
        layers=1,
        heads=2,
        vocabulary=300,
        seq_length=16,
        batch=4,
        steps=8,
        gap=4,
        rank=16,
        low_rank=4,
        dtype="float32",
        validation_rows=8,
    ),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        method: "Adam", "Fira", "GaLore", "LoRA" or "ReLoRA"; Fira's variants are Fira with other `settings`.
        lr: peak learning rate.
        settings: further settings of the optimizer or adapter, as sorted (name, value) pairs; `settings_of` makes them.
        seed: of the initial weights and of the order of the data.
        text: "reviews" (packaged) or "python" (the standard library's sources).
        architecture: "llama", "gpt_neox" or "opt".
        clip: the largest gradient norm, None for no clipping.
        record: steps between records of the scaling factors, 0 for none.
        length: steps and gap, in those of the size.
    """

    method: str
    lr: float
    settings: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    text: str = "reviews"
    architecture: str = "llama"
    clip: float | None = None
    record: int = 0
    length: int = 1

    def key(self, size: Size) -> str:
        """A hash of everything that decides the result."""
        own = dataclasses.asdict(self)
        if self.length == 1:  # so that runs keep the keys that they had before there were longer ones
            del own["length"]
        content = {"size": dataclasses.asdict(size), "run": own}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def stretched(self, size: Size) -> Size:
        """The size with this run's steps, and with its gap."""
        return dataclasses.replace(size, steps=self.length * size.steps, gap=self.length * size.gap)

    def with_seed(self, seed: int) -> Run:
        """The same training from other initial weights, on the data in another order."""
        return dataclasses.replace(self, seed=seed)


def settings_of(**settings: Any) -> tuple[tuple[str, Any], ...]:
    """Settings as a run keeps them."""
    return tuple(sorted(settings.items()))


def seeds(*runs: Run) -> list[Run]:
    """Every run at every seed."""
    return [run.with_seed(seed) for run in runs for seed in SEEDS]
