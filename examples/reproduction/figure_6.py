"""Figure 6: Fira and GaLore over the rank, beside full-rank Adam.

python -m examples.reproduction.report --only figure_6
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt

from examples.reproduction import table_2
from examples.reproduction.lib.pool import Results
from examples.reproduction.lib.spec import Run, Size, seeds, settings_of
from examples.reproduction.lib.tables import (
    FAILS,
    HEIGHT,
    HOLDS,
    WIDTH,
    Claim,
    change,
    claims_table,
    lower,
    save_figure,
    score,
    table,
    tuned,
)
from examples.reproduction.table_2 import ADAM, FIRA, GALORE

NAME, TITLE = "figure_6", "Figure 6: the rank"
PAPER_RANKS, PAPER_WIDTH = (4, 16, 64, 128), 256
TOLERANCE = 0.05  # what "comparable to full-rank training" is taken to mean


def at_ranks(run: Run, size: Size) -> dict[int, Run]:
    """A run at the ranks that are the paper's shares of the width."""
    found = [max(1, size.hidden * rank // PAPER_WIDTH) for rank in PAPER_RANKS]
    # Without the setting where it is the size's own: the same training as in Table 2.
    return {
        rank: run if rank == size.rank else dataclasses.replace(run, settings=settings_of(rank=rank)) for rank in found
    }


def stages(results: Results) -> list[list[Run]]:
    """The runs of Table 2, and those at other ranks."""
    found = [*at_ranks(FIRA, results.size).values(), *at_ranks(GALORE, results.size).values()]
    return [*table_2.stages(results), seeds(*found)]


def section(results: Results, figures: Path) -> str:
    """Markdown of the table, the plot and the claims."""
    adam = score(results, tuned(results, ADAM))
    fira, galore = at_ranks(FIRA, results.size), at_ranks(GALORE, results.size)
    rows = [
        (
            f"{rank} of {results.size.hidden} ({share} of {PAPER_WIDTH})",
            *(
                f"**{score(results, runs[rank])}** ({change(score(results, runs[rank]), adam)})"
                for runs in (fira, galore)
            ),
        )
        for rank, share in zip(fira, PAPER_RANKS, strict=True)
    ]
    return "\n".join(
        [
            f"Full-rank Adam, tuned: {adam}. In brackets the difference from it.\n",
            table(["rank", "Fira", "GaLore"], rows),
            plot(results, figures),
            claims_table(claims(results)),
        ]
    )


def claims(results: Results) -> list[Claim]:
    """Of Figure 6, which has no figures in print."""
    adam = score(results, tuned(results, ADAM))
    fira, galore = at_ranks(FIRA, results.size), at_ranks(GALORE, results.size)
    lowest = min(fira)
    gaps = [score(results, fira[rank]).mean / adam.mean - 1 for rank in sorted(fira)[:2]]
    return [
        *(
            lower(
                f"Fira is below GaLore at rank {rank}",
                "a curve",
                ("Fira", score(results, fira[rank])),
                ("GaLore", score(results, galore[rank])),
            )
            for rank in fira
        ),
        Claim(
            "at the two lowest ranks Fira stays comparable to full rank",
            "a curve",
            ", ".join(f"{gap:+.1%}" for gap in gaps) + f" (comparable: within {TOLERANCE:.0%}, or below)",
            HOLDS if max(gaps) <= TOLERANCE else FAILS,
        ),
        lower(
            "GaLore declines at the lowest rank",
            "a curve",
            ("at the highest rank", score(results, galore[max(galore)])),
            ("at the lowest", score(results, galore[lowest])),
        ),
    ]


def plot(results: Results, figures: Path) -> str:
    """Figure 6."""
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT))
    for name, runs in (("Fira", at_ranks(FIRA, results.size)), ("GaLore", at_ranks(GALORE, results.size))):
        found = [score(results, run) for run in runs.values()]
        axes.errorbar(list(runs), [one.mean for one in found], [one.deviation for one in found], marker="o", label=name)
    axes.axhline(score(results, tuned(results, ADAM)).mean, color="black", ls="--", lw=0.8, label="full-rank Adam")
    axes.set_xscale("log", base=2)
    axes.set(xlabel=f"rank of {results.size.hidden}", ylabel="validation perplexity")
    axes.legend()
    return save_figure(figure, figures, "figure_6", "Validation perplexity over the rank")
