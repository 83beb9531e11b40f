"""Which pieces of the memory of a turn by kernels cross ranks, and where they go: a plan without tensors.

What is sent has the order of `Communicator.start_deliver`, so that ranks with and without kernels understand each
other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ds_fira.core.kernels.moving import Arrival, Move, Sum, Way
from ds_fira.core.kernels.split_part import SplitPart
from ds_fira.sharding.lowrank.answer_form import numel_in_parts
from ds_fira.sharding.lowrank.layout import WORDS, TurnLayout
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.row_blocks import Transfer, common

# A matrix's position and what it borrows or lends.
Key = tuple[int, Transfer]


class Delivery(NamedTuple):
    """What a rank sends and is sent in one exchange.

    Attributes:
        sent_counts: elements for every rank.
        received_counts: from every rank.
        sent: by payload, the place of its first element in what is sent.
        received: likewise.
    """

    sent_counts: list[int]
    received_counts: list[int]
    sent: dict[Key, int]
    received: dict[Key, int]

    @classmethod
    def of(
        cls, dp_size: int, sent: Sequence[tuple[int, Key, int]], expected: Sequence[tuple[int, Key, int]]
    ) -> Delivery:
        """Of (rank, payload, elements), in the order of the plan."""
        return cls(*_packed(dp_size, sent, expected))


def _packed(dp_size: int, *ways: Sequence[tuple[int, Key, int]]) -> tuple[list[int], list[int], dict, dict]:
    counts, starts = [], []
    for way in ways:
        counted, found, place = [0] * dp_size, {}, 0
        for rank, key, numel in sorted(way, key=lambda item: item[0]):
            found[key] = place
            place += numel
            counted[rank] += numel
        counts.append(counted)
        starts.append(found)
    return (*counts, *starts)


class TurnPieces:
    """The pieces of a turn.

    Args:
        layout: where everything lies.
        dp_size: ranks.
        one_factor: whether one factor of the gradient is for all entries of a matrix.
    """

    def __init__(self, layout: TurnLayout, dp_size: int, one_factor: bool) -> None:
        self._layout, self._dp_size, self._one = layout, dp_size, one_factor

    def bases(self, positions: Collection[int]) -> Delivery:
        """The rows of P that parts at some positions borrow for a step."""
        plans = self._at(positions)
        sent = [(t.borrower, (p, t), self._rows(p, t)) for p, plan in plans for t in plan.basis_lent]
        expected = [(t.keeper, (p, t), self._rows(p, t)) for p, plan in plans for t in plan.basis_borrowed]
        return Delivery.of(self._dp_size, sent, expected)

    def parts_of_sums(self, positions: Collection[int]) -> Delivery:
        """R and the norms of borrowed entries, to their keepers."""
        plans = self._at(positions)
        sent = [(t.keeper, (p, t), self._entries(p, t)) for p, plan in plans for t in plan.borrowed]
        expected = [(t.borrower, (p, t), self._entries(p, t)) for p, plan in plans for t in plan.lent]
        return Delivery.of(self._dp_size, sent, expected)

    def answers(self, positions: Collection[int]) -> Delivery:
        """What belongs to entries, from their keepers to those who borrow them."""
        plans = self._at(positions)
        sent = [(t.borrower, (p, t), self.answer_numel(p, t)) for p, plan in plans for t in plan.lent]
        expected = [(t.keeper, (p, t), self.answer_numel(p, t)) for p, plan in plans for t in plan.borrowed]
        return Delivery.of(self._dp_size, sent, expected)

    def pieces_of_bases(
        self, positions: Collection[int], delivery: Delivery | None, bases: Mapping[int, int]
    ) -> list[Move]:
        """The rows of P that are lent, and those of the rank's own that it works with.

        Args:
            positions: of the matrices.
            delivery: of the same; None where nothing is sent.
            bases: by position, the place of the rank's rows of P among all bases.
        """
        pieces = []
        for p, plan in self._at(positions):
            part, own = self._layout.parts[p], common(plan.basis_rows, plan.basis_span)
            if part.basis is None:
                continue
            if len(own):
                source = bases[p] + (own.start - plan.basis_rows.start) * part.rank
                target = part.basis + (own.start - plan.basis_span.start) * part.rank
                pieces.append(Move(Way.BASES_TO_WORDS, source, target, 1, len(own) * part.rank))
            for t in plan.basis_lent if delivery is not None else ():
                source = bases[p] + (t.entries.start - plan.basis_rows.start) * part.rank
                pieces.append(Move(Way.BASES_TO_WIRE, source, delivery.sent[p, t], 1, self._rows(p, t)))
        return pieces

    def borrowed_rows(self, position: int, delivery: Delivery, arrived: Tensor) -> dict[Transfer, Tensor]:
        """The rows of P that a part borrows, 1-D, in what has arrived."""
        places = {t: delivery.received[position, t] for t in self._layout.plans[position].basis_borrowed}
        return {t: arrived[place : place + self._rows(position, t)] for t, place in places.items()}

    def pieces_of_borrowed_bases(self, positions: Collection[int], delivery: Delivery) -> list[Move]:
        """The rows of P that have arrived, to those of the rank's own."""
        pieces = []
        for p, plan in self._at(positions):
            part = self._layout.parts[p]
            for t in plan.basis_borrowed:
                target = part.basis + (t.entries.start - plan.basis_span.start) * part.rank
                pieces.append(Move(Way.WIRE_TO_WORDS, delivery.received[p, t], target, 1, self._rows(p, t)))
        return pieces

    def pieces_of_sums(self, positions: Collection[int], delivery: Delivery) -> list[Move]:
        """R and the norms of borrowed entries; and R of those kept, where they do not lie as in the region."""
        pieces = []
        for p, plan in self._at(positions):
            part = self._layout.parts[p]
            if part.kept_low_rank != part.low_rank and part.left:
                source = part.low_rank + part.kept_start
                sizes = (part.rank, part.kept, part.region, part.kept)
                pieces.append(Move(Way.WORDS_TO_WORDS, source, part.kept_low_rank, *sizes))
            for t in plan.borrowed:
                start, count, place = t.entries.start - plan.region.start, len(t.entries), delivery.sent[p, t]
                pieces.append(_entries_piece(Way.WORDS_TO_WIRE, part, part.low_rank, start, part.region, place, count))
                norms = place + part.rank * count
                pieces.append(Move(Way.ROOTS_TO_WIRE, part.grad_sq + start, norms, 1, count))
        return pieces

    def arrivals(self, positions: Collection[int], delivery: Delivery) -> tuple[list[Sum], list[Arrival]]:
        """What others have of the entries kept, by the matrix it is added to."""
        sums: list[Sum] = []
        arrivals: list[Arrival] = []
        for p, plan in self._at(positions):
            part = self._layout.parts[p]
            if plan.lent:
                place = part.kept_low_rank, part.grad_sq + part.kept_start
                sums.append(Sum(*place, part.kept, part.rank, int(part.left), len(arrivals), len(plan.lent)))
            for t in plan.lent:
                place = delivery.received[p, t]
                arrivals.append(Arrival(place, t.entries.start - plan.kept.start, len(t.entries)))
        return sums, arrivals

    def pieces_of_answers(self, positions: Collection[int], delivery: Delivery, known: Collection[int]) -> list[Move]:
        """C and the factors of the gradient, or N, R and phi, of the entries lent.

        Args:
            positions: of all matrices that are answered.
            delivery: of the same.
            known: the positions where there is an answer.
        """
        pieces, one = [], self._one
        for p, plan in self._at(known):
            part = self._layout.parts[p]
            # On the right places begin with the region's.
            first, stride = (plan.kept.start, part.kept) if part.left else (plan.region.start, part.region)
            for t in plan.lent if p in positions else ():
                start, count, place = t.entries.start - first, len(t.entries), delivery.sent[p, t]
                numel, offset = part.rank * count, t.entries.start - plan.region.start
                pieces.append(_entries_piece(Way.WORDS_TO_WIRE, part, part.direction, start, stride, place, count))
                if self._layout.forms[p] == "in_parts":
                    source = part.kept_low_rank if part.left else part.low_rank
                    pieces.append(_entries_piece(Way.WORDS_TO_WIRE, part, source, start, stride, place + numel, count))
                    if not one:
                        bits, place = WORDS * (part.phi + offset), place + 2 * numel
                        pieces.append(Move(Way.BITS_TO_WIRE, bits, place, 1, WORDS * count))
                elif one:
                    pieces.append(Move(Way.WORDS_TO_WIRE, part.scales, place + numel, 1, count, source_column=0))
                else:
                    pieces.append(Move(Way.WORDS_TO_WIRE, part.scales + offset, place + numel, 1, count))
        return pieces

    def pieces_of_borrowed_answers(self, positions: Collection[int], delivery: Delivery) -> list[Move]:
        """What has arrived, to where it goes by the region."""
        pieces, one = [], self._one
        for p, plan in self._at(positions):
            part = self._layout.parts[p]
            for t in plan.borrowed:
                start, count, place = t.entries.start - plan.region.start, len(t.entries), delivery.received[p, t]
                numel = part.rank * count
                pieces.append(_region_piece(Way.WIRE_TO_WORDS, part, place, part.low_rank_update, start, count))
                if self._layout.forms[p] == "in_parts":
                    pieces.append(_region_piece(Way.WIRE_TO_WORDS, part, place + numel, part.low_rank, start, count))
                    if not one:
                        bits, place = WORDS * (part.phi + start), place + 2 * numel
                        pieces.append(Move(Way.WIRE_TO_BITS, place, bits, 1, WORDS * count))
                elif not one:
                    pieces.append(Move(Way.WIRE_TO_WORDS, place + numel, part.scales + start, 1, count))
        return pieces

    def pieces_kept(self, positions: Collection[int]) -> list[Move]:
        """C of the entries kept, or N and R, to where it goes by the region, where that is another place."""
        pieces = []
        for p, _ in self._at(positions):
            part = self._layout.parts[p]
            if part.left and part.kept and part.low_rank_update != part.direction:
                moved = [(part.direction, part.low_rank_update)]
                if self._layout.forms[p] == "in_parts":
                    moved.append((part.kept_low_rank, part.low_rank))
                pieces += [
                    _region_piece(Way.WORDS_TO_WORDS, part, *places, part.kept_start, part.kept) for places in moved
                ]
        return pieces

    def pieces_spared(self, positions: Collection[int], back: bool) -> list[Move]:
        """N of the entries kept, to where C does not take its place, or back."""
        pieces = []
        for p, _ in self._at(positions):
            part = self._layout.parts[p]
            if part.spare is not None:
                places = (part.spare, part.direction) if back else (part.direction, part.spare)
                pieces.append(Move(Way.WORDS_TO_WORDS, *places, 1, part.kept * part.rank))
        return pieces

    def _at(self, positions: Collection[int]) -> list[tuple[int, LocalShardPlan]]:
        return [(position, plan) for position, plan in self._layout.plans.items() if position in positions]

    def _rows(self, position: int, transfer: Transfer) -> int:
        return len(transfer.entries) * self._layout.plans[position].matrix.rank

    def _entries(self, position: int, transfer: Transfer) -> int:
        return len(transfer.entries) * (self._layout.plans[position].matrix.rank + 1)

    def answer_numel(self, position: int, transfer: Transfer) -> int:
        """Elements of an answer."""
        if self._layout.forms[position] == "in_parts":
            return numel_in_parts(self._layout.plans[position].matrix.rank, transfer, 4)
        return self._entries(position, transfer)


def _entries_piece(way: int, part: SplitPart, source: int, start: int, stride: int, target: int, count: int) -> Move:
    """Some entries of a tensor like R, as they travel: columns of a matrix on the left, whole rows on the right."""
    if part.left:
        return Move(way, source + start, target, part.rank, count, stride, count)
    return Move(way, source + start * part.rank, target, 1, count * part.rank)


def _region_piece(way: int, part: SplitPart, source: int, target: int, start: int, count: int) -> Move:
    """Some entries, stored by themselves, to their place in a tensor like R over the region."""
    if part.left:
        return Move(way, source, target + start, part.rank, count, count, part.region)
    return Move(way, source, target + start * part.rank, 1, count * part.rank)
