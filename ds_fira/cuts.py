"""A matrix that partition boundaries cut: who holds what of it, and what a step sends, in either of two ways.

*Base*: every sharer sends its fragments of gradient and weight to the owner, which steps the whole matrix and sends the
weights back. Equal to the bit to a matrix that is not cut.

*Lean*: every sharer keeps the part of the basis that its fragment needs, and between refreshes only low-rank data
crosses ranks. R has an *axis* along which it can be taken apart: its columns on the left, where R = P'G sums over rows,
and its rows on the right, where each row of R = GP belongs to one row of G. The entries along the axis are *kept*, with
their moments, by one sharer: on the left all of them by the owner, on the right each by the sharer that holds the
beginning of its row. A sharer that touches an entry which another keeps *borrows* it: it sends its part of R and of the
squared norm, and gets the step's phi and C for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ds_fira.pieces import RowPiece, column_span, kept_rows, row_pieces, touched_rows
from ds_fira.shard import MatrixShard
from ds_fira.subspace import Side, basis_shape, effective_rank, low_rank_shape, projection_side

Way = Literal["base", "lean"]
# float64 sums of a lean matrix that all ranks add up in a step: |G|^2 and whether a refresh is due; then |R|^2 and two
# that depend on the scaling. Each counts as two float32 elements.
GRADIENT_SUMS = 2
LOW_RANK_SUMS = 3


def state_numel(shape: tuple[int, int], rank: int, proj_type: str = "std", formulation: str = "released") -> int:
    """Elements of optimizer state of one projected matrix, the paper's mr + 2nr + 1 (Table 1).

    Counts the basis, the two moments and the limiter's norm.
    """
    side = projection_side(shape, proj_type, formulation)
    rows, r = basis_shape(shape, rank, side)
    a, b = low_rank_shape(shape, rank, side)
    return rows * r + 2 * a * b + 1


@dataclass(frozen=True, slots=True)
class Link:
    """Entries of R along its axis that one sharer borrows of another.

    Attributes:
        borrower: the dp_rank that touches them.
        keeper: the dp_rank that keeps them.
        entries: columns of R on the left, rows on the right.
    """

    borrower: int
    keeper: int
    entries: range


@dataclass(frozen=True, slots=True)
class CutMatrix:
    """A matrix that partition boundaries cut, with its owner.

    Attributes:
        name: as in `MatrixShard`.
        shape: (m, n).
        fragments: (dp_rank, fragment) in ascending order of rank; the fragments tile the matrix.
        owner: the base way: the dp_rank that holds the state and makes the step. The lean way: the one that computes
            the basis, and on the left keeps R and its moments.
        side: the projected side.
        rank: r = min(rank asked for, m, n).
        way: how it is stepped.
    """

    name: str
    shape: tuple[int, int]
    fragments: tuple[tuple[int, MatrixShard], ...]
    owner: int
    side: Side
    rank: int
    way: Way = "base"

    def kept(self, dp_rank: int) -> range:
        """The entries of R that a sharer keeps, the lean way."""
        if self.side == "left":
            return range(self.shape[1] if dp_rank == self.owner else 0)
        return kept_rows(dict(self.fragments)[dp_rank])

    def touched(self, dp_rank: int) -> range:
        """The entries of R that a sharer's fragment needs, the lean way."""
        fragment = dict(self.fragments)[dp_rank]
        return column_span(fragment) if self.side == "left" else touched_rows(fragment)

    def links(self) -> list[Link]:
        """What is borrowed, in ascending order of borrower; no sharer borrows twice."""
        if self.side == "left":
            return [
                Link(holder, self.owner, self.touched(holder)) for holder, _ in self.fragments if holder != self.owner
            ]
        keeper, found = -1, []
        for holder, fragment in self.fragments:
            row = fragment.start // self.shape[1]
            if fragment.start % self.shape[1]:
                found.append(Link(holder, keeper, range(row, row + 1)))
            if len(kept_rows(fragment)):
                keeper = holder  # of the row that the next fragment may begin in
        return found

    def basis_shape(self, dp_rank: int) -> tuple[int, int]:
        """Shape of the part of P that a sharer holds, the lean way: its fragment's rows on the left, all on the right.

        On the right every sharer multiplies rows of G with all of P, so the copies cost n x r for each beyond one.
        """
        rows = len(self.touched_rows(dp_rank)) if self.side == "left" else self.shape[1]
        return rows, self.rank

    def touched_rows(self, dp_rank: int) -> range:
        """The rows of the matrix that a sharer's fragment touches."""
        return touched_rows(dict(self.fragments)[dp_rank])

    def state_numel(self, dp_rank: int) -> int:
        """Elements of basis, moments and limiter's norm that a rank holds; 0 for one that holds none of them."""
        if self.way == "base":
            return state_numel(self.shape, self.rank, self.side) if dp_rank == self.owner else 0
        if dp_rank not in dict(self.fragments):
            return 0
        rows, r = self.basis_shape(dp_rank)
        return rows * r + 2 * len(self.kept(dp_rank)) * r + 1

    def base_elements(self, dp_rank: int) -> int:
        """Elements that a rank sends in one step of the base way."""
        lent = {holder: fragment.numel for holder, fragment in self.fragments if holder != self.owner}
        return sum(lent.values()) if dp_rank == self.owner else 2 * lent.get(dp_rank, 0)

    def lean_elements(self, dp_rank: int) -> int:
        """Float32 elements that a rank, sharer or not, sends in one step of the lean way without a refresh."""
        borrowed = sum(len(link.entries) for link in self.links() if dp_rank in (link.borrower, link.keeper))
        return borrowed * (self.rank + 1) + 2 * (GRADIENT_SUMS + LOW_RANK_SUMS)

    def refresh_elements(self, dp_rank: int, settings: Mapping[str, Any]) -> int:
        """Elements that a rank sends in one refresh of the lean way: gradients to the owner, the basis back.

        Args:
            dp_rank: the rank.
            settings: of the param group.
        """
        others = [(holder, fragment) for holder, fragment in self.fragments if holder != self.owner]
        if dp_rank == self.owner:
            return sum(1 + rows * r for rows, r in (self.basis_shape(holder) for holder, _ in others))
        old = self.side == "left" and needs_old_basis(settings)
        return sum(
            fragment.numel + (old * len(self.touched_rows(holder)) * self.rank)
            for holder, fragment in others
            if holder == dp_rank
        )

    def cheaper_way(self, ranks: int, settings: Mapping[str, Any]) -> Way:
        """The way that sends fewer elements per step over all ranks, refreshes spread over the steps between them.

        Args:
            ranks: data-parallel ranks; all take part in the sums.
            settings: of the param group; `exact_cuts` leaves only the base way.
        """
        if settings["exact_cuts"]:
            return "base"
        base = sum(self.base_elements(rank) for rank in range(ranks))
        lean = sum(self.lean_elements(rank) for rank in range(ranks))
        refresh = sum(self.refresh_elements(rank, settings) for rank in range(ranks))
        return "lean" if lean + refresh / settings["update_proj_gap"] < base else "base"


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has to do with a lean matrix, as the plan says.

    Attributes:
        matrix: the cut matrix.
        position: its number among the cuts of its group; marks its states and messages.
        number: its number in the model; `stagger` goes by it.
        dp_rank: the rank.
        fragment: what the rank holds of it.
        pieces: the fragment in blocks of rows.
        region: the entries of R that the rank works on.
        kept: those of them that it keeps, with their moments.
        borrowed: those that it borrows, None for none.
        lent: those that others borrow of it.
    """

    matrix: CutMatrix
    position: int
    number: int
    dp_rank: int
    fragment: MatrixShard
    pieces: tuple[RowPiece, ...]
    region: range
    kept: range
    borrowed: Link | None
    lent: tuple[Link, ...]

    @classmethod
    def of(cls, matrix: CutMatrix, position: int, number: int, dp_rank: int) -> Share:
        """The share of a rank that holds a fragment of the matrix."""
        fragment, kept, links = dict(matrix.fragments)[dp_rank], matrix.kept(dp_rank), matrix.links()
        return cls(
            matrix=matrix,
            position=position,
            number=number,
            dp_rank=dp_rank,
            fragment=fragment,
            pieces=row_pieces(fragment),
            region=kept if matrix.side == "left" and len(kept) else matrix.touched(dp_rank),
            kept=kept,
            borrowed=next((link for link in links if link.borrower == dp_rank), None),
            lent=tuple(link for link in links if link.keeper == dp_rank),
        )

    @property
    def owns(self) -> bool:
        """Whether this rank computes the basis, and counts the matrix in the metrics."""
        return self.dp_rank == self.matrix.owner

    @property
    def low_rank_shape(self) -> tuple[int, int] | None:
        """Shape of the moments that the rank keeps, None for none."""
        kept, r = len(self.kept), self.matrix.rank
        if not kept:
            return None
        return (r, kept) if self.matrix.side == "left" else (kept, r)


def needs_old_basis(settings: Mapping[str, Any]) -> bool:
    """Whether a refresh reads the basis it replaces: to start from, to align signs with, or to rotate moments from."""
    return settings["subspace"] != "svd" or settings["refresh_moments"] == "rotate"


def plan_cut(fragments: Mapping[int, MatrixShard], owner: int, ranks: int, settings: Mapping[str, Any]) -> CutMatrix:
    """The cut matrix of given fragments and owner, in the way that sends less.

    Args:
        fragments: by dp_rank in ascending order.
        owner: one of them.
        ranks: data-parallel ranks.
        settings: of the param group.
    """
    first = next(iter(fragments.values()))
    side = projection_side(first.shape, settings["proj_type"], settings["formulation"])
    r = effective_rank(first.shape, settings["rank"])
    parts = tuple(fragments.items())
    way = CutMatrix(first.name, first.shape, parts, owner, side, r).cheaper_way(ranks, settings)
    return CutMatrix(first.name, first.shape, parts, owner, side, r, way)
