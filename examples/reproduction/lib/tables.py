"""What the sections on training share: means and spreads over seeds, claims and verdicts, Markdown, plots."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: a training machine has no screen
import matplotlib.pyplot as plt

from examples.reproduction.lib.pool import Results
from examples.reproduction.lib.spec import LEARNING_RATES, SEEDS, Run

WIDTH, HEIGHT, DPI = 6.4, 3.6, 110
HOLDS, WITHIN, FAILS = "holds", "not told apart", "does not hold"


@dataclasses.dataclass(frozen=True)
class Score:
    """Validation perplexities of a training at every seed, in the order of `SEEDS`; infinity where it diverged."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """The sample's standard deviation."""
        return statistics.stdev(self.values) if len(self.values) > 1 and self.finite else math.nan

    @property
    def finite(self) -> bool:
        """Whether no seed diverged."""
        return all(map(math.isfinite, self.values))

    def __str__(self) -> str:
        diverged = sum(not math.isfinite(value) for value in self.values)
        if diverged:
            return f"diverged at {diverged} of {len(self.values)} seeds"
        return f"{self.mean:.2f} ± {self.deviation:.2f}" if len(self.values) > 1 else f"{self.mean:.2f}"

    def below(self, other: Score) -> bool:
        """Outside the spread: the worst seed of this one is better than the best of the other."""
        return max(self.values) < min(other.values)


def perplexity(results: Results, run: Run) -> float:
    """Of one run."""
    loss = results[run]["val_loss"]
    return math.inf if loss is None else math.exp(loss)


def score(results: Results, run: Run, seeds: Sequence[int] = SEEDS) -> Score:
    """Of a run at several seeds."""
    return Score(tuple(perplexity(results, run.with_seed(seed)) for seed in seeds))


def change(score: Score, reference: Score) -> str:
    """The difference of two mean perplexities, as a share of the second."""
    return f"{score.mean / reference.mean - 1:+.1%}" if score.finite and reference.finite else "-"


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the paper says, what was found, and whether that agrees.

    Attributes:
        text: the claim, in our words.
        paper: its figures there.
        here: the figures found.
        verdict: `HOLDS`, `WITHIN` or `FAILS`.
    """

    text: str
    paper: str
    here: str
    verdict: str


def lower(text: str, paper: str, first: tuple[str, Score], second: tuple[str, Score]) -> Claim:
    """The claim that the first perplexity is the lower one; it holds where no seed of the two overlaps."""
    (one, better), (other, worse) = first, second
    verdict = HOLDS if better.below(worse) else FAILS if worse.below(better) else WITHIN
    return Claim(text, paper, f"{one} {better}, {other} {worse} ({change(better, worse)})", verdict)


def claims_table(claims: Iterable[Claim]) -> str:
    """Markdown of claims."""
    return table(
        ["claim", "paper", "here", "verdict"], [(one.text, one.paper, one.here, f"**{one.verdict}**") for one in claims]
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def grid(run: Run, rates: Sequence[float] = LEARNING_RATES) -> list[Run]:
    """A run at every learning rate of the paper's grid, at the first seed."""
    return [dataclasses.replace(run, lr=rate, seed=SEEDS[0]) for rate in rates]


def tuned(results: Results, run: Run, rates: Sequence[float] = LEARNING_RATES) -> Run:
    """The run at the learning rate of the grid with the lowest validation perplexity at the first seed.

    Args:
        results: hold the runs of `grid`.
        run: at any learning rate.
        rates: the grid.
    """
    best = min(grid(run, rates), key=lambda one: perplexity(results, one))
    return dataclasses.replace(run, lr=best.lr)


def smooth(values: Sequence[float | None], width: int = 10) -> list[float]:
    """A running mean over the last `width` values that are there."""
    kept: list[float] = []
    found = []
    for value in values:
        if value is None:
            break
        kept.append(value)
        found.append(statistics.fmean(kept[-width:]))
    return found


def save_figure(figure: plt.Figure, folder: Path, name: str, text: str) -> str:
    """Write a plot; the Markdown that shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return f"![{text}](reproduction/{name}.png)\n"
