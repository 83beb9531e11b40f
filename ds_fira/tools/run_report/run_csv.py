"""Reads back what a run has written: the csv files of DeepSpeed's `csv_monitor`, and the example's `history.csv`."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

HISTORY = "history.csv"
# What DeepSpeed makes of "Train/Samples/lr" and of "Train/Fira/residual_norm".
PREFIXES = ("Train_Samples_", "Train_Fira_")
# Folders below the one that is given in which csv files are looked for: RUN/output_path/job_name, and one to spare.
DEPTH = 3


@dataclass(slots=True)
class Series:
    """Values in the order of training.

    Attributes:
        x: where they were taken; ascending.
        y: the values.
    """

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """Append a value; a run that was resumed from an earlier step replaces what it makes again."""
        while self.x and self.x[-1] >= x:
            self.x.pop()
            self.y.pop()
        self.x.append(x)
        self.y.append(y)

    def moved(self, factor: float) -> Series:
        """The same values with every x multiplied."""
        return Series([x * factor for x in self.x], self.y)


@dataclass(slots=True)
class Run:
    """What is known of one run.

    Attributes:
        label: tells it from others.
        series: by name: `train_loss`, `lr`, `loss_scale`, the events of `ds_fira.engine.deepspeed.monitor`,
        `validation_loss`. in_samples: whether x counts samples; else optimizer steps.
    """

    label: str
    series: dict[str, Series]
    in_samples: bool

    def in_steps(self) -> Run:
        """The same run with x in optimizer steps.

        Raises:
            ValueError: how many samples a step has cannot be told.
        """
        if not self.in_samples:
            return self
        per_step = samples_per_step(self.series, self.label)
        return Run(self.label, {name: one.moved(1 / per_step) for name, one in self.series.items()}, False)


def read_runs(folder: Path) -> list[Run]:
    """The runs in a folder: one for each folder of csv files in it, or one for a `history.csv` alone.

    Raises:
        ValueError: it is no folder, holds no run, or a file in it cannot be read; one sentence.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that a run has written its csv files to.")
    found = sorted({path.parent for path in _files(folder, DEPTH) if _event_of(path) is not None})
    history = _read_history(folder / HISTORY) if (folder / HISTORY).is_file() else {}
    runs = []
    for place in found:
        label = folder.resolve().name if len(found) == 1 else str(place.relative_to(folder))
        series = {_event_of(path): _read_events(path) for path in sorted(place.iterdir()) if _event_of(path)}
        runs.append(Run(label, series, in_samples=True))
    if history and len(runs) == 1:
        # Its training loss is in the csv files already, over the same steps or finer.
        extra = {name: one for name, one in history.items() if name not in runs[0].series}
        per_step = samples_per_step(runs[0].series, runs[0].label) if extra else 1.0
        runs[0].series |= {name: one.moved(per_step) for name, one in extra.items()}
    elif history and not runs:
        runs.append(Run(folder.resolve().name, history, in_samples=False))
    if not runs:
        raise ValueError(
            f"{folder} holds no csv files of a run; give the output folder of one that had csv_monitor enabled in its "
            f"DeepSpeed config, or of the pre-training example ({HISTORY})."
        )
    return runs


def samples_per_step(series: dict[str, Series], label: str) -> float:
    """Samples in an optimizer step, from the learning rate, which DeepSpeed writes at every step.

    Raises:
        ValueError: there is no learning rate.
    """
    if "lr" not in series or not series["lr"].x:
        raise ValueError(
            f"{label} has no Train_Samples_lr.csv, which tells how many samples a step has; give the folder as "
            "DeepSpeed wrote it."
        )
    steps = series["lr"].x
    return statistics.median(after - before for before, after in pairwise(steps)) if len(steps) > 1 else steps[0]


def _files(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path
        elif path.is_dir() and depth > 1:
            yield from _files(path, depth - 1)


def _event_of(path: Path) -> str | None:
    """The name of the series in a file, None for a file of another kind."""
    prefix = next((prefix for prefix in PREFIXES if path.name.startswith(prefix)), None)
    return path.stem.removeprefix(prefix) if prefix is not None and path.suffix == ".csv" else None


def _read_events(path: Path) -> Series:
    series = Series()

    def add(row: list[str]) -> None:
        if row[0] != "step":  # DeepSpeed writes the header again when a run is resumed
            x, y = row
            series.add(float(x), float(y))

    _each_row(path, add)
    return series


def _read_history(path: Path) -> dict[str, Series]:
    """Losses by optimizer step; columns step, split, loss."""
    found = {"train_loss": Series(), "validation_loss": Series()}

    def add(row: list[str]) -> None:
        if row != ["step", "split", "loss"]:
            step, split, loss = row
            found["train_loss" if split == "train" else "validation_loss"].add(float(step), float(loss))

    _each_row(path, add)
    return {name: series for name, series in found.items() if series.x}


def _each_row(path: Path, add: Callable[[list[str]], None]) -> None:
    try:
        with path.open(newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if row:
                    try:
                        add(row)
                    except ValueError as error:
                        raise ValueError(f"line {number} is {','.join(row)!r}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a csv file of a run: {error}.") from error
