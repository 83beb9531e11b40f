"""The section of the fine-tuning experiment: table, plot and what the figures allow to say."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: a training machine has no screen
import matplotlib.pyplot as plt

from examples.finetuning.tuning import METHODS
from examples.reproduction.table_3_memory import PUBLISHED, memory_table

PLOT = "finetune_loss.png"
TWO_SIDED = 1.96  # standard errors of a 95% interval


def runs_of(results: dict[str, Any], name: str, method: str, lr: float) -> list[dict[str, Any]]:
    """The runs of a set, a method and a learning rate, by seed."""
    found = [one for one in results["runs"] if (one["set"], one["method"], one["lr"]) == (name, method, lr)]
    return sorted(found, key=lambda one: one["seed"])


def accuracy(runs: list[dict[str, Any]]) -> str:
    """Mean test accuracy in per cent, with the standard deviation over seeds."""
    values = [100 * one["test"] for one in runs]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def paired_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, float]:
    """Difference of two methods' test accuracies and half the width of its 95% interval, in points.

    The mean over seeds and questions. Two sources of chance are added: which questions were drawn (both methods answer
    the same ones) and the seeds.
    """
    length = len(ours[0]["correct"])
    shares = [
        [statistics.fmean(int(one["correct"][place]) for one in runs) for place in range(length)]
        for runs in (ours, theirs)
    ]
    differences = [mine - other for mine, other in zip(*shares, strict=True)]
    variance = statistics.variance(differences) / length
    for runs in (ours, theirs):
        if len(runs) > 1:
            variance += statistics.variance([one["test"] for one in runs]) / len(runs)
    return 100 * statistics.fmean(differences), 100 * TWO_SIDED * math.sqrt(variance)


def comparisons(results: dict[str, Any], ours: str = "fira") -> list[dict[str, Any]]:
    """Fira against every other method in every set, each at its chosen rate."""
    found = []
    for name, rates in results["chosen"].items():
        own = runs_of(results, name, ours, rates[ours])
        for method, rate in rates.items():
            if method != ours:
                difference, margin = paired_difference(own, runs_of(results, name, method, rate))
                found.append({"set": name, "method": method, "difference": difference, "margin": margin})
    return found


def verdict(results: dict[str, Any]) -> list[str]:
    """One sentence for every method that Fira is compared with, and one on what the sets tell apart."""
    found, sets = comparisons(results), results["sets"]
    lines = []
    for method in METHODS:
        rows = [row for row in found if row["method"] == method]
        if not rows:
            continue
        above = sum(row["difference"] > row["margin"] for row in rows)
        below = sum(row["difference"] < -row["margin"] for row in rows)
        figures = ", ".join(
            f"{sets[row['set']]['title']} {row['difference']:+.1f} ± {row['margin']:.1f} points" for row in rows
        )
        lines.append(
            f"Fira against {METHODS[method].title}: above in {above}, below in {below} of {len(rows)} sets, beyond the "
            f"95% interval ({figures})."
        )
    apart = sum(abs(row["difference"]) > row["margin"] for row in found)
    lines.append(
        f"{apart} of {len(found)} comparisons differ by more than questions and seeds explain"
        + (": the sets tell the methods apart." if apart > len(found) / 2 else ": the sets tell few methods apart.")
    )
    return lines


def table(results: dict[str, Any]) -> str:
    """Accuracy by method and set, at the paper's rate and at the chosen one, with the memory of the states."""
    sets, recipe_lr = results["sets"], results["scale"]["rates"][0]
    header = ["method"]
    for entry in sets.values():
        header += [f"{entry['title']}, lr {recipe_lr:g}", "chosen lr", "lr"]
    header += ["trained, MB", "states, MB", "by formula", "paper: GB, accuracy"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    chance = [cell for entry in sets.values() for cell in (f"{100 * entry['chance']:.1f}", "", "")]
    lines.append("| " + " | ".join(["the commonest answer", *chance, "", "", "", ""]) + " |")
    before = [cell for name in sets for cell in (accuracy(runs_of(results, name, "before", 0.0)), "", "")]
    lines.append("| " + " | ".join(["before fine-tuning", *before, "", "", "", ""]) + " |")
    for method, entry in METHODS.items():
        cells, last = [entry.title], {}
        for name in sets:
            chosen = results["chosen"][name][method]
            runs = runs_of(results, name, method, chosen)
            last = runs[0]
            cells += [accuracy(runs_of(results, name, method, recipe_lr)), accuracy(runs), f"{chosen:g}"]
        cells += [f"{last[key] / 1e6:.2f}" for key in ("trained_bytes", "state_bytes", "state_formula_bytes")]
        paper = PUBLISHED.get(entry.paper or "")
        cells.append(f"{paper[0]:.2f}, {paper[1]:.1f}" if paper else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, Any], figures: Path) -> None:
    """Training loss of every method at its chosen rate, the mean over seeds."""
    sets = results["sets"]
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets), 3.6), squeeze=False)
    for axis, (name, entry) in zip(axes[0], sets.items(), strict=True):
        for method, described in METHODS.items():
            runs = runs_of(results, name, method, results["chosen"][name][method])
            curve = [statistics.fmean(values) for values in zip(*(one["losses"] for one in runs), strict=True)]
            steps = [(place + 1) * runs[0]["steps"] / len(curve) for place in range(len(curve))]
            axis.plot(steps, curve, label=described.title)
        axis.set(title=entry["title"], xlabel="step", ylabel="loss, nats per token", yscale="log")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figures.mkdir(parents=True, exist_ok=True)
    figure.savefig(figures / PLOT, dpi=110)
    plt.close(figure)


def section(results: dict[str, Any], figures: Path) -> str:
    """The section in Markdown; its plot goes to `figures`."""
    plot(results, figures)
    scale, recipe, model = results["scale"], results["scale"]["recipe"], results["model"]
    steps = max(one.get("steps", 0) for one in results["runs"])
    known = f" of {model['parameters'] / 1e6:.1f} M parameters" if "parameters" in model else ""
    loss = f" (validation loss {model['val_loss']:.2f} nats per token)" if "val_loss" in model else ""
    text = [
        f"The quickstart's LLaMA{known}{loss}, {scale['train']} training questions of a set, {recipe['epochs']} epochs "
        f"in batches of {recipe['batch_size']}: {steps} steps. {scale['test']} test questions, {results['seeds']} "
        f"seeds, on a CPU. Table 6 otherwise: rank {recipe['rank']}, LoRA's alpha {recipe['lora_alpha']:g}, dropout "
        f"{recipe['dropout']:g}, the projections {', '.join(recipe['target_modules'])}, linear schedule; warm-up of "
        f"{recipe['warmup_steps']} steps and a gap of {recipe['update_proj_gap']}, for so short a run. Accuracy in per "
        "cent: mean ± standard deviation over seeds (their number), of the response with the largest log-likelihood, "
        "summed over its tokens and not normalised by their number. The chosen lr is the best of "
        f"{', '.join(f'{rate:g}' for rate in scale['rates'])} on {scale['validation']} validation questions with seed "
        "0. States in float32. The last column is the paper's Table 3: LLaMA-7B, average of eight tasks.",
        table(results),
        "\n".join(f"- {line}" for line in verdict(results)),
        f"![Training loss](reproduction/{PLOT})",
        "What gives the memory column of Table 3:",
        memory_table(results["memory"]),
    ]
    return "\n\n".join(text)
