"""Micro-batches of one rank as data sets of torch, and those of a text that was prepared as a whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from datasets import Dataset
from torch.utils.data import IterableDataset

from .documents import DataError

EPOCH_STRIDE = 1_000_003  # keeps the epochs of one seed apart from those of the next
State = dict[str, object]  # plain Python, for a checkpoint


class Rows(IterableDataset, ABC):
    """The micro-batches of one rank, endless: int64 tensors of shape (batch_size, seq_length).

    Attributes:
        kind: of the training state.
        settings: what a run may not change between a stop and its resume; kept in the state and compared.
        batch_size: sequences of a micro-batch; set before the first one is taken.
    """

    kind: str

    def __init__(self, settings: Mapping[str, object]) -> None:
        self.settings, self.batch_size = settings, 1

    def __iter__(self) -> Iterator[torch.Tensor | str]:
        """The micro-batches; in place of one that cannot be made its error comes, in one sentence.

        torch would wrap an exception of a worker process in that process's traceback.
        """
        try:
            yield from self.batches()
        except Exception as error:
            yield describe(error)

    @abstractmethod
    def batches(self) -> Iterator[torch.Tensor]:
        """The micro-batches."""

    @abstractmethod
    def state_dict(self) -> State:
        """This rank's state after the micro-batch that came last."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Go on where this rank's `state_dict` was called."""

    @abstractmethod
    def merge(self, states: Sequence[State]) -> State:
        """The state of the whole run from that of every rank."""

    @abstractmethod
    def load(self, state: State, rank: int, world_size: int) -> None:
        """Go on where `merge` was called; raises `DataError` where these ranks and data cannot."""

    def check(self, state: State) -> None:
        """Compare a saved state with the data at hand; raises `DataError` where they differ."""
        kind = state.get("kind")
        if kind != self.kind:
            raise DataError(f"the training state was written with other data, of the kind {kind}, not {self.kind}")
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise DataError(
                    f"the training state was written with {name} {state['settings'].get(name)}, and now it is {value}: "
                    "resume with the same data and options"
                )


class PreparedRows(Rows):
    """Rows prepared on disk, in an order of our own.

    Every epoch is one permutation, the same on all ranks, and one epoch follows the other without a gap: the rows of a
    step are the next `batch_size * world_size` of that order, of which each rank takes its own. Within an epoch every
    row is used once. The order depends on `seed` alone, so a run goes on where it stopped, on any number of ranks.

    torchdata's `StatefulDistributedSampler` and `datasets`' `split_dataset_by_node` give each rank an epoch of its own:
    the last rows of one are repeated or left out where a step does not end with it, and a state counts rows of one
    number of ranks.
    """

    kind = "rows"

    def __init__(self, data: Dataset, settings: Mapping[str, object], rank: int, world_size: int) -> None:
        super().__init__(settings)
        self.data, self.rank, self.world_size = data, rank, world_size
        self._position = 0

    def batches(self) -> Iterator[torch.Tensor]:
        """The micro-batches from the row on where the state stands."""
        length, epoch, order = len(self.data), -1, torch.empty(0)
        while True:
            first = self._position + self.rank * self.batch_size
            rows = []
            for position in range(first, first + self.batch_size):
                if position // length != epoch:
                    epoch = position // length
                    generator = torch.Generator().manual_seed(self.settings["seed"] + EPOCH_STRIDE * epoch)
                    order = torch.randperm(length, generator=generator)
                rows.append(order[position % length].item())
            self._position += self.batch_size * self.world_size
            yield self.data[rows]["input_ids"].long()

    def state_dict(self) -> State:
        """The rows that all ranks together have used."""
        return {"position": self._position}

    def load_state_dict(self, state: State) -> None:
        """Go on behind those rows."""
        self._position = state["position"]

    def merge(self, states: Sequence[State]) -> State:
        """That of any rank."""
        return {"kind": self.kind, "settings": self.settings, **states[0]}

    def load(self, state: State, rank: int, world_size: int) -> None:
        """Go on, on any number of ranks."""
        self.check(state)
        self.load_state_dict(state)


def describe(error: BaseException) -> str:
    """One sentence for an error."""
    if isinstance(error, DataError):
        return str(error)
    line = " ".join(str(error).split())
    return f"the data cannot be prepared: {type(error).__name__}: {line}"
