"""What readers ask: how much do learning rate, gamma, gap, formulation, states, architecture and text matter?

python -m examples.reproduction.report --only beyond_sensitivity
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from examples.reproduction import table_2
from examples.reproduction.lib.pool import Results
from examples.reproduction.lib.spec import LEARNING_RATES, Run, Size, seeds, settings_of
from examples.reproduction.lib.tables import (
    HEIGHT,
    WIDTH,
    Claim,
    change,
    claims_table,
    grid,
    lower,
    perplexity,
    save_figure,
    score,
    table,
    tuned,
)
from examples.reproduction.table_2 import ADAM, FIRA, GALORE

NAME, TITLE = "beyond_sensitivity", "Open questions: settings, architecture, text, precision of the states"
GAMMAS = (1.001, 1.1, 2.0)
OTHERS = {
    "GPT-NeoX on the reviews": {"architecture": "gpt_neox"},
    "LLaMA on Python's standard library": {"text": "python"},
}
STATES = ("bfloat16", "int8")


def gaps(size: Size) -> tuple[int, ...]:
    """A third of the size's gap, three and ten times it; the last is the whole run on its first subspace."""
    return size.gap // 3, 3 * size.gap, 10 * size.gap


def changed(run: Run, **settings: Any) -> Run:
    """A run with settings on top of its own."""
    return dataclasses.replace(run, settings=settings_of(**{**dict(run.settings), **settings}))


def families(size: Size) -> dict[str, dict[str, Run]]:
    """Runs by question, each answered over all seeds."""
    low = changed(FIRA, rank=size.low_rank)
    return {
        "gamma": {"1.01 (the paper)": FIRA} | {f"{gamma:g}": changed(FIRA, gamma=gamma) for gamma in GAMMAS},
        "gap": {f"{size.gap}": FIRA} | {f"{gap}": changed(FIRA, update_proj_gap=gap) for gap in gaps(size)},
        "formulation": {
            f"released, rank {size.rank}": FIRA,
            f"paper, rank {size.rank}": changed(FIRA, formulation="paper"),
            f"released, rank {size.low_rank}": low,
            f"paper, rank {size.low_rank}": changed(low, formulation="paper"),
        },
        "states": {"float32": FIRA} | {dtype: changed(FIRA, state_dtype=dtype) for dtype in STATES},
    }


def elsewhere(results: Results, change: dict[str, str]) -> dict[str, Run]:
    """Adam at the rate tuned for the LLaMA, GaLore and Fira at the paper's, on another architecture or text."""
    return {run.method: dataclasses.replace(run, seed=0, **change) for run in (tuned(results, ADAM), GALORE, FIRA)}


def stages(results: Results) -> list[list[Run]]:
    """The grid of Table 2, then everything else."""
    size = results.size
    first = [*table_2.stages(results)[0], *grid(changed(FIRA, rank=size.low_rank))]
    if any(run not in results for run in first):
        return [first]
    runs = [run for family in families(size).values() for run in family.values()]
    runs += [run for change in OTHERS.values() for run in elsewhere(results, change).values()]
    return [first, seeds(*runs)]


def section(results: Results, figures: Path) -> str:
    """Markdown: a table per question."""
    size = results.size
    parts = ["### Learning rate\n", rates_table(results), plot(results, figures)]
    titles = {
        "gamma": "### The limiter's gamma\n",
        "gap": f"### The gap, of {size.steps} steps\n",
        "formulation": "### Formulation: the released code or Algorithm 1\n",
        "states": "### States in lower precision\n",
    }
    for name, family in families(size).items():
        first = score(results, next(iter(family.values())))
        rows = [
            (
                label,
                f"**{score(results, run)}**",
                change(score(results, run), first),
                f"{results[run]['state_bytes'] / 1e6:.2f}",
            )
            for label, run in family.items()
        ]
        parts += [titles[name], table([name, "perplexity", "to the first", "state MB"], rows)]
    parts.append("### Another architecture, another text\n")
    rows = []
    for label, change_ in OTHERS.items():
        found = elsewhere(results, change_)
        rows.append((label, *(f"**{score(results, found[name])}**" for name in ("Adam", "GaLore", "Fira"))))
    parts += [table(["", "Adam", "GaLore", "Fira"], rows), claims_table(claims(results))]
    return "\n".join(parts)


def claims(results: Results) -> list[Claim]:
    """The order of Table 2 elsewhere."""
    found = []
    for label, change_ in OTHERS.items():
        runs = elsewhere(results, change_)
        fira, galore, adam = ((name, score(results, runs[name])) for name in ("Fira", "GaLore", "Adam"))
        found.append(lower(f"{label}: Fira is below GaLore", "not there", fira, galore))
        found.append(lower(f"{label}: Fira is below full-rank Adam", "not there", fira, adam))
    return found


def swept(size: Size) -> dict[str, Run]:
    """The runs whose learning rate is swept."""
    return {
        "Adam": ADAM,
        f"Fira, rank {size.rank}": FIRA,
        f"Fira, rank {size.low_rank}": changed(FIRA, rank=size.low_rank),
        f"GaLore, rank {size.rank}": GALORE,
    }


def rates_table(results: Results) -> str:
    """Perplexity over the learning rate, at the first seed."""
    rows = [
        (name, *(f"{perplexity(results, one):.2f}" for one in grid(run))) for name, run in swept(results.size).items()
    ]
    return table(["validation perplexity at seed 0", *(f"lr {rate:g}" for rate in LEARNING_RATES)], rows)


def plot(results: Results, figures: Path) -> str:
    """Perplexity over the learning rate."""
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT))
    for name, run in swept(results.size).items():
        axes.loglog(LEARNING_RATES, [perplexity(results, one) for one in grid(run)], marker="o", label=name)
    axes.set(xlabel="learning rate", ylabel="validation perplexity")
    axes.legend()
    return save_figure(figure, figures, "learning_rates", "Validation perplexity over the learning rate")
