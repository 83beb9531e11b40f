"""The data of a training run: one object for text prepared as a whole and for streams, agreed upon by all processes.

Every error of the data ends in the same :class:`DataError` on every process, whichever of them met it: at the start and
before each optimizer step the processes tell each other whether they are well.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import datasets
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node

from .documents import DataError
from .loader import Loader
from .rows import PreparedRows, Rows, State, describe
from .streaming import LaneRecipe, StreamRows
from .text_data import TextData, TextRecipe, prepare, stream_splits
from .tokenization import Encoder, check_vocabulary

PREFETCH = 16  # micro-batches kept ready, or those of two steps where these are more
BLOCK_ROWS = 1024  # rows of a stream that are shuffled together
Result = TypeVar("Result")


class TrainingData:
    """What the training loop takes from the data.

    Attributes:
        tokenizer: of the text, to be saved beside the model.
        facts: for the summary.
        validation_rows: number of validation sequences, over all processes.
        waiting_seconds: time that this process has spent waiting for its training batches since `start`.
    """

    def __init__(self, text: TextData, rows: Rows, rank: int, world_size: int) -> None:
        """Use `open_data`, which agrees with the other processes."""
        self.tokenizer, self.facts = text.tokenizer, text.facts
        # The same number of rows on every process, so that none waits for another in a collective.
        equal = text.validation.take(len(text.validation) // world_size * world_size)
        self._validation = split_dataset_by_node(equal, rank, world_size)
        self.validation_rows = len(text.validation)
        self.waiting_seconds = 0.0
        self._rows, self._world_size = rows, world_size
        self._loader: Loader | None = None
        self._group: dist.ProcessGroup | None = None
        self._micro_steps = 0
        self._ready: list[tuple[torch.Tensor, State]] = []
        self._state = rows.state_dict()

    def start(self, batch_size: int, micro_steps: int) -> None:
        """Begin to make batches in the background, after `load_state_dict` if at all; a collective call.

        It returns when the batches of the first optimizer step are there on every process.

        Args:
            batch_size: sequences of a micro-batch, per process.
            micro_steps: micro-batches of an optimizer step.

        Raises:
            DataError: on every process, where one of them cannot make its batches.
        """
        self._rows.batch_size, self._micro_steps = batch_size, micro_steps
        if self._world_size > 1 and self._group is None:
            # Of the CPU: asking it costs the device nothing. NCCL has none.
            self._group = dist.new_group(backend="gloo")
        self._loader = Loader(self._rows, depth=max(PREFETCH, 2 * micro_steps))
        self._fetch()
        self.waiting_seconds = 0.0

    def batches(self) -> Iterator[torch.Tensor]:
        """Endless micro-batches of this process: int64 CPU tensors of shape (batch_size, seq_length).

        All processes take their batches in step: the first one of an optimizer step is a collective call.

        Raises:
            DataError: on every process, where one of them cannot make its batches of the next step.
        """
        if self._loader is None:
            raise RuntimeError("call start first")
        while True:
            if not self._ready:
                self._fetch()
            batch, self._state = self._ready.pop(0)
            yield batch

    def validation_batches(self, limit: int | None = None) -> Iterator[torch.Tensor]:
        """Validation batches of this process, equally many on all: int64 of shape (up to batch_size, seq_length).

        Args:
            limit: of their number; None for all.
        """
        batches = self._validation.iter(batch_size=self._rows.batch_size)
        for batch in batches if limit is None else islice(batches, limit):
            yield batch["input_ids"].long()

    def validation_length(self, limit: int | None = None) -> int:
        """Number of batches that `validation_batches` gives."""
        batches = -(-len(self._validation) // self._rows.batch_size)
        return batches if limit is None else min(batches, limit)

    def state_dict(self) -> State:
        """The state of all processes after the batch that each took last, in plain Python; a collective call."""
        states = [self._state] * self._world_size
        if self._world_size > 1:
            dist.all_gather_object(states, self._state)
        return self._rows.merge(states)

    def load_state_dict(self, state: State) -> None:
        """Go on where `state_dict` was called; before `start`.

        Raises:
            DataError: the state belongs to other data, seed or options.
        """
        self._rows.load(state, dist.get_rank(), self._world_size)
        self._state = self._rows.state_dict()

    def close(self) -> None:
        """End the work in the background."""
        if self._loader is not None:
            self._loader.close()

    def _fetch(self) -> None:
        """Take the batches of one optimizer step, and agree with the other processes that all have theirs."""
        problem = None
        began = time.perf_counter()
        try:
            self._ready = [self._loader.get() for _ in range(self._micro_steps)]
        except Exception as error:
            problem = error
        self.waiting_seconds += time.perf_counter() - began
        if self._world_size > 1:
            failed = torch.tensor([int(problem is not None)])
            dist.all_reduce(failed, group=self._group)
            if not failed:
                return
            told: list[str | None] = [None] * self._world_size
            dist.all_gather_object(told, None if problem is None else describe(problem), group=self._group)
            problem = problem or DataError(next(sentence for sentence in told if sentence))
        if problem is not None:
            raise problem if isinstance(problem, DataError) else DataError(describe(problem)) from problem


def open_data(
    recipe: TextRecipe,
    cache: Path,
    *,
    lanes: int | None = None,
    block_rows: int = BLOCK_ROWS,
) -> TrainingData:
    """Prepare the text on the first process and open it on all; a collective call.

    Args:
        recipe: of the text.
        cache: folder of the prepared data, one for all processes.
        lanes: parts that a stream is cut into, a multiple of the number of processes; None for one per process.
        block_rows: rows of a stream that are shuffled together.

    Raises:
        DataError: on every process, where the data cannot be used.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Its errors are told in one sentence, and not by their own log as well.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    folder = agreed(lambda: prepare(recipe, cache), only_first=True)

    def load() -> TrainingData:
        if not folder.is_dir():
            raise DataError(f"--cache-dir {cache} must be a folder that the processes of all machines share")
        text = TextData.load(folder)
        if len(text.validation) < world_size:
            raise DataError(f"{len(text.validation)} validation sequences do not reach {world_size} processes")
        if recipe.vocab_size is not None:
            warning = check_vocabulary(text.tokenizer, recipe.vocab_size)
            if warning and rank == 0:
                print(f"warning: {warning}", file=sys.stderr, flush=True)
        settings = {"seed": recipe.seed, "seq_length": recipe.seq_length, "source": text.facts["source"]}
        settings |= {"tokenizer": text.facts["tokenizer_fingerprint"]}
        if text.train is not None:
            settings["rows"] = len(text.train)
            return TrainingData(text, PreparedRows(text.train, settings, rank, world_size), rank, world_size)
        documents, _ = stream_splits(recipe.open())
        count = lanes or world_size
        settings |= {"files": len(documents.files), "lanes": count, "block_rows": block_rows}
        stream = LaneRecipe(
            documents=documents,
            encoder=Encoder(text.tokenizer),
            seq_length=recipe.seq_length,
            seed=recipe.seed,
            lanes=count,
            block_rows=block_rows,
        )
        return TrainingData(text, StreamRows(stream, settings, rank, world_size), rank, world_size)

    return agreed(load)


def agreed(work: Callable[[], Result], *, only_first: bool = False) -> Result:
    """The result of `work()` on this process, or of the first one alone; if any process fails, all do.

    Raises:
        DataError: on every process, with the sentence of the first that failed.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    result, sentence = None, None
    if rank == 0 or not only_first:
        try:
            result = work()
        except Exception as error:
            sentence = describe(error)
    if only_first:
        outcome = [result, sentence]
        dist.broadcast_object_list(outcome, src=0)
        result, sentence = outcome
    else:
        sentences: list[str | None] = [None] * world_size
        dist.all_gather_object(sentences, sentence)
        sentence = next((told for told in sentences if told), None)
    if sentence is not None:
        raise DataError(sentence)
    return result
