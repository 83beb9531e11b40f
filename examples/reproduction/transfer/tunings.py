"""What is fine-tuned to compare the preset on a pre-trained model: a frozen record per training, known by its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from examples.reproduction.transfer import study
from examples.reproduction.transfer.trials import FOLDER

RESULTS = FOLDER / "finetune"
BEFORE = "before"
# The rows of the comparison -> its row in the fine-tuning example, which says what is trained and by which optimizer.
METHODS = {
    "preset": "fira",
    "preset_at_once": "fira",
    "preset_all": "full",
    "fira": "fira",
    "galore": "galore",
    "lora": "lora",
    "full": "full",
}
SET = "news"
# An SVD of each of 210 matrices takes a core longer than twenty steps.
SUBSPACE = "randomized"
# Of prompt and answer, which leaves 18 of the article's beginning: a core takes two seconds for a hundred tokens.
TOKENS = 24
# The longer fine-tuning: subspaces that last longer, the same share of warm-up.
LONGER = {"steps": 200, "gap": 50, "warmup": 20}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """One fine-tuning on one processor core, or the model before any.

    Attributes:
        method: a key of `METHODS`, or `BEFORE`.
        lr: the peak rate.
        steps: optimizer steps; no question comes twice.
        batch: questions of a step.
        rank: of subspaces and adapters, Table 6.
        gap: steps between subspaces.
        warmup: steps in which the rate rises.
        validation: questions that choose rates.
        test: questions that are reported.
        seed: of the order of the questions and of LoRA's factors.
    """

    method: str
    lr: float
    steps: int = 60
    batch: int = 4
    rank: int = 32
    gap: int = 20
    warmup: int = 6
    validation: int = 100
    test: int = 200
    seed: int = 0

    @property
    def key(self) -> str:
        """A hash of everything that decides the result."""
        fields = {**dataclasses.asdict(self), "set": SET, "subspace": SUBSPACE, "tokens": TOKENS}
        if self.method.startswith("preset"):
            # Another preset is another training; where norms are frozen, whatever their rate.
            fields["laws"] = [study.ALPHA, study.RANK_DEPTH, study.STEP, study.WIDTH, study.WARMUP]
            fields["laws"] += [study.VECTORS] if METHODS[self.method] == "full" else []
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def tunings() -> list[Tuning]:
    """What is trained, by importance: a short length for the rates, a longer one for the comparison."""
    short = [
        (BEFORE, 0.0),
        ("preset", 0.01),
        ("fira", 1e-4),
        ("lora", 4e-4),
        ("full", 4e-5),
        ("galore", 2e-4),
        ("preset", 0.005),
    ]
    long = [*short[1:], ("fira", 4e-4), ("lora", 1.6e-3), ("full", 1e-5)]
    rest = [
        ("preset_at_once", 0.01),
        ("fira", 4e-4),
        ("full", 1e-5),
        ("lora", 1.6e-3),
        ("preset", 0.0025),
        ("galore", 4e-4),
        ("fira", 2e-4),
        ("preset_at_once", 0.00125),
        ("preset_all", 0.01),
        ("preset_all", 0.00125),
    ]
    return [
        Tuning(method=method, lr=rate, **length)
        for rates, length in ((short, {}), (long, LONGER), (rest, {}))
        for method, rate in rates
    ]
