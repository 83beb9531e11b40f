"""Ranks that are threads of one process, for tests of what crosses ranks."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Barrier

import torch
from torch import Tensor

from ds_fira.sharding.comm import Communicator, Pending

SECONDS = 60  # that a rank waits for the others


class Threads(Communicator):
    """One rank: its collectives go over a list that the ranks share, all else is the communicator's.

    Attributes:
        started: collectives started.
        round_trips: those of them that came one after another: one that is started while others travel, whose results
            nobody has waited for yet, takes no time of its own.
    """

    def __init__(self, dp_rank: int, barrier: Barrier, box: list[Sequence[Tensor]]) -> None:
        self.dp_rank, self.dp_size = dp_rank, len(box)
        self.collectives = self.bytes_sent = self.started = self.round_trips = 0
        self._barrier, self._box = barrier, box

    def _exchange(self, own: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        self._box[self.dp_rank] = own
        self._barrier.wait(SECONDS)
        all_of_them = list(self._box)
        self._barrier.wait(SECONDS)
        return all_of_them

    def _pending(self, arrived: Tensor) -> Pending[Tensor]:
        """What has arrived already, at a time of its own: one round trip after its start."""
        self.started += 1
        end = self.round_trips + 1

        def wait() -> Tensor:
            self.round_trips = max(self.round_trips, end)
            return arrived

        return Pending(wait)

    def start_all_to_all(self, sent: Tensor, sent_counts: list[int], received_counts: list[int]) -> Pending[Tensor]:
        """As the communicator's; what is sent is what is expected, and nothing goes to oneself."""
        assert sent_counts[self.dp_rank] == 0
        received = [pieces[self.dp_rank] for pieces in self._exchange(sent.clone().split(sent_counts))]
        assert [piece.numel() for piece in received] == received_counts
        return self._pending(torch.cat(received))

    def start_all_reduce(self, tensor: Tensor) -> Pending[Tensor]:
        """As the communicator's, added up in order of rank."""
        return self._pending(sum(other for (other,) in self._exchange((tensor.clone(),))))

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """As the communicator's."""
        return self._exchange((tensor.clone(),))[source][0].clone()
