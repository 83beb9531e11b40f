"""A page of plots of one run or several, from their csv files: `python -m ds_fira report RUN_FOLDER [-o page.html]`.

One HTML file with the plots inside, which opens anywhere. `docs/monitoring.md` says what the figures are.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_fira.tools.run_report.page import render
from ds_fira.tools.run_report.panels import PANELS, Panel
from ds_fira.tools.run_report.run_csv import Run, Series, read_runs

PAGE = "report.html"
# Okabe and Ito's, told apart by colour-blind eyes too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# More marks than this say nothing: the matrices refresh at every step or nearly (`stagger`).
MAX_MARKS = 60
SMOOTHED_FROM = 100


def write_page(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of plots of the runs in some folders, overlaid where there are several.

    Args:
        folders: output folders of runs: with the files of DeepSpeed's `csv_monitor` in or below them, with the
            example's `history.csv`, or with both.
        output: the HTML file; `report.html` in the first folder where it is None.

    Returns:
        The file.

    Raises:
        ValueError: a folder holds no run, or matplotlib is missing; one sentence.
    """
    runs = [run for folder in folders for run in read_runs(folder)]
    # Samples compare runs of different batch sizes; a history alone knows only steps.
    if not all(run.in_samples for run in runs):
        runs = [run.in_steps() for run in runs]
    across = "samples" if runs[0].in_samples else "optimizer steps"
    colors = [COLORS[i % len(COLORS)] for i in range(len(runs))]
    drawn = [
        (panel.title, _draw(panel, runs, colors, across), panel.text)
        for panel in PANELS
        if any(name in run.series for run in runs for name in panel.events)
    ]
    rows = [(run.label, color, _figures(run)) for run, color in zip(runs, colors, strict=True)]
    output = folders[0] / PAGE if output is None else output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(rows, drawn), encoding="utf-8")
    return output


def _draw(panel: Panel, runs: Sequence[Run], colors: Sequence[str], across: str) -> str:
    """One plot as SVG."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise ValueError("matplotlib is missing, which draws the plots; pip install matplotlib.") from error
    with rc_context({"svg.hashsalt": panel.title, "font.size": 10.5, "axes.edgecolor": "#8a8f98"}):
        figure = Figure(figsize=(6.6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for run, color in zip(runs, colors, strict=True):
            _draw_run(axes, panel, run, color)
        if len(runs) > 1:
            lines = [axes.plot([], [], color=color, linewidth=3)[0] for color in colors]
            labels = [run.label for run in runs]
            figure.legend(lines, labels, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(across)
        axes.set_ylabel(panel.unit)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if panel.log:
            _make_logarithmic(axes)
        elif panel.zero:
            axes.set_ylim(bottom=0.0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _make_logarithmic(axes: Any) -> None:
    """A logarithmic y axis with plain numbers; a linear one where values differ by little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    drawn = [y for line in axes.lines for y in line.get_ydata() if 0.0 < y < math.inf]
    spread = max(drawn) / min(drawn) if drawn else 1.0
    if spread < 1.5:
        return
    axes.set_yscale("log")
    steps = (1.0,) if spread > 1e4 else (1.0, 2.0, 5.0) if spread > 6.0 else tuple(map(float, range(1, 10)))
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e5 else f"{value:.0e}"))


def _draw_run(axes: Any, panel: Panel, run: Run, color: str) -> None:
    refreshed = {x for x, count in _pairs(run.series.get("refreshes")) if count > 0}
    for name in panel.events:
        points = [(x, panel.value(y)) for x, y in _pairs(run.series.get(name))]
        if panel.stems and len(refreshed) <= MAX_MARKS:
            points = [(x, y) for x, y in points if x in refreshed]
            axes.vlines([x for x, _ in points], 0.0, [y for _, y in points], color=color, alpha=0.5, linewidth=1.2)
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        if name == "validation_loss" or (panel.stems and len(refreshed) <= MAX_MARKS):
            axes.plot(xs, ys, "o", color=color, markersize=5, markeredgecolor="white", markeredgewidth=0.8, zorder=3)
        elif not panel.smooth or len(points) < SMOOTHED_FROM:
            axes.plot(xs, ys, color=color, linewidth=1.6)
        else:
            axes.plot(xs, ys, color=color, alpha=0.3, linewidth=0.9)
            axes.plot(xs, _running_mean(ys, len(ys) // 50), color=color, linewidth=1.6)
    if panel.marks and len(refreshed) <= MAX_MARKS:
        bottom = axes.get_xaxis_transform()
        axes.plot(sorted(refreshed), [0.03] * len(refreshed), "^", color=color, markersize=4.5, transform=bottom)


def _pairs(series: Series | None) -> list[tuple[float, float]]:
    return [] if series is None else list(zip(series.x, series.y, strict=True))


def _running_mean(values: Sequence[float], half: int) -> list[float]:
    """Of each value and as many on both sides as there are, at most `half`."""
    found = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        found.append(sum(window) / len(window))
    return found


def _figures(run: Run) -> dict[str, str]:
    """One line of the table above the plots: what a run came to."""
    found = {}
    for title, name in (("training loss, last", "train_loss"), ("validation loss, last", "validation_loss")):
        if name in run.series:
            found[title] = f"{run.series[name].y[-1]:.3f}"
    for title, name in (("captured energy, mean", "captured_energy"), ("limiter, mean", "limiter_share")):
        if name in run.series:
            found[title] = f"{100 * sum(run.series[name].y) / len(run.series[name].y):.1f} %"
    if "residual_norm" in run.series:
        found["residual norm, last"] = f"{run.series['residual_norm'].y[-1]:.3g}"
    if "refresh_seconds" in run.series:
        found["refreshes"] = f"{sum(run.series['refreshes'].y):,.0f}" if "refreshes" in run.series else ""
        found["refresh time"] = f"{sum(run.series['refresh_seconds'].y):,.1f} s"
    return found


def register(commands: Any) -> None:
    """Add the sub-command to argparse's `commands`."""
    parser = commands.add_parser("report", help="a page of plots of a run, from its csv files", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="output folder of a run; several overlay"
    )
    parser.add_argument("-o", "--output", type=Path, help=f"the page (default: {PAGE} in the first folder)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the page that parsed arguments ask for and print where it is.

    Raises:
        ValueError: as `write_page`.
    """
    print(write_page(args.runs, args.output))
