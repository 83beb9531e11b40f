"""Table 2 and the recipe in longer runs: does what the short ones say last?

python -m examples.reproduction.report --only beyond_longer
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt

from examples.reproduction import beyond_recipe
from examples.reproduction.lib.pool import Results
from examples.reproduction.lib.spec import SEEDS, Run, seeds
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
    smooth,
    table,
    tuned,
)
from examples.reproduction.table_2 import ADAM, FIRA, GALORE

NAME, TITLE = "beyond_longer", "Twice as long"
LENGTH = 2
# Those of Table 2's grids about the best of the short runs.
RATES = (0.005, 0.002, 0.001, 0.0005)


def stretch(run: Run) -> Run:
    """A run of `LENGTH` times the steps, with as many refreshes."""
    gap = dict(run.settings).get("update_proj_gap")
    run = dataclasses.replace(run, length=LENGTH)
    return run if gap is None else beyond_recipe.changed(run, update_proj_gap=LENGTH * gap)


def adam_grid() -> list[Run]:
    """Adam at every rate, at the first seed."""
    return grid(stretch(ADAM), RATES)


def chosen(results: Results) -> dict[str, Run]:
    """What is compared: Adam at its best rate, GaLore and Fira at the paper's, and the recipe of `beyond`."""
    recipe = beyond_recipe.runs(results.size)[results.size.rank][beyond_recipe.RECIPE]
    adam = tuned(results, stretch(ADAM), RATES)
    return {"full-rank Adam": adam, "GaLore": stretch(GALORE), "Fira": stretch(FIRA), "the recipe": stretch(recipe)}


def variants(results: Results) -> dict[int, dict[str, Run]]:
    """Released Fira, the recipe, and what explains most of its gain in the short runs, by rank."""
    names = ("released", beyond_recipe.RECIPE, beyond_recipe.STILL)
    return {
        rank: {name: stretch(family[name]) for name in names}
        for rank, family in beyond_recipe.runs(results.size).items()
    }


def stages(results: Results) -> list[list[Run]]:
    """Adam's rate is known once its grid is trained."""
    first = adam_grid()
    if any(run not in results for run in first):
        return [first]
    ours = [run for family in variants(results).values() for run in family.values()]
    return [first, seeds(*chosen(results).values(), *ours)]


def section(results: Results, figures: Path) -> str:
    """Markdown of the tuning, the table, the curves and the claims."""
    runs = chosen(results)
    fira = score(results, runs["Fira"])
    size = runs["Fira"].stretched(results.size)
    rates = [("full-rank Adam", *(f"{perplexity(results, one):.2f}" for one in adam_grid()))]
    rows = [
        (name, f"{run.lr:g}", f"**{score(results, run)}**", change(score(results, run), fira))
        for name, run in runs.items()
    ]
    return "\n".join(
        [
            f"{size.steps} steps, a refresh every {size.gap} (a third of it in the recipe), rank {size.rank}.\n",
            table(["perplexity at seed 0", *(f"lr {rate:g}" for rate in RATES)], rates),
            table(["", "lr", "perplexity", "to Fira"], rows),
            plot(results, runs, figures),
            *(variants_table(results, rank, family) for rank, family in variants(results).items()),
            claims_table(claims(results)),
        ]
    )


def variants_table(results: Results, rank: int, family: dict[str, Run]) -> str:
    """Our settings over released Fira's, at one rank."""
    reference = score(results, family["released"])
    rows = []
    for name, run in family.items():
        found = score(results, run)
        rows.append((name, f"**{found}**", change(found, reference), beyond_recipe.by_seed(found, reference)))
    head = [f"rank {rank}, on released Fira", "perplexity", "to released", "by seed"]
    return table(head, rows)


def claims(results: Results) -> list[Claim]:
    """The order of Table 2, and what the recipe adds."""
    runs = chosen(results)
    adam, galore, fira, _ = ((name, score(results, run)) for name, run in runs.items())
    ours = []
    for rank, family in variants(results).items():
        released = ("released Fira", score(results, family["released"]))
        recipe = ("the recipe", score(results, family[beyond_recipe.RECIPE]))
        ours.append(lower(f"longer, rank {rank}: the recipe is below released Fira", "our goal", recipe, released))
    return [
        lower("longer: Fira is below GaLore", "31.06 against 34.88", fira, galore),
        lower("longer: Fira is below full-rank Adam", "31.06 against 34.06", fira, adam),
        lower("longer: full-rank Adam is below GaLore", "34.06 against 34.88", adam, galore),
        *ours,
    ]


def plot(results: Results, runs: dict[str, Run], figures: Path) -> str:
    """Training losses at the first seed."""
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT))
    for name, run in runs.items():
        axes.plot(smooth(results[run.with_seed(SEEDS[0])]["train_loss"], 30), lw=0.9, label=name)
    axes.set(xlabel="step", ylabel="training loss, mean of 30 steps (nats)")
    axes.legend(fontsize=7)
    return save_figure(figure, figures, "longer", "Training loss of the longer runs")
