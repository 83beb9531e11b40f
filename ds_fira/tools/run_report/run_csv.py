"""Reads back what a run has written: the csv files of DeepSpeed's `csv_monitor`, the settings beside them,
and the example's `history.csv`.
"""

from __future__ import annotations

import csv
import os
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from ds_fira.observe.run_record import Start, read_starts

HISTORY, SPLITS = "history.csv", {("train",): "train_loss", ("validation",): "validation_loss"}
# What DeepSpeed makes of "Train/Samples/lr" and of "Train/Fira/residual_norm".
EVENT_FILE = re.compile(r"Train_(?:Samples|Fira)_(.+)\.csv")
# DeepSpeed writes into RUN/output_path/job_name; one level to spare.
PATTERNS = ("*.csv", "*/*.csv", "*/*/*.csv")


@dataclass(slots=True)
class Series:
    """Values `y`, in the order of training, at ascending `x`."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """Append a value; a run that was resumed from an earlier step replaces what it makes again."""
        while self.x and self.x[-1] >= x:
            del self.x[-1], self.y[-1]
        self.x.append(x)
        self.y.append(y)

    def moved(self, factor: float) -> Series:
        """The same values with every x multiplied."""
        return Series([x * factor for x in self.x], self.y)


@dataclass(slots=True)
class Run:
    """Series by name (`lr`, `train_loss`, `grad_norm`, ...) of one run, over samples or over optimizer steps."""

    label: str
    series: dict[str, Series]
    in_samples: bool
    starts: list[Start] = field(default_factory=list)
    color: str = "black"

    def samples_per_step(self) -> float:
        """Samples in an optimizer step, from the learning rate, which DeepSpeed writes at every step.

        Raises:
            ValueError: there is none, or its values do not go up; one sentence.
        """
        if "lr" not in self.series and self.starts:
            return float(self.starts[-1]["samples_per_step"])
        if "lr" not in self.series:
            raise ValueError(
                f"{self.label} has no Train_Samples_lr.csv with values, which tells how many samples a step has; give "
                "the folder as DeepSpeed wrote it."
            )
        found = statistics.median_low(after - before for before, after in pairwise([0.0, *self.series["lr"].x]))
        if not found > 0.0:
            raise ValueError(f"{self.label} has steps of {found:g} samples in Train_Samples_lr.csv; remove that file.")
        return found

    def in_steps(self) -> Run:
        """The same run with x in optimizer steps; raises `ValueError` as `samples_per_step`."""
        factor = 1 / self.samples_per_step() if self.in_samples and self.series else 1
        return replace(self, series={name: one.moved(factor) for name, one in self.series.items()}, in_samples=False)


def read_runs(folder: Path) -> list[Run]:
    """The runs in a folder: one for each folder of csv files in it, or one for a `history.csv` alone.

    Raises:
        ValueError: it is no folder, holds no run or none with values yet, or a file in it cannot be read; one sentence.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that a run has written its csv files to.")
    found: dict[Path, dict[str, Series]] = {}
    for path in sorted(path for pattern in PATTERNS for path in folder.glob(pattern)):
        if event := EVENT_FILE.fullmatch(path.name):
            found.setdefault(path.parent, {}).update(_read(path, {(): event[1]}))
    runs = [
        Run(shown(folder.resolve() if len(found) == 1 or at == folder else at.relative_to(folder)), series, True)
        for at, series in found.items()
    ]
    for run, at in zip(runs, found, strict=True):
        run.starts = read_starts(at)
    history = _read(folder / HISTORY, SPLITS) if (folder / HISTORY).is_file() else {}
    if not runs and not (folder / HISTORY).is_file():
        raise ValueError(
            f"{folder} holds no csv files of a run; give the output folder of one that had csv_monitor enabled in its "
            f"DeepSpeed config, or of the pre-training example ({HISTORY})."
        )
    if not history and not any(run.series for run in runs):
        raise ValueError(
            f"{folder} holds csv files of a run that has written no values yet; ask again when it has made the first "
            "steps_per_print steps."
        )
    if not runs or (len(runs) == 1 and not runs[0].series):
        starts = runs[0].starts if runs else []
        return [Run(shown(folder.resolve()), history, in_samples=False, starts=starts)]
    # Its training loss is in the csv files already, over the same steps or finer.
    for event in history.keys() - runs[0].series if len(runs) == 1 else ():
        runs[0].series[event] = history[event].moved(runs[0].samples_per_step())
    return runs


def shown(path: Path) -> str:
    """The name of a run: the last part of its folder's absolute path, all of a relative one; any bytes may be in it."""
    return shown_whole(Path(path.name or path) if path.is_absolute() else path)


def shown_whole(path: Path) -> str:
    """A path as text that can be written, with a sign in the place of bytes that are none."""
    return os.fsencode(path).decode(errors="replace")


def _read(path: Path, names: Mapping[tuple[str, ...], str]) -> dict[str, Series]:
    """The series of a file with columns step, value, and between them those that `names` tells series apart by."""
    found: dict[str, Series] = {}
    try:
        for number, row in enumerate(csv.reader(path.read_text().splitlines()), 1):
            # DeepSpeed writes the header again when a run is resumed.
            if row and row[0] != "step":
                try:
                    step, *split, value = row
                    found.setdefault(names[tuple(split)], Series()).add(float(step), float(value))
                except (ValueError, KeyError) as error:
                    raise ValueError(f"line {number} is {','.join(row)!r}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a csv file of a run: {error}.") from error
    return found
