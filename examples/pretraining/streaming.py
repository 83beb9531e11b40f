"""Rows of tokens from a stream of documents: sharded over ranks, shuffled, and resumable to the row.

The text is cut into *lanes*, disjoint and of equal share; a rank reads one lane or several. A lane is a pure function
of (seed, position), so its state is a handful of integers: where in the text the current block of rows begins, and how
many rows of the block were handed out. After a restart the block is made again, and the next row is the one that would
have come.

`datasets` reads the files and torchdata's loader makes the batches. Packing and shuffling are our own, because theirs
lose rows (366 documents, 13,646 tokens, rows of 16; the tests are in test_data_stream.py):

- `map(pack, batched=True)` drops what does not fill a row at the end of each batch of documents: 46 tokens lost in
  batches of 100 (test_no_token_is_lost).
- `shuffle(buffer_size=64)` drops what its buffer holds when a `state_dict` is loaded: 60 of 850 rows never came
  (test_resume_anywhere).
- `split_dataset_by_node` is disjoint, but every rank reads every file as soon as the ranks do not divide their number,
  and a split stream tells no file: the error of a broken one could not name it
  (test_an_error_of_one_rank_ends_all in test_data_ranks.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .documents import DataError, Documents
from .rows import Rows, State
from .tokenization import Encoder

ENCODE_DOCUMENTS = 128  # documents that are tokenised together,
ENCODE_CHARACTERS = 1 << 20  # or fewer, when they reach so many characters


class Position(NamedTuple):
    """A place in a lane: the `token`-th of a document, which is the `document`-th of the `slot`-th file of an epoch."""

    epoch: int
    slot: int
    document: int
    token: int


START = Position(0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class LaneRecipe:
    """What, besides the position, decides the rows of a lane.

    Attributes:
        documents: the training text.
        encoder: gives a document's tokens.
        seq_length: tokens of a row.
        seed: of the order of files and rows.
        lanes: number of lanes the text is cut into.
        block_rows: rows that are shuffled together.
    """

    documents: Documents
    encoder: Encoder
    seq_length: int
    seed: int
    lanes: int
    block_rows: int


class Lane:
    """One lane as an endless iterator over rows, int32 of shape (seq_length,)."""

    def __init__(self, recipe: LaneRecipe, lane: int, state: State | None = None) -> None:
        """Start at the beginning, or at what `state` returned earlier for the same recipe and lane."""
        self.recipe, self.lane = recipe, lane
        state = state or {"position": START, "block": 0, "row": 0, "rows": 0}
        self._start, self._block, self._row = Position(*state["position"]), state["block"], state["row"]
        self._rows = state["rows"]
        self._iterator = self._iterate()

    def __next__(self) -> np.ndarray:
        """The next row."""
        return next(self._iterator)

    def state(self) -> State:
        """The state after the row that came last: `position` where its block begins, `block` its number, `row` the
        rows of the block handed out, `rows` the rows of the lane handed out since the first start.
        """
        return {"position": list(self._start), "block": self._block, "row": self._row, "rows": self._rows}

    def _iterate(self) -> Iterator[np.ndarray]:
        skip = self._row
        for start, block in self._blocks(self._start):
            order = np.random.default_rng([self.recipe.seed, self.lane, self._block]).permutation(len(block))
            self._start = start
            for row in range(skip, len(block)):
                self._row, self._rows = row + 1, self._rows + 1
                yield block[order[row]]
            skip, self._row = 0, 0
            self._block += 1

    def _blocks(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Blocks of at most `block_rows` rows, in the order of the text, each with the position where it begins.

        A block ends with the epoch, so that no document of the next one can come before the last of this one. The
        tokens that do not fill a row there open the next epoch: none is lost.
        """
        seq_length = self.recipe.seq_length
        pending: deque[tuple[Position, np.ndarray]] = deque()
        tokens = 0  # of `pending`
        stream = self._encoded(start)
        while True:
            while tokens < self.recipe.block_rows * seq_length:
                position, ids = next(stream)
                if ids is not None:
                    pending.append((position, ids))
                    tokens += len(ids)
                elif tokens >= seq_length:  # the end of an epoch
                    break
            rows = min(self.recipe.block_rows, tokens // seq_length)
            begin = pending[0][0]
            pieces = self._take(pending, rows * seq_length)
            tokens -= rows * seq_length
            yield begin, np.concatenate(pieces).reshape(rows, seq_length)

    @staticmethod
    def _take(pending: deque[tuple[Position, np.ndarray]], count: int) -> list[np.ndarray]:
        """Remove the first `count` tokens."""
        pieces = []
        while count:
            position, ids = pending.popleft()
            if len(ids) > count:
                pending.appendleft((position._replace(token=position.token + count), ids[count:]))
                ids = ids[:count]
            pieces.append(ids)
            count -= len(ids)
        return pieces

    def _encoded(self, start: Position) -> Iterator[tuple[Position, np.ndarray | None]]:
        """The tokens of each document from `start` on; at the end of an epoch the start of the next one and None."""
        waiting: list[tuple[Position, str]] = []
        characters = 0

        def flush() -> Iterator[tuple[Position, np.ndarray]]:
            nonlocal characters
            for (position, _), ids in zip(waiting, self.recipe.encoder([text for _, text in waiting]), strict=True):
                # Only the very first document can begin in its middle.
                yield position, ids[position.token :]
            waiting.clear()
            characters = 0

        for position, text in self._documents(start):
            if text is not None:
                waiting.append((position, text))
                characters += len(text)
            if text is None or len(waiting) == ENCODE_DOCUMENTS or characters >= ENCODE_CHARACTERS:
                yield from flush()
            if text is None:
                yield position, None

    def _documents(self, start: Position) -> Iterator[tuple[Position, str | None]]:
        """The lane's documents from `start` on, epoch after epoch; between two the start of the next one and None.

        As many files as all lanes can share evenly are read by one lane each; of the few that are left over, every
        lane reads the documents whose number in their file is its own, modulo `lanes`. `split_dataset_by_node` would
        let every rank read every file as soon as their number is not divisible.
        """
        recipe, lanes = self.recipe, self.recipe.lanes
        files = len(recipe.documents.files)
        shared = files - files % lanes
        first, token = start.document, start.token
        epoch, slot_start, complete = start.epoch, start.slot, start[1:] == (0, 0, 0)
        while True:
            order = np.random.default_rng([recipe.seed, epoch]).permutation(files).tolist()
            mine = [(file, False) for file in order[self.lane : shared : lanes]]
            mine += [(file, True) for file in order[shared:]]
            found = False
            for slot in range(slot_start, len(mine)):
                file, divided = mine[slot]
                for document, text in recipe.documents.read(file, first):
                    if divided and document % lanes != self.lane:
                        continue
                    found = True
                    yield Position(epoch, slot, document, token), text
                    token = 0
                first = 0
            if complete and not found:
                raise DataError(
                    f"part {self.lane + 1} of {lanes} of the training text holds no documents: take more text, or "
                    "fewer processes or --lanes"
                )
            epoch, slot_start, complete = epoch + 1, 0, True
            yield Position(epoch, 0, 0, 0), None


class StreamRows(Rows):
    """Rows of a stream, from this rank's lanes in turn.

    Args:
        recipe: of the lanes.
        settings: as in `Rows`.
        rank: of this process.
        world_size: processes; it divides the number of lanes.
    """

    kind = "stream"

    def __init__(self, recipe: LaneRecipe, settings: Mapping[str, object], rank: int, world_size: int) -> None:
        super().__init__(settings)
        if recipe.lanes % world_size:
            raise DataError(f"--lanes {recipe.lanes} is not a multiple of the {world_size} processes")
        share = recipe.lanes // world_size
        self._lanes = {number: Lane(recipe, number) for number in range(rank * share, (rank + 1) * share)}
        self._turn = 0

    def batches(self) -> Iterator[torch.Tensor]:
        """The micro-batches from where the state stands."""
        lanes = list(self._lanes.values())
        while True:
            rows = []
            for _ in range(self.batch_size):
                rows.append(next(lanes[self._turn]))
                self._turn = (self._turn + 1) % len(lanes)
            yield torch.from_numpy(np.stack(rows)).long()

    def state_dict(self) -> State:
        """The states of the lanes, and which of them comes next."""
        return {"lanes": {str(number): lane.state() for number, lane in self._lanes.items()}, "turn": self._turn}

    def load_state_dict(self, state: State) -> None:
        """Go on where the lanes were."""
        self._turn = state["turn"]
        for number, lane in self._lanes.items():
            self._lanes[number] = Lane(lane.recipe, number, state["lanes"][str(number)])

    def merge(self, states: Sequence[State]) -> State:
        """The lanes of all ranks."""
        lanes = {number: state for rank in states for number, state in rank["lanes"].items()}
        turns = [rank["turn"] for rank in states]
        return {"kind": self.kind, "settings": self.settings, "lanes": lanes, "turns": turns}

    def load(self, state: State, rank: int, world_size: int) -> None:
        """Go on, on as many ranks or another number that divides the lanes.

        Raises:
            DataError: the state belongs to other data, or cannot be divided over these ranks.
        """
        self.check(state)
        same = len(state["turns"]) == world_size
        if not same and len({lane["rows"] for lane in state["lanes"].values()}) > 1:
            raise DataError(
                f"the training state was written by {len(state['turns'])} processes, whose lanes are not equally far: "
                f"resume on as many, not on {world_size}"
            )
        self.load_state_dict({"lanes": state["lanes"], "turn": state["turns"][rank] if same else 0})
