"""Ranks that are threads of one process, for tests of what crosses ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Barrier, Lock

import torch
from torch import Tensor

from ds_fira.sharding.comm import Communicator, Pending

SECONDS = 60  # that a rank waits for the others


class Threads(Communicator):
    """One rank: its collectives go over a list that the ranks share, all else is the communicator's.

    Attributes:
        late: whether what is sent is looked at when it is waited for, not when it is started: what is changed in the
            meantime, as no process may change what a collective still sends, shows in what arrives.
        started: collectives started.
        round_trips: those of them that came one after another: one that is started while others travel, whose results
            nobody has waited for yet, takes no time of its own.
    """

    # Held by the rank that computes, where only one may at a time: Triton's interpreter has one state in a process.
    computing: Lock | None = None

    def __init__(self, dp_rank: int, barrier: Barrier, box: list[Sequence[Tensor]], late: bool = False) -> None:
        self.dp_rank, self.dp_size = dp_rank, len(box)
        self.collectives = self.bytes_sent = self.started = self.round_trips = 0
        self._barrier, self._box, self.late = barrier, box, late

    def _exchange(self, own: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        self._box[self.dp_rank] = own
        with self._waiting():
            self._barrier.wait(SECONDS)
            all_of_them = list(self._box)
            self._barrier.wait(SECONDS)
        return all_of_them

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        if self.computing is None:
            yield
            return
        self.computing.release()
        try:
            yield
        finally:
            self.computing.acquire()

    def _pending(self, exchange: Callable[[], Tensor]) -> Pending[Tensor]:
        """What arrives at a time of its own: one round trip after its start."""
        self.started += 1
        end = self.round_trips + 1
        arrived = None if self.late else exchange()

        def wait() -> Tensor:
            self.round_trips = max(self.round_trips, end)
            return exchange() if arrived is None else arrived

        return Pending(wait)

    def start_all_to_all(self, sent: Tensor, sent_counts: list[int], received_counts: list[int]) -> Pending[Tensor]:
        """As the communicator's; what is sent is what is expected, and nothing goes to oneself."""
        assert sent_counts[self.dp_rank] == 0

        def exchange() -> Tensor:
            received = [pieces[self.dp_rank] for pieces in self._exchange(sent.clone().split(sent_counts))]
            assert [piece.numel() for piece in received] == received_counts
            return torch.cat(received)

        return self._pending(exchange)

    def start_all_reduce(self, tensor: Tensor, keep: bool = True) -> Pending[Tensor]:
        """As the communicator's, added up in order of rank."""
        return self._pending(lambda: sum(other for (other,) in self._exchange((tensor.clone(),))))

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """As the communicator's."""
        return self._exchange((tensor.clone(),))[source][0].clone()
