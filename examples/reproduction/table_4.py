"""Table 4 and Figure 4: Fira without its parts.

python -m examples.reproduction.report --only table_4
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt

from examples.reproduction import figure_2
from examples.reproduction.lib.pool import Results
from examples.reproduction.lib.spec import SEEDS, Run, seeds, settings_of
from examples.reproduction.lib.tables import (
    HEIGHT,
    WIDTH,
    Claim,
    change,
    claims_table,
    lower,
    save_figure,
    score,
    table,
)
from examples.reproduction.table_2 import FIRA

NAME, TITLE = "table_4", "Table 4 and Figure 4: the parts of Fira"
CLIP = 1.0


def without(**settings: object) -> Run:
    """Fira with other settings."""
    return dataclasses.replace(FIRA, settings=settings_of(**settings))


WITHOUT_LIMITER = without(limiter="none")
VARIANTS = {
    "without scaling": (without(scaling="none"), 37.06),
    "scaling per matrix": (without(scaling="matrix"), 31.52),
    "without limiter": (WITHOUT_LIMITER, 32.22),
    "gradient clipping instead of the limiter": (dataclasses.replace(WITHOUT_LIMITER, clip=CLIP), 31.22),
    "Fira": (FIRA, 31.06),
}


def stages(results: Results) -> list[list[Run]]:
    """All runs at once."""
    return [seeds(*(run for run, _ in VARIANTS.values()))]


def section(results: Results, figures: Path) -> str:
    """Markdown of the table, the curves and the claims."""
    fira = score(results, FIRA)
    rows = [
        (
            name,
            f"**{score(results, run)}**",
            change(score(results, run), fira),
            published,
            f"{published / VARIANTS['Fira'][1] - 1:+.1%}",
            figure_2.count_over_seeds(results, run),
        )
        for name, (run, published) in VARIANTS.items()
    ]
    return "\n".join(
        [
            table(["variant", "perplexity", "to Fira", "paper", "to Fira there", "spikes"], rows),
            figure_2.RULE + "\n",
            plot(results, figures),
            claims_table(claims(results)),
        ]
    )


def claims(results: Results) -> list[Claim]:
    """Each part lowers the perplexity."""
    fira = ("Fira", score(results, FIRA))
    texts = {
        "without scaling": "scaling the residual helps",
        "scaling per matrix": "a factor per column is better than one per matrix",
        "without limiter": "the limiter helps",
        "gradient clipping instead of the limiter": "the limiter is better than gradient clipping",
    }
    return [
        lower(text, f"31.06 against {VARIANTS[name][1]:.2f}", fira, (name, score(results, VARIANTS[name][0])))
        for name, text in texts.items()
    ]


def plot(results: Results, figures: Path) -> str:
    """Figure 4: training loss and gradient norm, at the first seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(1.5 * WIDTH, HEIGHT))
    for name in ("without limiter", "gradient clipping instead of the limiter", "Fira"):
        found = results[VARIANTS[name][0].with_seed(SEEDS[0])]
        left.plot(found["train_loss"], lw=0.8, label=name)
        right.semilogy(found["grad_norm"], lw=0.8, label=name)
    left.set(xlabel="step", ylabel="training loss (nats)")
    right.set(xlabel="step", ylabel="gradient norm")
    right.legend(fontsize=7)
    return save_figure(figure, figures, "figure_4", "Training loss and gradient norm of three variants of Fira")
