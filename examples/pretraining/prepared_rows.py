"""Rows of a text that was prepared as a whole: their order, and each process's share of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset

from .streaming import check_settings

EPOCH_STRIDE = 1_000_003  # keeps the epochs of one seed apart from those of the next


def shard_indices(length: int, *, dp_rank: int, world_size: int) -> range:
    """Rows of an evaluation set for one process: disjoint, of equal number on all, fewer than `world_size` unused."""
    return range(dp_rank, length - length % world_size, world_size)


def training_batches(
    data: Dataset, *, batch_size: int, seed: int, dp_rank: int, world_size: int, start: int = 0
) -> Iterator[torch.Tensor]:
    """Endless micro-batches, int64 of shape (batch_size, seq_length), for one process, from row `start` on.

    Every epoch is one permutation, the same on all processes, and one epoch follows the other without a gap: the rows
    of a step are the next `batch_size * world_size` of that order, of which each process takes its own. Within an epoch
    every row is used once. The order depends on `seed` alone, so a run goes on where it stopped, on any number of
    processes.
    """
    length, epoch, order = len(data), -1, torch.empty(0)
    while True:
        first = start + dp_rank * batch_size
        rows = []
        for position in range(first, first + batch_size):
            if position // length != epoch:
                epoch = position // length
                order = torch.randperm(length, generator=torch.Generator().manual_seed(seed + EPOCH_STRIDE * epoch))
            rows.append(order[position % length].item())
        yield data[rows]["input_ids"].long()
        start += batch_size * world_size


class PreparedRows:
    """The micro-batches of one rank from rows prepared on disk; see `streaming.StreamRows` for the interface."""

    def __init__(self, data: Dataset, settings: dict[str, Any], rank: int, world_size: int) -> None:
        self.data, self.settings, self.rank, self.world_size = data, settings, rank, world_size
        self._position = 0

    def micro_batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Endless int64 batches (batch_size, seq_length), each with the rows that all ranks have used after it."""
        batches = training_batches(
            self.data,
            batch_size=batch_size,
            seed=self.settings["seed"],
            dp_rank=self.rank,
            world_size=self.world_size,
            start=self._position,
        )
        position = self._position
        for batch in batches:
            position += batch_size * self.world_size
            yield batch, {"position": position}

    def initial_state(self) -> dict[str, Any]:
        """The state before the first batch."""
        return {"position": self._position}

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of the whole run: that of any rank."""
        return {"kind": "rows", "settings": self.settings, **states[0]}

    def load(self, state: dict[str, Any], rank: int, world_size: int) -> None:
        """Go on where `merge` was called, on any number of ranks; raises `DataError` for a state of other data."""
        check_settings(state, "rows", self.settings)
        self._position = state["position"]
