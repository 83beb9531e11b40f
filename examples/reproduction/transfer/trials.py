"""What the study trains: a frozen record per training, known by its hash, and the file that keeps its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.reproduction.lib.alone import RESULTS
from examples.reproduction.lib.pool import each_in_a_process
from examples.reproduction.lib.spec import Size

FOLDER = RESULTS / "transfer"
VOCABULARY, SEQ_LENGTH, BATCH = 1024, 64, 16
# Half of them choose rates and methods, the other half is reported.
VALIDATION_ROWS = 1024
# Width -> layers and the width of the MLP. The head dimension is 32 throughout.
MODELS = {64: (2, 172), 128: (2, 344), 192: (3, 512), 256: (4, 688), 384: (4, 1032)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One training of a small LLaMA on one processor core.

    Attributes:
        method: a key of `examples.reproduction.transfer.prototypes.METHODS`.
        lr: the peak rate, the user's one number.
        width: of the model.
        layers: of the model; None for those that `MODELS` gives the width.
        rank: the share of the width that the subspace has; None for a method without one.
        settings: of the method, as sorted (name, value) pairs; `settings_of` makes them.
        steps: optimizer steps, of 16 rows of 64 tokens.
        seed: of the weights and of the order of the data.
        text: "reviews" or "python".
    """

    method: str
    lr: float
    width: int
    layers: int | None = None
    rank: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    steps: int = 600
    seed: int = 0
    text: str = "reviews"

    @property
    def key(self) -> str:
        """A hash of everything that decides the result."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def depth(self) -> int:
        """The layers of the model."""
        return self.layers or MODELS[self.width][0]

    @property
    def size(self) -> Size:
        """The record by which the text is prepared; the same text for every width."""
        rank = max(1, round((self.rank or 0.25) * self.width))
        return Size(
            name=f"w{self.width}",
            hidden=self.width,
            intermediate=MODELS[self.width][1],
            layers=self.depth,
            heads=self.width // 32,
            vocabulary=VOCABULARY,
            seq_length=SEQ_LENGTH,
            batch=BATCH,
            steps=self.steps,
            gap=50,
            rank=rank,
            low_rank=rank,
            dtype="float32",
            validation_rows=VALIDATION_ROWS,
        )

    def change(self, **fields: Any) -> Trial:
        """The same training but for some fields."""
        return dataclasses.replace(self, **fields)


def settings_of(**settings: Any) -> tuple[tuple[str, Any], ...]:
    """Settings as a trial keeps them."""
    return tuple(sorted(settings.items()))


class Trials:
    """What has been trained, on disk and in memory.

    Args:
        folder: holds files of JSON lines, one result of `train.train` per line.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self.found: dict[str, dict[str, Any]] = {}
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                result = json.loads(line)
                self.found[result["key"]] = result

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self.found

    def __getitem__(self, trial: Trial) -> dict[str, Any]:
        return self.found[trial.key]

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result, on disk first; one file of 16 by its key."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{result['key'][0]}.jsonl").open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        self.found[result["key"]] = result

    def missing(self, trials: Iterable[Trial]) -> list[Trial]:
        """Those without a result, each once and in their order."""
        return list({trial.key: trial for trial in trials if trial not in self}.values())

    def train(self, trials: Sequence[Trial], workers: int | None = None) -> None:
        """Train those without a result, each in a process of one thread; a trial cut short goes on where it was.

        Args:
            trials: in the order of their importance.
            workers: processes; None for one per processor.

        Raises:
            RuntimeError: a trial failed; those that did not are kept.
        """
        missing = self.missing(trials)
        if not missing:
            return
        os.environ["OMP_NUM_THREADS"] = "1"
        workers = workers or len(os.sched_getaffinity(0))
        each_in_a_process(work, [(trial,) for trial in missing], self.add, workers, " trials")


def work(trial: Trial) -> dict[str, Any]:
    """One trial in a worker."""
    from examples.reproduction.transfer.train import train  # imports transformers, which the parent need not wait for

    return train(trial)
