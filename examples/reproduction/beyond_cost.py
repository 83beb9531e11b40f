"""What the recipe's settings cost: optimizer steps and refreshes against released Fira and PyPI `fira`.

`python -m examples.reproduction.beyond_cost` measures on one thread and prints the section.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ds_fira
from examples.reproduction import beyond_recipe
from examples.reproduction.lib import data
from examples.reproduction.lib.alone import run_alone
from examples.reproduction.lib.methods import ALPHA
from examples.reproduction.lib.provenance import stamp, stamp_line
from examples.reproduction.lib.spec import SIZES, Size
from examples.reproduction.lib.tables import FAILS, HOLDS, WITHIN, Claim, claims_table, table
from examples.reproduction.lib.train import Training
from examples.reproduction.table_2 import FIRA

NAME, TITLE = "beyond_cost", "What the variants cost"
PEER = "PyPI fira 1.0.2"
NEVER = 10**6  # steps: a gap that no measurement reaches the end of
# Steps and refreshes measured of each kind, in turns.
STEPS, REFRESHES = 40, 5
WINDOWS = 8
LR = 0.01


def kinds(size: Size) -> dict[str, dict[str, Any]]:
    """Settings by name: released Fira, then those variants of `beyond` that change what a step computes."""
    found = beyond_recipe.variants(size, size.rank)
    names = ("gamma 1.1", beyond_recipe.RECIPE, beyond_recipe.TWICE, f"{beyond_recipe.TWICE}, {beyond_recipe.RECIPE}")
    return {"released Fira": {}, **{name: found[name] for name in names}}


def shapes(size: Size) -> list[tuple[int, int]]:
    """The projected matrices of one layer of a LLaMA."""
    square, wide = (size.hidden, size.hidden), (size.intermediate, size.hidden)
    return [square] * 4 + [wide] * 2 + [wide[::-1]]


def stepper(size: Size, settings: dict[str, Any] | None, gap: int) -> Callable[[], float]:
    """Makes one step of a layer's matrices with the next gradients; returns its seconds.

    Args:
        size: of the layer.
        settings: of FiraAdam; None for PyPI fira.
        gap: steps between refreshes.
    """
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes(size)]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes(size)] for _ in range(3)]
    group = {"params": params, "rank": size.rank, "update_proj_gap": gap, "alpha": ALPHA, "proj_type": "std"}
    if settings is None:
        fira = importlib.import_module("fira")  # only where it is measured
        optimizer = fira.FiraAdamW([group], lr=LR, no_deprecation_warning=True)
    else:
        optimizer = ds_fira.FiraAdam([group | settings | {"update_proj_gap": gap}], lr=LR)
    turn = 0

    def step() -> float:
        nonlocal turn
        for param, grad in zip(params, grads[turn % len(grads)], strict=True):
            param.grad = grad.clone()
        turn += 1
        began = time.thread_time()
        optimizer.step()
        return time.thread_time() - began

    return step


def measure(size: Size) -> dict[str, dict[str, float]]:
    """By kind: median milliseconds of a step without and of one with refreshes, and of a step over the kind's gap."""
    every: dict[str, dict[str, Any] | None] = {**kinds(size), PEER: None}
    plain = {name: stepper(size, settings, NEVER) for name, settings in every.items()}
    fresh = {name: stepper(size, settings, 1) for name, settings in every.items()}
    for step in (*plain.values(), *fresh.values()):
        step()  # the first one makes states and bases
    steps: dict[str, list[float]] = {name: [] for name in every}
    refreshes: dict[str, list[float]] = {name: [] for name in every}
    for turn in range(STEPS):
        for name in every:
            steps[name].append(plain[name]())
            if turn < REFRESHES:
                refreshes[name].append(fresh[name]())
    found = {}
    for name, settings in every.items():
        gap = (settings or {}).get("update_proj_gap", size.gap)
        step, refresh = (1e3 * statistics.median(times) for times in (steps[name], refreshes[name]))
        found[name] = {"gap": gap, "step": step, "refresh": refresh, "mean": step + (refresh - step) / gap}
    return found


