"""A matrix that partition boundaries cut: who holds what of it, and what a step sends, in either of two ways.

*Base*: every sharer sends its fragments of gradient and weight to the owner, which steps the whole matrix and sends the
weights back. Equal to the bit to a matrix that is not cut.

*Lean*: every sharer keeps the part of the basis that its fragment needs, and between refreshes only low-rank data
crosses ranks. R has an *axis* along which it can be taken apart: its columns on the left, where R = P'G sums over rows,
and its rows on the right, where each row of R = GP belongs to one row of G. The entries along the axis are *kept*, with
their moments, by one sharer: on the left all of them by the owner, on the right each by the sharer that holds the
beginning of its row. A sharer that touches an entry which another keeps *borrows* it: it sends its part of R and of the
squared norm, and gets the step's phi and C for it.

*Spread*, under ZeRO-3, where every matrix is cut over all ranks: no state exists twice, and every sharer has an even
share of it. On the left the columns of R are kept by all sharers alike, not by the owner alone. On the right the rows
of P are spread alike, and borrowed for the time of a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from ds_fira.core.algorithms import FIRA_ADAM, Algorithm
from ds_fira.core.settings import GroupSettings
from ds_fira.core.subspace import Side, basis_shape, effective_rank, low_rank_shape, projection_side
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.row_blocks import column_span, common, hull, kept_rows, touched_rows

Way = Literal["base", "lean"]
# Of a sharer, entries of R or rows of P.
Spans = Callable[[int], range]
# float64 sums of a lean matrix that all ranks add up in a step: |G|^2 and whether a refresh is due; then |R|^2 and two
# that depend on the scaling. Each counts as two float32 elements.
GRADIENT_SUMS = 2
LOW_RANK_SUMS = 3


def state_numel(
    shape: tuple[int, int],
    rank: int,
    proj_type: str = "std",
    formulation: str = "released",
    algorithm: Algorithm = FIRA_ADAM,
) -> int:
    """Elements of optimizer state of one projected matrix, the paper's mr + 2nr + 1 (Table 1).

    Counts the basis, the moments and the limiter's norm.
    """
    side = projection_side(shape, proj_type, formulation)
    rows, r = basis_shape(shape, rank, side)
    a, b = low_rank_shape(shape, rank, side)
    return rows * r + len(algorithm.states) * a * b + algorithm.limited


@dataclass(frozen=True, slots=True)
class Transfer:
    """Entries of R along its axis, or rows of P, that one sharer borrows of another.

    Attributes:
        borrower: the dp_rank that touches them.
        keeper: the dp_rank that keeps them.
        entries: of R columns on the left, rows on the right; rows of P.
    """

    borrower: int
    keeper: int
    entries: range


@dataclass(frozen=True)
class SplitMatrix:
    """A matrix that partition boundaries cut, with its owner.

    Attributes:
        name: as in `MatrixShard`.
        shape: (m, n).
        fragments: (dp_rank, fragment) in ascending order of rank; the fragments tile the matrix.
        owner: the base way: the dp_rank that holds the state and makes the step. The lean way: the one that computes
            the basis, and on the left, unless spread, keeps R and its moments.
        side: the projected side.
        rank: r = min(rank asked for, m, n).
        way: how it is stepped.
        spread: whether the lean way keeps no state twice, and the same share of it on every sharer.
    """

    name: str
    shape: tuple[int, int]
    fragments: tuple[tuple[int, MatrixShard], ...]
    owner: int
    side: Side
    rank: int
    way: Way = "base"
    spread: bool = False

    @cached_property
    def by_rank(self) -> dict[int, MatrixShard]:
        """The fragments by dp_rank."""
        return dict(self.fragments)

    @cached_property
    def _places(self) -> dict[int, int]:
        return {holder: place for place, (holder, _) in enumerate(self.fragments)}

    def _even_share(self, dp_rank: int, count: int) -> range:
        """Of `count` entries those that fall to a sharer where all sharers take as many."""
        place, sharers = self._places[dp_rank], len(self.fragments)
        return range(place * count // sharers, (place + 1) * count // sharers)

    def kept(self, dp_rank: int) -> range:
        """The entries of R that a sharer keeps, the lean way."""
        if self.side == "right":
            return kept_rows(self.by_rank[dp_rank])
        if self.spread:
            return self._even_share(dp_rank, self.shape[1])
        return range(self.shape[1] if dp_rank == self.owner else 0)

    def touched(self, dp_rank: int) -> range:
        """The entries of R that a sharer's fragment needs, the lean way."""
        fragment = self.by_rank[dp_rank]
        return column_span(fragment) if self.side == "left" else touched_rows(fragment)

    def region(self, dp_rank: int) -> range:
        """The entries of R that a sharer works on: those that it touches and those that it keeps."""
        return hull(self.touched(dp_rank), self.kept(dp_rank))

    def links(self, of: int | None = None) -> Iterator[Transfer]:
        """What is borrowed of R, in ascending order of borrower, then of keeper.

        Args:
            of: only what this sharer borrows or lends; None for all.
        """
        if self.side == "left":
            yield from self._borrowed(self.touched, self.kept, of)
            return
        keeper = -1
        for holder, fragment in self.fragments:
            row = fragment.start // self.shape[1]
            if fragment.start % self.shape[1] and of in (None, holder, keeper):
                yield Transfer(holder, keeper, range(row, row + 1))
            if len(kept_rows(fragment)):
                keeper = holder  # of the row that the next fragment may begin in

    def basis_links(self, of: int | None = None) -> Iterator[Transfer]:
        """Rows of P that are borrowed for every step, as `links`; none unless spread and on the right."""
        if self.spread and self.side == "right":
            yield from self._borrowed(self.basis_span, self.basis_rows, of)

    def _borrowed(self, needed: Spans, held: Spans, of: int | None) -> Iterator[Transfer]:
        """What every sharer needs and another holds."""
        parts = {keeper: held(keeper) for keeper in self.by_rank}
        for holder in self.by_rank:
            span = needed(holder)
            for keeper in parts if of in (None, holder) else (of,):
                entries = common(span, parts[keeper])
                if keeper != holder and len(entries):
                    yield Transfer(holder, keeper, entries)

    def _lent(self, needed: Spans, held: Spans) -> tuple[dict[int, int], dict[int, int]]:
        """Entries that every sharer borrows, and that it lends: those of `_borrowed`, counted without naming them."""
        spans = {holder: needed(holder) for holder in self.by_rank}
        own = {holder: len(common(span, held(holder))) for holder, span in spans.items()}
        alike = Counter(spans.values())
        lent = {k: sum(n * len(common(span, held(k))) for span, n in alike.items()) - own[k] for k in spans}
        return {holder: len(span) - own[holder] for holder, span in spans.items()}, lent

    def basis_rows(self, dp_rank: int) -> range:
        """The rows of P that a sharer holds, the lean way: on the left those of its fragment's rows.

        On the right every sharer multiplies rows of G with all of P. Unless the rows of P are spread, the copies cost
        n x r for each sharer beyond one.
        """
        if self.side == "left":
            return self.touched_rows(dp_rank)
        return self._even_share(dp_rank, self.shape[1]) if self.spread else range(self.shape[1])

    def basis_span(self, dp_rank: int) -> range:
        """The rows of P that a sharer's step needs."""
        if self.side == "right" and self.spread:
            return column_span(self.by_rank[dp_rank])
        return self.basis_rows(dp_rank)

    def basis_shape(self, dp_rank: int) -> tuple[int, int]:
        """Shape of the part of P that a sharer holds, the lean way."""
        return len(self.basis_rows(dp_rank)), self.rank

    def touched_rows(self, dp_rank: int) -> range:
        """The rows of the matrix that a sharer's fragment touches."""
        return touched_rows(self.by_rank[dp_rank])

    def state_numel(self, dp_rank: int) -> int:
        """Elements of basis, moments and limiter's norm that a rank holds; 0 for one that holds none of them."""
        if self.way == "base":
            return state_numel(self.shape, self.rank, self.side) if dp_rank == self.owner else 0
        if dp_rank not in self.by_rank:
            return 0
        rows, r = self.basis_shape(dp_rank)
        return rows * r + 2 * len(self.kept(dp_rank)) * r + 1

    def step_numel(self) -> int:
        """Elements that a step of the lean way needs beyond the state, on the sharer that needs most: R, borrowed P."""
        borrows = self.spread and self.side == "right"
        return self.rank * max(
            len(self.region(holder)) + borrows * len(self.basis_span(holder)) for holder, _ in self.fragments
        )

    def base_elements(self, dp_rank: int) -> int:
        """Elements that a rank sends in one step of the base way."""
        if dp_rank == self.owner:
            return sum(fragment.numel for holder, fragment in self.fragments if holder != dp_rank)
        return 2 * self.by_rank[dp_rank].numel if dp_rank in self.by_rank else 0

    def lean_elements(self, dp_rank: int) -> int:
        """Float32 elements that a rank, sharer or not, sends in one step of the lean way without a refresh."""
        return self._lean_elements.get(dp_rank, 0) + 2 * (GRADIENT_SUMS + LOW_RANK_SUMS)

    @cached_property
    def _lean_elements(self) -> dict[int, int]:
        """Elements that every sharer sends to others in a step of the lean way."""
        sent = dict.fromkeys(self.by_rank, 0)
        if self.side == "left":
            borrowed, lent = self._lent(self.touched, self.kept)
            sent = {holder: (borrowed[holder] + lent[holder]) * (self.rank + 1) for holder in sent}
        else:
            for link in self.links():
                for end in (link.borrower, link.keeper):
                    sent[end] += len(link.entries) * (self.rank + 1)
            if self.spread:
                _, lent = self._lent(self.basis_span, self.basis_rows)
                sent = {holder: numel + lent[holder] * self.rank for holder, numel in sent.items()}
        return sent

    def refresh_elements(self, dp_rank: int, settings: GroupSettings) -> int:
        """Elements that a rank sends in one refresh of the lean way: gradients to the owner, the basis back.

        Args:
            dp_rank: the rank.
            settings: of the param group.
        """
        if dp_rank == self.owner:
            return sum(self.answer_numel(holder, settings) for holder, _ in self.fragments if holder != dp_rank)
        if dp_rank not in self.by_rank:
            return 0
        old = needs_old_basis(settings) and (self.spread or self.side == "left")
        return self.by_rank[dp_rank].numel + old * len(self.basis_rows(dp_rank)) * self.rank

    def answer_numel(self, dp_rank: int, settings: GroupSettings) -> int:
        """Elements of what the owner sends another sharer at a refresh.

        Whether there is a basis, the part of it that the sharer holds, and, where that is not enough to bring moments
        over, C of `ds_fira.core.basis.basis_change`.
        """
        rows, r = self.basis_shape(dp_rank)
        return 1 + rows * r + r * r * self.sends_change(settings)

    def sends_change(self, settings: GroupSettings) -> bool:
        """Whether sharers that keep moments have no whole bases to bring them over with."""
        return self.spread and settings.refresh_moments == "rotate"

    def cheaper_way(self, ranks: int, settings: GroupSettings) -> Way:
        """The way that sends fewer elements per step over all ranks, refreshes spread over the steps between them.

        Args:
            ranks: data-parallel ranks; all take part in the sums.
            settings: of the param group; `exact_cuts` leaves only the base way.
        """
        if settings.exact_cuts:
            return "base"
        base = sum(self.base_elements(rank) for rank in range(ranks))
        lean = sum(self.lean_elements(rank) for rank in range(ranks))
        refresh = sum(self.refresh_elements(rank, settings) for rank in range(ranks))
        return "lean" if lean + refresh / settings.update_proj_gap < base else "base"


def needs_old_basis(settings: GroupSettings) -> bool:
    """Whether a refresh reads the basis it replaces: to start from, to align signs with, or to rotate moments from."""
    return settings.subspace != "svd" or settings.refresh_moments == "rotate"


def plan_split(
    fragments: Mapping[int, MatrixShard], owner: int, ranks: int, settings: GroupSettings, spread: bool = False
) -> SplitMatrix:
    """The cut matrix of given fragments and owner, in the way that sends less.

    Args:
        fragments: by dp_rank in ascending order.
        owner: one of them.
        ranks: data-parallel ranks.
        settings: of the param group.
        spread: as in `SplitMatrix`.
    """
    first = next(iter(fragments.values()))
    side = projection_side(first.shape, settings.proj_type, settings.formulation)
    r = effective_rank(first.shape, settings.rank)
    matrix = SplitMatrix(first.name, first.shape, tuple(fragments.items()), owner, side, r, spread=spread)
    return replace(matrix, way=matrix.cheaper_way(ranks, settings))
