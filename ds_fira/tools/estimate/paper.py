"""The paper's Table 2, its memory column, beside what its own formulas (Table 1, Appendix A.8) give.

A.8 counts weights and optimizer states in bfloat16, two bytes each. Full-Rank: W + 2 W. Fira and GaLore: W and, for
every projected matrix, m r + 2 n r (+ 1), with AdamW's two moments for the rest. LoRA and ReLoRA: W and the adapters,
m r + n r each, with AdamW's moments for the adapters and the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

from ds_fira.optim.state_size import adamw_bytes, formula_bytes
from ds_fira.tools.dry_run import PlannedRun, plan_run
from ds_fira.tools.estimate.cards import GIB
from ds_fira.tools.estimate.methods import lora_numel
from ds_fira.tools.estimate.model import load_model
from ds_fira.tools.models import PAPER_RANKS

BYTES = 2  # of an element in bfloat16
MODELS = ("llama_60m", "llama_130m", "llama_350m", "llama_1b")
# Table 2 in its unit "G", by model; GaLore's row equals Fira's, ReLoRA's equals LoRA's.
PUBLISHED = {
    "Full-Rank": (0.36, 0.76, 2.06, 7.80),
    "Fira": (0.24, 0.52, 1.22, 4.38),
    "GaLore": (0.24, 0.52, 1.22, 4.38),
    "LoRA": (0.36, 0.80, 1.76, 6.17),
    "ReLoRA": (0.36, 0.80, 1.76, 6.17),
}
# Half a unit of its last digit, and a little for the division.
ROUNDING = 0.00501
# What the names of the models say.
NOMINAL = {"llama_60m": 60e6, "llama_130m": 130e6, "llama_350m": 350e6, "llama_1b": 1.3e9}
UNITS = {"GB": 1e9, "GiB": float(GIB)}


@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Attributes:
        method: the row.
        model: the column.
        published: the paper's figure, in its unit.
        own: bytes by the formula.
    """

    method: str
    model: str
    published: float
    own: int

    def difference(self, unit: str) -> float:
        """Own over published less 1, the published figure read in GB or GiB."""
        return self.own / UNITS[unit] / self.published - 1

    def follows(self, unit: str) -> bool:
        """Whether the formula rounds to the published figure."""
        return abs(self.own / UNITS[unit] - self.published) <= ROUNDING


def table_2() -> list[Cell]:
    """Every cell, row by row."""
    runs = {model: _run(model) for model in MODELS}
    return [
        Cell(method, model, figure, sum(method_bytes(method, runs[model])))
        for method, figures in PUBLISHED.items()
        for model, figure in zip(MODELS, figures, strict=True)
    ]


def state_saving(model: str = "llama_1b") -> float:
    """The share of AdamW's optimizer states that Fira's formula saves, AdamW for what is not projected in both."""
    records = _run(model).records
    return 1 - formula_bytes(records) / adamw_bytes(records)


def implied_saving() -> tuple[float, float]:
    """The saving that the 1B column itself implies, with 2 bytes for 1.3e9 weights in GB, and for the real number."""
    full, fira = PUBLISHED["Full-Rank"][-1], PUBLISHED["Fira"][-1]
    weights = [BYTES * count / 1e9 for count in (NOMINAL["llama_1b"], _elements(_run("llama_1b")))]
    nominal, real = (1 - (fira - weight) / (full - weight) for weight in weights)
    return nominal, real


def conventions(method: str, model: str) -> Iterator[tuple[tuple[str, ...], float]]:
    """Ways to count that were tried, with the figure each gives; for "Full-Rank", "Fira" and "LoRA".

    Unit; vocabulary; head tied or not; weights counted, as the name says or without embeddings; and for the low-rank
    methods what of embeddings, head and norms has AdamW's states, which terms of the formula are counted, and (LoRA)
    what is adapted.
    """
    run = _run(model)
    rank = PAPER_RANKS[model]
    matrices = [record.shape for record in run.records if record.rank is not None]
    norms = sum(record.shape[0] for record in run.records if len(record.shape) == 1)
    projected = sum(m * n for m, n in matrices)
    width = min(matrices[0])
    for unit, vocabulary, tied in product(UNITS, (32000, 32100, 32128), (False, True)):
        embedding, both_sides = vocabulary * width, 1 if tied else 2
        embeddings = embedding * both_sides
        weights = {"all": projected + embeddings + norms, "by name": NOMINAL[model], "projected": projected}
        rests = {"all": embeddings + norms, "one embedding": embedding + norms, "norms": norms, "none": 0}
        low_rank = {
            "mr+2nr": sum(min(s) * rank + 2 * max(s) * rank for s in matrices),
            "nr+2mr": sum(max(s) * rank + 2 * min(s) * rank for s in matrices),
            "2nr": sum(2 * max(s) * rank for s in matrices),
            "2mr": sum(2 * min(s) * rank for s in matrices),
            "attention": sum(3 * s[0] * rank for s in matrices if s[0] == s[1]),
        }
        low_rank["embeddings too"] = low_rank["mr+2nr"] + both_sides * rank * (width + 2 * vocabulary)
        adapters = {
            "all": sum(lora_numel(s, rank) for s in matrices),
            "attention": sum(lora_numel(s, rank) for s in matrices if s[0] == s[1]),
            "MLP": sum(lora_numel(s, rank) for s in matrices if s[0] != s[1]),
        }
        base = (unit, f"vocabulary {vocabulary}", "tied head" if tied else "untied head")
        for counted, weight in weights.items():
            named = (*base, f"weights {counted}")
            if method == "Full-Rank":
                yield named, 3 * BYTES * weight / UNITS[unit]
                continue
            # A LoRA adapter counts as weight and with two moments.
            terms, times = (low_rank, 1) if method == "Fira" else (adapters, 3)
            for (rest, unprojected), (term, count) in product(rests.items(), terms.items()):
                total = weight + times * count + 2 * unprojected
                yield (*named, f"AdamW for {rest}", term), BYTES * total / UNITS[unit]


def reproduced(method: str) -> dict[tuple[str, ...], list[str]]:
    """By convention, the models whose published cell it gives; conventions that give none are left out."""
    found: dict[tuple[str, ...], list[str]] = {}
    for model, figure in zip(MODELS, PUBLISHED[method], strict=True):
        for convention, value in conventions(method, model):
            if abs(value - figure) <= ROUNDING:
                found.setdefault(convention, []).append(model)
    return found


def method_bytes(method: str, run: PlannedRun) -> tuple[int, int]:
    """Bytes of weights, LoRA's adapters among them, and of optimizer states in bfloat16, by Table 1 and A.8.

    Args:
        method: a row of `PUBLISHED`.
        run: a model planned with the rank.
    """
    weights = _elements(run)
    if method == "Full-Rank":
        return BYTES * weights, BYTES * 2 * weights
    states = formula_bytes(run.records, 1)
    if method in ("Fira", "GaLore"):
        extra = 0 if method == "Fira" else sum(record.matrices for record in run.records)
        return BYTES * weights, BYTES * (states - extra)
    adapters = sum(lora_numel(record.shape, record.rank) for record in run.records if record.rank is not None)
    rest = sum(record.state_elements for record in run.records if record.rank is None)
    return BYTES * (weights + adapters), BYTES * (2 * adapters + rest)


@cache
def _run(model: str) -> PlannedRun:
    return plan_run(load_model(model), 1, 0, rank=PAPER_RANKS[model])


def _elements(run: PlannedRun) -> int:
    return adamw_bytes(run.records, 1) // 2