def training_steps(size: Size) -> dict[str, list[float]]:
    """By kind: mean milliseconds of a training step, forward and backward in it, in each stretch of a gap."""
    text = data.load("reviews", size)
    runs = {name: beyond_recipe.changed(FIRA, **settings) for name, settings in kinds(size).items()}
    trainings = {name: Training(run, size, text, torch.device("cpu")) for name, run in runs.items()}
    batches = text.batches(FIRA.seed, size.batch)
    seconds = {name: [0.0] * WINDOWS for name in runs}
    for step in range(1 + WINDOWS * size.gap):
        for name, training in trainings.items():
            began = time.process_time()
            training.step(step, batches[step])
            if step:  # the first one has costs of its own
                seconds[name][(step - 1) // size.gap] += time.process_time() - began
    return {name: [1e3 * total / size.gap for total in totals] for name, totals in seconds.items()}


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean and standard error of the ratio of two kinds' times, window by window."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.fmean(found), statistics.stdev(found) / len(found) ** 0.5


def compute() -> dict[str, Any]:
    """Measure both sizes.

    Returns:
        `sizes`: by name of the size, its `shapes` and `kinds` as `measure` gives them; `training`: as `training_steps`
        of the CPU size; `stamp`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes = {name: {"shapes": shapes(SIZES[name]), "kinds": measure(SIZES[name])} for name in ("cpu", "gpu")}
        return {"sizes": sizes, "training": training_steps(SIZES["cpu"]), "stamp": stamp()}
    finally:
        torch.set_num_threads(threads)


def claims(results: dict[str, Any]) -> list[Claim]:
    """The goal: the recipe is not slower than released Fira."""
    share, error = ratio(results["training"][beyond_recipe.RECIPE], results["training"]["released Fira"])
    slower = WITHIN if abs(share - 1) <= 2 * error else HOLDS if share < 1 else FAILS
    text = "the recipe is not slower: a whole training step at this page's size"
    found = [Claim(text, "our goal", f"{share:.3f} ± {error:.3f} of the time", slower)]
    layer = results["sizes"]["gpu"]["kinds"]
    for name in ("released Fira", PEER):
        share = layer[beyond_recipe.RECIPE]["mean"] / layer[name]["mean"]
        text = f"the recipe is not slower: optimizer, matrices of LLaMA 60M, {name}"
        found.append(Claim(text, "our goal", f"{share:.2f} of the time", HOLDS if share <= 1 else FAILS))
    return found


def section(results: dict[str, Any], figures: Path) -> str:
    """Markdown of a table per size: ratios in the same run."""
    parts = [
        f"## {TITLE}\n",
        "The optimizer's work on the matrices of one layer, one thread; time over that of our released Fira (`svd`), "
        f"measured in turns. {PEER} is the code behind the paper.\n",
    ]
    titles = {"cpu": "The model of this page", "gpu": "LLaMA 60M, the paper's gap of 200"}
    for size, found in results["sizes"].items():
        first = found["kinds"]["released Fira"]
        rows = [
            (name, f"{one['gap']:g}", *(f"{one[key] / first[key]:.2f}" for key in ("step", "refresh", "mean")))
            for name, one in found["kinds"].items()
        ]
        head = ["", "gap", "step", "step with refresh", "mean over the gap"]
        parts += [f"{titles[size]}:\n", table(head, rows)]
    training = results["training"]
    shares = {name: ratio(times, training["released Fira"]) for name, times in training.items()}
    rows = [(name, f"{share:.3f} ± {error:.3f}") for name, (share, error) in shares.items()]
    parts += [
        "A whole training step of this page's model, forward and backward in it; mean and standard error over "
        f"{WINDOWS} stretches of a gap (a ratio within two standard errors of 1 is not told apart from it):\n",
        table(["", "time"], rows),
    ]
    parts.append(claims_table(claims(results)))
    return "\n".join([*parts, stamp_line(results["stamp"]) + "\n"])


if __name__ == "__main__":
    run_alone(NAME, compute, section)
