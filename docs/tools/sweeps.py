"""The plots of docs/choosing.md, from the tables of docs/transfer.md and docs/reproduction.md.

python docs/tools/sweeps.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: a machine that writes pages has no screen
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "sweeps"
PANELS = {
    "width 128, 2 layers, rank 32, 600 steps": "width 128, 2 layers, rank 32",
    "width 128, 2 layers, rank 4, 600 steps": "width 128, 2 layers, rank 4",
    "width 256, 4 layers, rank 64, 600 steps": "width 256, 4 layers, rank 64",
    "width 256, 4 layers, rank 8, 600 steps": "width 256, 4 layers, rank 8",
}
PRESET, FIRA = "preset", "released Fira"
COLOURS = {PRESET: "tab:green", FIRA: "tab:blue"}


def rows_below(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of a page, without its head."""
    text = (DOCS / page).read_text().partition(f"{heading}\n")[2]
    table = re.search(r"^\|.*?(?=^[^|]|\Z)", text, re.MULTILINE | re.DOTALL)
    if table is None:
        raise ValueError(f"docs/{page} has no table below {heading!r}; name the heading that is there.")
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[0].strip().splitlines()[2:]]


def rates() -> dict[str, dict[str, dict[float, float]]]:
    """Test perplexity by learning rate, for each model of `PANELS` and each of its two curves."""
    found: dict[str, dict[str, dict[float, float]]] = {model: {} for model in PANELS}
    for method, model, by_rate, *_ in rows_below("transfer.md", "## Every rate"):
        # Of the normalized residuals only the preset's were trained at more rates than one.
        name = FIRA if method == "fira" else PRESET if method.startswith("normalized") else None
        if model in found and name is not None:
            pairs = (pair.split(": ") for pair in by_rate.split("; "))
            found[model][name] = {float(rate): float(perplexity) for rate, perplexity in pairs}
    return found


def spread(heading: str) -> list[tuple[float, float, float]]:
    """Setting, mean and standard deviation over seeds of a table of docs/reproduction.md."""
    found = []
    for setting, perplexity, *_ in rows_below("reproduction.md", heading):
        number = re.match(r"[\d.]+", setting)
        mean, deviation = re.findall(r"[\d.]+", perplexity)[:2]
        if number is not None:
            found.append((float(number[0]), float(mean), float(deviation)))
    return sorted(found)


def draw_rates(path: Path) -> None:
    """Four models: how far a rate may be from the best one, with and without the preset."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), sharex=True, sharey=True, layout="constrained")
    for panel, (model, curves) in zip(axes.flat, rates().items(), strict=True):
        for name, curve in curves.items():
            panel.plot(list(curve), list(curve.values()), "o-", color=COLOURS[name], label=name)
        panel.set(title=PANELS[model], xscale="log")
        panel.axvline(0.01, color="tab:gray", linestyle=":", linewidth=1)
        panel.set_xticks([0.0025, 0.005, 0.01, 0.02, 0.04], ["0.0025", "0.005", "0.01", "0.02", "0.04"])
        panel.minorticks_off()
    for panel in axes[1]:
        panel.set_xlabel("learning rate")
    for panel in axes[:, 0]:
        panel.set_ylabel("test perplexity")
    axes[0, 0].legend()
    _save(figure, path)


def draw_settings(path: Path) -> None:
    """Gap and gamma: the mean of three seeds and their standard deviation."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for panel, heading, label in zip(
        axes,
        ("### The gap, of 300 steps", "### The limiter's gamma"),
        ("update_proj_gap, of 300 steps", "gamma - 1"),
        strict=True,
    ):
        points = spread(heading)
        places = [setting - (label != "update_proj_gap, of 300 steps") for setting, *_ in points]
        panel.errorbar(
            places,
            [mean for _, mean, _ in points],
            [deviation for *_, deviation in points],
            fmt="o-",
            capsize=4,
            color=COLOURS[FIRA],
        )
        panel.set(xscale="log", xlabel=label)
    axes[0].set_ylabel("validation perplexity")
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    # The same bytes for the same tables, so that a page drawn again is no change.
    with plt.rc_context({"svg.hashsalt": "ds_fira"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> None:
    """Draw both plots."""
    FOLDER.mkdir(exist_ok=True)
    draw_rates(FOLDER / "rates.svg")
    draw_settings(FOLDER / "gap_gamma.svg")


if __name__ == "__main__":
    main()
