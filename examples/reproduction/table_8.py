"""Figures 3 and 7, Table 8: scaling factors of low-rank and of full-rank training, recorded and compared.

`python -m examples.reproduction.report --only table_8` trains what is missing and prints the section.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from examples.reproduction import table_2
from examples.reproduction.beyond_sensitivity import changed
from examples.reproduction.lib.pool import Results
from examples.reproduction.lib.similarity import correlations, plot
from examples.reproduction.lib.spec import SEEDS, Run
from examples.reproduction.lib.tables import FAILS, HEIGHT, HOLDS, WIDTH, Claim, claims_table, save_figure, table, tuned
from examples.reproduction.table_2 import ADAM, FIRA

NAME, TITLE = "table_8", "Figures 3 and 7, Table 8: are scaling factors alike?"
SIGNIFICANT = 0.05
# Table 8, LLaMA 60M: Spearman and Kendall at matrix level, then at column level.
PAPER = (0.9972, 0.9662, 0.9372, 0.7942)
EARLY = 0.1  # Figure 7: 1K of 10K steps


def recorded(results: Results) -> dict[str, Run]:
    """The trainings that are recorded, every step; the first is what the others are compared with."""
    adam = dataclasses.replace(tuned(results, ADAM), record=1)
    size = results.size
    return {
        "full rank": adam,
        "full rank, another seed": adam.with_seed(SEEDS[1]),
        f"Fira, rank {size.rank}": dataclasses.replace(FIRA, record=1),
        f"Fira, rank {size.low_rank}": dataclasses.replace(changed(FIRA, rank=size.low_rank), record=1),
    }


def stages(results: Results) -> list[list[Run]]:
    """The grid that tunes Adam, then the recorded trainings."""
    first = table_2.stages(results)[0]
    if any(run not in results for run in first):
        return [first]
    return [first, list(recorded(results).values())]


def factors(results: Results, run: Run) -> dict[str, Any]:
    """What a training recorded, as arrays."""
    return {
        name: {key: np.asarray(value) if key in ("matrix", "column", "count") else value for key, value in one.items()}
        for name, one in results[run]["scaling_factors"].items()
    }


def compare(results: Results) -> dict[str, dict[str, Any]]:
    """The correlations of every recorded training with full-rank training."""
    runs = recorded(results)
    full = factors(results, runs.pop("full rank"))
    return {name: correlations(factors(results, run), full, seed=SEEDS[0]) for name, run in runs.items()}


def section(results: Results, figures: Path) -> str:
    """Markdown of Table 8, Figures 3 and 7, and the claims."""
    rows = [
        (
            name,
            *(
                f"{found[level][test]:.4f} ({found[level][f'{test}_p']:.1e})"
                for level in ("matrix", "column")
                for test in ("spearman", "kendall")
            ),
            f"{found['column']['within']:.2f}",
        )
        for name, found in compare(results).items()
    ]
    rows.append(("paper, LLaMA 60M, rank 128", *(f"{value:.4f}" for value in PAPER), "-"))
    runs = recorded(results)
    shown = {name: factors(results, run) for name, run in reversed(runs.items()) if "another" not in name}
    plot(shown, figures / "figure_3.png")
    return "\n".join(
        [
            "Correlation of each training's factors, averaged over all steps, with those of full-rank Adam (p-value); "
            "columns are pooled over matrices, `within` is the mean coefficient inside a matrix. Another seed of "
            "full-rank training shows how alike they can be.\n",
            table(
                ["training", "matrix, Spearman", "matrix, Kendall", "column, Spearman", "column, Kendall", "within"],
                rows,
            ),
            "![Scaling factors of low-rank and full-rank training](reproduction/figure_3.png)\n",
            plot_early(results, figures),
            claims_table(claims(results)),
        ]
    )


def claims(results: Results) -> list[Claim]:
    """Of Section 4.1, Table 8 and Figure 7."""
    found = []
    for name, one in compare(results).items():
        if "another" in name:
            continue
        for level, paper in (("matrix", PAPER[0]), ("column", PAPER[2])):
            coefficient, p = one[level]["spearman"], one[level]["spearman_p"]
            found.append(
                Claim(
                    f"{name}: factors rank {'matrices' if level == 'matrix' else 'columns'} as full-rank training does",
                    f"Spearman {paper:.2f}",
                    f"Spearman {coefficient:.2f}, p {p:.1e}",
                    HOLDS if coefficient > 0 and p < SIGNIFICANT else FAILS,
                )
            )
    first, later = early_variation(results)
    found.append(
        Claim(
            "scaling factors vary most at the beginning",
            "a curve",
            f"standard deviation of their logarithm over neighbouring steps {first:.3f} in the first tenth, "
            f"{later:.3f} after",
            HOLDS if first > later else FAILS,
        )
    )
    return found


def early_variation(results: Results) -> tuple[float, float]:
    """How much the logarithm of a matrix's factor changes from step to step, in the first tenth and after it."""
    run = recorded(results)[f"Fira, rank {results.size.rank}"]
    parts: tuple[list[float], list[float]] = ([], [])
    for one in factors(results, run).values():
        changes = np.diff(np.log(one["matrix"]))
        cut = math.ceil(EARLY * len(changes))
        parts[0].append(float(np.std(changes[:cut])))
        parts[1].append(float(np.std(changes[cut:])))
    return statistics.fmean(parts[0]), statistics.fmean(parts[1])


def plot_early(results: Results, figures: Path) -> str:
    """Figure 7: the factors of all matrices in the first tenth of the steps."""
    run = recorded(results)[f"Fira, rank {results.size.rank}"]
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT))
    for one in factors(results, run).values():
        shown = math.ceil(EARLY * results.size.steps)
        axes.semilogy(one["steps"][:shown], one["matrix"][:shown], lw=0.7, color="tab:blue", alpha=0.5)
    axes.set(xlabel="step", ylabel="scaling factor of each matrix")
    return save_figure(figure, figures, "figure_7", "Scaling factors in the first tenth of the steps")
