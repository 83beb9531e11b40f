"""A page of plots of one run or several, from their csv files: `ds-fira report RUN_FOLDER [-o page.html]`.

One HTML file with the plots inside, which opens anywhere. `docs/monitoring.md` says what the figures are.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ds_fira.tools.commands import Answer, add
from ds_fira.tools.run_report.run_csv import Run, read_runs

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name("page.html.jinja")
# Okabe and Ito's, told apart by colour-blind eyes too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# More refreshes than this are not marked: the matrices refresh at every step or nearly (`stagger`).
MAX_MARKS = 60
# Of so many values and more of these series, a running mean is drawn over them; what jumps at a refresh has none.
SMOOTHED_FROM, NOISY = 100, ("train_loss", "grad_norm")


def write_page(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of plots of the runs in some folders, overlaid where there are several, and return its path.

    Args:
        folders: of runs, with DeepSpeed's `csv_monitor` files in or below them, the example's `history.csv`, or both.
        output: the HTML file; `report.html` in the first folder where it is None.

    Raises:
        ValueError: a folder holds no run, or matplotlib or jinja2 is missing; one sentence.
    """
    runs = [run for folder in folders for run in read_runs(folder)]
    # Samples compare runs of different batch sizes; a history alone knows only steps.
    if not all(run.in_samples for run in runs):
        runs = [run.in_steps() for run in runs]
    for i, run in enumerate(runs):
        run.color = COLORS[i % len(COLORS)]
    try:
        import jinja2

        template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True)
        page = template.render(runs=runs, draw=functools.partial(_draw, runs), mean=np.mean)
    except ImportError as error:
        name = str(error.name).partition(".")[0]
        raise ValueError(f"{name} is missing, which makes the page; pip install matplotlib jinja2.") from error
    output = folders[0] / PAGE if output is None else output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def _draw(
    runs: Sequence[Run], title: str, unit: str, events: Sequence[str], scale: str = "linear", exp: bool = False
) -> str | None:
    """One plot as SVG in base64; None where no run has data. Arguments as in the template, which calls it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not any(name in run.series for run in runs for name in events):
        return None
    with rc_context({"svg.hashsalt": title, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.6, 3.5), layout="constrained")
        axes = figure.add_subplot(xlabel="samples" if runs[0].in_samples else "optimizer steps", ylabel=unit)
        for run, name in [(run, name) for run in runs for name in events if name in run.series]:
            x, y = np.array(run.series[name].x), np.array(run.series[name].y)
            y = np.exp(np.minimum(y, 700.0)) if exp else y
            line = functools.partial(axes.plot, color=run.color)
            if name == "validation_loss" or (name == "refresh_seconds" and np.count_nonzero(y) <= MAX_MARKS):
                line(x[y > 0], y[y > 0], "o", markeredgecolor="white", zorder=3)
            elif name == "refreshes" and np.count_nonzero(y) <= MAX_MARKS:
                line(x[y > 0], 0.0 * y[y > 0], "^", clip_on=False)
            elif name != "refreshes":
                noisy = name in NOISY and len(x) >= SMOOTHED_FROM
                line(x, y, alpha=0.3 if noisy else 1.0)
                if noisy:
                    half = len(x) // 100
                    line(x[half:-half], np.convolve(y, np.ones(2 * half + 1) / (2 * half + 1), "valid"))
        if len(runs) > 1:
            keys = [axes.plot([], [], color=run.color, linewidth=3, label=run.label)[0] for run in runs]
            figure.legend(handles=keys, loc="outside upper right", ncols=4, frameon=False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_yscale("log" if scale == "log" else "linear")
        axes.set_ylim(bottom=0.0 if scale == "from 0" else None)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return base64.b64encode(file.getvalue()).decode()


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to argparse's `commands`."""
    texts = {"help": "a page of plots of a run, from its csv files", "description": __doc__}
    parser = add(commands, "report", lambda args: Answer(str(write_page(args.runs, args.output))), **texts)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="output folder of a run")
    parser.add_argument("-o", "--output", type=Path, help=f"the page (default: {PAGE} in the first folder)")
