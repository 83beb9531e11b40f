"""Figure 2: GaLore, GaLore-add and Fira at a low rank; loss spikes counted by a rule.

python -m examples.reproduction.report --only figure_2
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from examples.reproduction.lib.pool import Results
from examples.reproduction.lib.spec import SEEDS, Run, Size, seeds, settings_of
from examples.reproduction.lib.tables import (
    FAILS,
    HEIGHT,
    HOLDS,
    WIDTH,
    Claim,
    claims_table,
    lower,
    save_figure,
    score,
    smooth,
    table,
)
from examples.reproduction.table_2 import FIRA, GALORE

NAME, TITLE = "figure_2", "Figure 2: GaLore, GaLore-add and Fira, and loss spikes"
WINDOW, DEVIATIONS, AFTER_REFRESH = 20, 4.0, 3
RULE = (
    f"A step is a spike where its training loss lies more than {DEVIATIONS:g} standard deviations above the straight "
    f"line through the {WINDOW} steps before it, behind the warm-up; of neighbouring ones the first counts. It is at a "
    f"refresh where one took place in the {AFTER_REFRESH} steps before it."
)


def runs(size: Size) -> dict[str, Run]:
    """The three methods at the rank of Figure 2, 1/16 of the width."""
    rank = {"rank": size.low_rank}
    return {
        "GaLore": dataclasses.replace(GALORE, settings=settings_of(**rank)),
        # Equation 8: the raw residual is added; alpha in front of both, as of the whole update.
        "GaLore-add": dataclasses.replace(
            FIRA, settings=settings_of(**rank, scaling="none", limiter="none", formulation="paper")
        ),
        "Fira": dataclasses.replace(FIRA, settings=settings_of(**rank)),
        "Fira without limiter": dataclasses.replace(FIRA, settings=settings_of(**rank, limiter="none")),
    }


def stages(results: Results) -> list[list[Run]]:
    """All runs at once."""
    return [seeds(*runs(results.size).values())]


def find_spikes(losses: Sequence[float | None], first: int) -> list[int]:
    """The steps that are spikes by `RULE`.

    Args:
        losses: of every step.
        first: the first step looked at.
    """
    values = [loss for loss in losses if loss is not None]
    found: list[int] = []
    for step in range(max(first, WINDOW), len(values)):
        before = values[step - WINDOW : step]
        slope, intercept = statistics.linear_regression(range(WINDOW), before)
        rest = [value - (intercept + slope * place) for place, value in enumerate(before)]
        expected = intercept + slope * WINDOW
        is_spike = values[step] - expected > DEVIATIONS * statistics.stdev(rest)
        if is_spike and not (found and step - found[-1] <= AFTER_REFRESH):
            found.append(step)
    return found


def at_refreshes(steps: Sequence[int], gap: int) -> list[int]:
    """Those spikes that follow a refresh; refreshes take place at the steps 0, gap, 2 gap ..."""
    return [step for step in steps if step >= gap and step % gap < AFTER_REFRESH]


def counts(results: Results, run: Run) -> tuple[int, int]:
    """Spikes of a run over all seeds, and those of them that follow a refresh."""
    gap = dict(run.settings).get("update_proj_gap", results.size.gap)
    first = results.size.steps // 10
    found = [find_spikes(results[run.with_seed(seed)]["train_loss"], first) for seed in SEEDS]
    return sum(map(len, found)), sum(len(at_refreshes(steps, gap)) for steps in found)


def count_over_seeds(results: Results, run: Run) -> str:
    """For a table."""
    total, refreshed = counts(results, run)
    return f"{total} ({refreshed} at refreshes)"


def section(results: Results, figures: Path) -> str:
    """Markdown of the curves, the spikes and the claims."""
    methods = runs(results.size)
    rows = [(name, f"**{score(results, run)}**", count_over_seeds(results, run)) for name, run in methods.items()]
    return "\n".join(
        [
            f"Rank {results.size.low_rank} of {results.size.hidden}, a refresh every {results.size.gap} steps.\n",
            plot(results, figures),
            table(["method", "perplexity", f"spikes in {len(SEEDS)} runs"], rows),
            RULE + "\n",
            claims_table(claims(results)),
        ]
    )


def claims(results: Results) -> list[Claim]:
    """Of Figure 2 and Section 4.2."""
    methods = runs(results.size)
    galore, added, fira = ((name, score(results, methods[name])) for name in ("GaLore", "GaLore-add", "Fira"))
    (of_galore, refreshed), (of_fira, _) = counts(results, methods["GaLore"]), counts(results, methods["Fira"])
    return [
        lower("Fira is below GaLore at a low rank", "a curve", fira, galore),
        lower("Fira is below GaLore-add", "a curve", fira, added),
        Claim(
            "GaLore-add is hardly better than GaLore",
            "a curve",
            f"GaLore {galore[1]}, GaLore-add {added[1]}",
            FAILS if added[1].below(galore[1]) else HOLDS,
        ),
        Claim(
            "GaLore's loss spikes at multiples of the gap, Fira's does not",
            "a curve",
            f"GaLore {of_galore} spikes, {refreshed} of them at refreshes; Fira {of_fira}",
            HOLDS if refreshed > 0 and refreshed > of_fira else FAILS,
        ),
    ]


def plot(results: Results, figures: Path) -> str:
    """Figure 2, at the first seed."""
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT))
    for name, run in runs(results.size).items():
        axes.plot(smooth(results[run.with_seed(SEEDS[0])]["train_loss"], 5), lw=0.9, label=name)
    for step in range(results.size.gap, results.size.steps, results.size.gap):
        axes.axvline(step, color="0.85", lw=0.6, zorder=0)
    axes.set(xlabel="step (refreshes in grey)", ylabel="training loss, mean of 5 steps (nats)")
    axes.legend(fontsize=7)
    return save_figure(figure, figures, "figure_2", "Training loss of GaLore, GaLore-add and Fira")
