"""A page of plots of one run or several, from their csv files: `ds-fira report RUN_FOLDER [-o page.html]`.

One HTML file with the plots inside, which opens anywhere. `docs/monitoring.md` says what the figures are.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ds_fira.tools.commands import Answer, add
from ds_fira.tools.run_report import drawing, facts
from ds_fira.tools.run_report.run_csv import Run, read_runs, shown, shown_whole

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name("page.html.jinja")
# Okabe and Ito's, told apart by colour-blind eyes too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def write_page(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of plots of the runs in some folders, overlaid where there are several, and return its path.

    Args:
        folders: of runs, with DeepSpeed's `csv_monitor` files in or below them, the example's `history.csv`, or both.
        output: the HTML file; `report.html` in the first folder where it is None.

    Raises:
        ValueError: a folder holds no run with values, or matplotlib or jinja2 is missing; one sentence.
    """
    found = [(run, folder) for folder in folders for run in read_runs(folder)]
    runs = [run for run, _ in found]
    distinct(runs, [folder for _, folder in found])
    # Samples compare runs of different batch sizes; a history alone knows only steps.
    if not all(run.in_samples for run in runs):
        runs = [run.in_steps() for run in runs]
    for i, run in enumerate(runs):
        run.color = COLORS[i % len(COLORS)]
    try:
        import jinja2

        template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True)
        page = template.render(
            runs=runs,
            facts=facts.rows(runs),
            records=[(run, json.dumps(run.starts[-1]["config"], indent=2)) for run in runs if run.starts],
            setting=functools.partial(facts.setting, runs),
            growth=facts.growth(runs),
            smoothed=lambda name: any(drawing.window(run, name) for run in runs),
            draw=functools.partial(drawing.draw, runs),
            mean=np.mean,
        )
    except ImportError as error:
        name = str(error.name).partition(".")[0]
        raise ValueError(f"{name} is missing, which makes the page; pip install matplotlib jinja2.") from error
    output = folders[0] / PAGE if output is None else output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8", errors="replace")
    return output


def distinct(runs: Sequence[Run], folders: Sequence[Path]) -> None:
    """Give runs of one name the folders that they were asked for by, and a number where these are the same too.

    Args:
        runs: whose labels change.
        folders: of each run, the one that was given.
    """
    labels = [run.label for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if labels.count(run.label) > 1:
            run.label = shown_whole(folder if run.label == shown(folder.resolve()) else folder / run.label)
    seen: Counter[str] = Counter()
    for run in runs:
        seen[run.label] += 1
        run.label += f" ({seen[run.label]})" if seen[run.label] > 1 else ""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to argparse's `commands`."""
    texts = {"help": "a page of plots of a run, from its csv files", "description": __doc__}
    parser = add(commands, "report", lambda args: Answer(str(write_page(args.runs, args.output))), **texts)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="output folder of a run")
    parser.add_argument("-o", "--output", type=Path, help=f"the page (default: {PAGE} in the first folder)")
