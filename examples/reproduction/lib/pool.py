"""Runs are trained once, several at a time, each in one thread; files of JSON lines keep their results."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.reproduction.lib import data
from examples.reproduction.lib.alone import RESULTS
from examples.reproduction.lib.spec import Run, Size


@dataclasses.dataclass
class Results:
    """What has been trained at a size, on disk and in memory.

    Attributes:
        size: of the runs.
        folder: holds `runs_<size>/`, files of JSON lines, one result of `train.train` per line.
    """

    size: Size
    folder: Path = RESULTS
    found: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in sorted((self.folder / f"runs_{self.size.name}").glob("*.jsonl")):
            for line in file.read_text().splitlines():
                result = json.loads(line)
                self.found[result["key"]] = result

    def path(self, key: str) -> Path:
        """The file of a run: one of 16 by its key, so that none grows large."""
        return self.folder / f"runs_{self.size.name}" / f"{key[0]}.jsonl"

    def __contains__(self, run: Run) -> bool:
        return run.key(self.size) in self.found

    def __getitem__(self, run: Run) -> dict[str, Any]:
        return self.found[run.key(self.size)]

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result, on disk first."""
        path = self.path(result["key"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        self.found[result["key"]] = result

    def train(self, runs: Iterable[Run], workers: int | None = None) -> None:
        """Train the runs that are not there yet.

        Args:
            runs: in the order of their importance.
            workers: processes, each of one thread; None for one per processor, on a GPU one.

        Raises:
            RuntimeError: a run failed; those that did not are kept.
        """
        missing = list({run.key(self.size): run for run in runs if run not in self}.values())
        if not missing:
            return
        for text in {run.text for run in missing}:
            data.folder_of(text, self.size)  # once, before the workers ask for it
        if workers is None:
            workers = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
        each_in_a_process(work, [(run, self.size) for run in missing], self.add, workers, " runs")


def each_in_a_process(
    work: Callable[..., dict[str, Any]],
    jobs: Sequence[tuple[Any, ...]],
    keep: Callable[[dict[str, Any]], None],
    workers: int,
    unit: str,
) -> None:
    """Do jobs in processes, and keep each result as it comes.

    Args:
        work: a function of a module, called with the parts of a job.
        jobs: in the order of their importance.
        keep: takes a result.
        workers: processes.
        unit: of the progress bar.

    Raises:
        RuntimeError: a job failed; the results of those that did not are kept.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool,
        tqdm(total=len(jobs), desc="training", unit=unit) as bar,
    ):
        waiting = {pool.submit(work, *job): job for job in jobs}
        for future in concurrent.futures.as_completed(waiting):
            try:
                keep(future.result())
            except Exception as error:
                pool.shutdown(wait=False, cancel_futures=True)
                raise RuntimeError(f"{waiting[future][0]} failed: {error}") from error
            bar.update()


def work(run: Run, size: Size) -> dict[str, Any]:
    """One run in a worker."""
    from examples.reproduction.lib.train import train  # imports peft and deepspeed, which the parent need not wait for

    return train(run, size)
