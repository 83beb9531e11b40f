"""Rows of P that a rank has borrowed for one step and keeps for the next ones: a round trip less in each.

P changes at a refresh alone, so what has arrived stays true until then. One turn of a param group keeps its rows, the
first: only there does a step wait for them while nothing else travels. That is at most `MAX_STEP_NUMEL` elements, or
one matrix. Which rows are kept is the same on every rank. A lender sees that a basis is not the one it has sent, also
where a state was loaded or written to from outside, and says so in the first sums of a step (`Agreement`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor

from ds_fira.sharding.lowrank.shard_step import ShardStep
from ds_fira.sharding.row_blocks import Transfer

# By position and borrowed transfer, rows of P.
BorrowedRows = Mapping[int, Mapping[Transfer, Tensor]]


class KeptRows:
    """What is kept of one turn.

    Attributes:
        rows: what has arrived; what arrives later is copied there.
        wire: the one tensor of which they are parts, where kernels take it apart; else None.
    """

    def __init__(self, positions: Collection[int]) -> None:
        """Nothing is kept yet.

        Args:
            positions: of the matrices whose borrowed rows of P may be kept; the same on every rank.
        """
        self._positions = frozenset(positions)
        self._known: set[int] = set()
        # Not the tensors, whose memory is the optimizer's to give back.
        self._sent: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.rows: BorrowedRows = {}
        self.wire: Tensor | None = None

    def takes(self, positions: Iterable[int]) -> bool:
        """Whether the rows of the matrices at some positions are to be kept."""
        return self._positions.issuperset(positions)

    def has(self, positions: Iterable[int]) -> bool:
        """Whether they are kept, so that nothing is to be sent; the same on every rank."""
        return self._known.issuperset(positions)

    def keep(self, positions: Iterable[int], parts: Mapping[int, ShardStep], arrived: BorrowedRows) -> BorrowedRows:
        """Keep what has arrived, and in mind what this rank has sent.

        Args:
            positions: of the matrices; of all that are kept where none were before.
            parts: by position, this rank's of them.
            arrived: what they borrow.

        Returns:
            All that is kept.
        """
        self._known.update(positions)
        if not self.rows:
            self.rows = arrived
        for position, borrowed in arrived.items():
            for transfer, rows in borrowed.items():
                if self.rows[position][transfer] is not rows:
                    self.rows[position][transfer].copy_(rows)
        for position, part in parts.items():
            if part.plan.basis_lent:
                self._sent[position] = weakref.ref(part.state.basis), part.state.basis._version
        return self.rows

    def move(self, move: Callable[[Tensor], Tensor]) -> None:
        """Keep the rows in other memory, and no longer what has been sent: that bases have moved, lenders will see."""
        wire = None if self.wire is None else move(self.wire)
        first = 0 if wire is None else self.wire.storage_offset()

        def moved(rows: Tensor) -> Tensor:
            if wire is None:
                return move(rows)
            return wire.as_strided(rows.shape, rows.stride(), rows.storage_offset() - first)

        self.rows = {
            position: {transfer: moved(rows) for transfer, rows in borrowed.items()}
            for position, borrowed in self.rows.items()
        }
        self.wire = wire

    def forget(self, positions: Iterable[int]) -> None:
        """Their bases are others now."""
        self._known.difference_update(positions)

    def changed(self, parts: Mapping[int, ShardStep]) -> set[int]:
        """The positions at which others keep rows of this rank that it has no more: replaced or written to since."""
        return {
            position
            for position, (basis, version) in self._sent.items()
            if position in self._known
            and (parts[position].state.basis is not basis() or parts[position].state.basis._version != version)
        }
