"""Which entries of R and rows of P the sharers of a split matrix touch, keep and borrow; `split_matrix` has the ways.

An *entry* is a column of R on the left, where R = P'G sums over the rows of G, and a row of R on the right, where row i
of R = GP needs row i of G alone.

    G, 5 x 4: the digit is       R = GP, on the right:
    the rank that holds it       touched by   kept by
      row 0   0 0 0 0                 0          0
      row 1   0 0 1 1               0, 1         0        rank 1 borrows entry 1, rank 0 lends it
      row 2   1 1 1 1                 1          1
      row 3   1 1 2 2               1, 2         1        rank 2 borrows entry 3, rank 1 lends it
      row 4   2 2 2 2                 2          2

    touched    the entries that a sharer's fragment contributes to
    kept       the entries that a sharer sums up, with their moments; one sharer keeps each: on the right the one that
               holds the beginning of the row, on the left the owner all of them
    borrowed   the entries that one sharer touches and another keeps: the borrower sends its part of R and of the
               squared norm; the keeper, which *lends* the entry, sends back phi and what the update needs
    region     the entries that a sharer works on: the touched and the kept

*Evenly sharded*, under ZeRO-3, which splits every matrix over all ranks, and under tensor parallelism, which slices it:
no state exists twice. On the left all sharers keep equally many columns of R. On the right they hold equally many rows
of P, and borrow the others for every step; else every sharer has a copy of P.

*Sliced by columns*, under tensor parallelism: each rank has some columns of all rows, and ZeRO may split such a slice
once more. Then what belongs to a column, an entry of R on the left and a row of P on the right, lies with the sharers
of its slice, equally many with each; and what belongs to a row, a row of P on the left and an entry of R on the right,
lies equally over all sharers, which borrow the others. A sharer that has a slice alone borrows nothing of its columns.

Letters: G is m x n, r = min(rank, m, n), P has m (left) or n (right) rows. Ranges are half-open.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from ds_fira.core.subspace import Side
from ds_fira.sharding.geometry import EvenCut, MatrixShard
from ds_fira.sharding.row_blocks import Transfer, common, even_share, hull, kept_rows, touched_columns, touched_rows

# By sharer, entries of R or rows of P.
Spans = Callable[[int], range]
# Stands for the owner where nothing goes by it.
NOBODY = -1


class ListedCut(dict[int, MatrixShard]):
    """Fragments by dp_rank that no formula gives, as a key of a cache."""

    def __hash__(self) -> int:
        return hash(tuple(self))


@dataclass(frozen=True, slots=True)
class SharedEntries:
    """Who has what of a split matrix that is stepped the low-rank way.

    Attributes:
        name: as in `MatrixShard`.
        shape: (m, n).
        cut: the fragments by dp_rank, which tile the matrix: in the order of its elements, or slice by slice of its
            columns.
        owner: gathered: the dp_rank that holds the state and makes the step. Low-rank: the one that computes the basis,
            and on the left, unless evenly sharded, keeps R and its moments.
        side: the projected side.
        rank: r = min(rank asked for, m, n).
        evenly_sharded: whether the low-rank way keeps no state twice, and the same share of it on every sharer.
        draws_basis: whether sharers draw the rows of P that they work with, and hold none.
        sharers: the ranks that hold a fragment, in the order of the fragments; a range where they are consecutive, as
            ZeRO's are: of many ranks no one is then searched.
    """

    name: str
    shape: tuple[int, int]
    cut: Mapping[int, MatrixShard]
    owner: int
    side: Side
    rank: int
    evenly_sharded: bool = False
    draws_basis: bool = False
    sharers: Sequence[int] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Note the sharers once, and see that the cut can be a key."""
        if isinstance(self.cut, EvenCut):
            found = self.cut.ranks
        else:
            listed = tuple(self.cut)
            following = range(listed[0], listed[0] + len(listed))
            found = following if tuple(following) == listed else listed
            object.__setattr__(self, "cut", ListedCut(self.cut))
        object.__setattr__(self, "sharers", found)

    @property
    def fragments(self) -> ItemsView[int, MatrixShard]:
        """(dp_rank, fragment) of all sharers."""
        return self.cut.items()

    @property
    def bounds(self) -> tuple[int, int]:
        """The first and the last of the sharers by number."""
        if isinstance(self.sharers, range):
            return self.sharers[0], self.sharers[-1]
        return min(self.sharers), max(self.sharers)

    @property
    def sliced_by_columns(self) -> bool:
        """Whether the fragments are of slices of some columns."""
        return self.cut[self.sharers[0]].columns is not None

    def fragment(self, dp_rank: int) -> MatrixShard:
        """What a sharer holds of the matrix."""
        return self.cut[dp_rank]

    def touched(self, dp_rank: int) -> range:
        """The entries of R that a sharer's fragment contributes to."""
        fragment = self.fragment(dp_rank)
        return touched_columns(fragment) if self.side == "left" else touched_rows(fragment)

    def kept(self, dp_rank: int) -> range:
        """The entries of R that a sharer sums up, and whose moments it has."""
        if self.side == "right":
            return self._share_of_rows(dp_rank) if self.sliced_by_columns else kept_rows(self.fragment(dp_rank))
        if self.evenly_sharded:
            return self._share_of_columns(dp_rank)
        return range(self.shape[1] if dp_rank == self.owner else 0)

    def region(self, dp_rank: int) -> range:
        """The entries of R that a sharer works on: the touched and the kept."""
        return hull(self.touched(dp_rank), self.kept(dp_rank))

    def basis_rows(self, dp_rank: int) -> range:
        """The rows of P that a sharer holds: on the left its fragment's rows, on the right all or an equal share.

        Of a matrix that is sliced by columns an equal share on both sides.
        """
        if self.draws_basis:
            return range(0)
        if self.side == "left":
            return self._share_of_rows(dp_rank) if self.sliced_by_columns else touched_rows(self.fragment(dp_rank))
        return self._share_of_columns(dp_rank) if self.evenly_sharded else range(self.shape[1])

    def basis_span(self, dp_rank: int) -> range:
        """The rows of P that a sharer's step needs."""
        if not self.spans_basis:
            return self.basis_rows(dp_rank)
        return (touched_rows if self.side == "left" else touched_columns)(self.fragment(dp_rank))

    def basis_shape(self, dp_rank: int) -> tuple[int, int]:
        """Shape of the part of P that a sharer holds in the low-rank way."""
        return len(self.basis_rows(dp_rank)), self.rank

    @property
    def shares_basis(self) -> bool:
        """Whether sharers borrow rows of P for every step."""
        return self.evenly_sharded and not self.draws_basis and (self.side == "right" or self.sliced_by_columns)

    @property
    def spans_basis(self) -> bool:
        """Whether a step needs rows of P that its sharer does not hold: borrowed ones, or drawn ones."""
        return self.shares_basis or self.draws_basis

    def _share_of_columns(self, dp_rank: int) -> range:
        """Of the entries, or rows of P, that belong to columns those of one sharer: of its slice, or of all."""
        span = self.fragment(dp_rank).span
        if not self.sliced_by_columns:
            return even_share(span, self.sharers, dp_rank)
        return even_share(span, [holder for holder, fragment in self.fragments if fragment.span == span], dp_rank)

    def _share_of_rows(self, dp_rank: int) -> range:
        """Of the entries, or rows of P, that belong to rows those of one sharer."""
        return even_share(range(self.shape[0]), self.sharers, dp_rank)

    def transfers(self, of: int | None = None) -> Sequence[Transfer]:
        """The entries of R that are borrowed, or those that one sharer borrows or lends; by borrower, by keeper."""
        return _transfers(self.alike, of)

    def basis_transfers(self, of: int | None = None) -> Sequence[Transfer]:
        """The rows of P that are borrowed for every step, as `transfers`."""
        return _basis_transfers(self.alike, of) if self.shares_basis else ()

    def borrowed_and_lent(self, of: int) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
        """Of `transfers` those in which a sharer borrows, and those in which it lends."""
        return _by_direction(self.alike, of, False)

    def basis_borrowed_and_lent(self, of: int) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
        """The same of `basis_transfers`."""
        return _by_direction(self.alike, of, True)

    def _find_transfers(self, needed: Spans, held: Spans, of: int | None) -> Iterator[Transfer]:
        parts = {keeper: held(keeper) for keeper in self.sharers}
        for borrower in self.sharers:
            span = needed(borrower)
            for keeper in parts if of in (None, borrower) else (of,):
                entries = common(span, parts[keeper])
                if keeper != borrower and len(entries):
                    yield Transfer(borrower, keeper, entries)

    def _borrowed(self, needed: Spans, held: Spans) -> int:
        # Transfers counted without naming them: their number grows with the square of the ranks.
        spans = ((needed(sharer), held(sharer)) for sharer in self.sharers)
        return sum(len(span) - len(common(span, own)) for span, own in spans)

    def low_rank_numel(self, dp_rank: int) -> int:
        """Elements of basis, moments and limiter's norm that a sharer holds in the low-rank way."""
        return self.rank * (len(self.basis_rows(dp_rank)) + 2 * len(self.kept(dp_rank))) + 1

    @property
    def sums(self) -> EntrySums:
        """What the sharers have together."""
        return _sums(self.alike)

    @property
    def alike(self) -> SharedEntries:
        """One that is equal for all matrices of which the sharers have the same entries, so that each is found once."""
        cut = self.cut.unnamed if isinstance(self.cut, EvenCut) else self.cut
        owner = self.owner if self.side == "left" and not self.evenly_sharded else NOBODY
        own = (self.side, self.rank, self.evenly_sharded, self.draws_basis)
        return SharedEntries("", self.shape, cut, owner, *own)


class EntrySums(NamedTuple):
    """Sums over the sharers of a matrix that is stepped the low-rank way.

    Attributes:
        borrowed_entries: entries of R that are borrowed.
        borrowed_basis_rows: rows of P that are borrowed for every step.
        basis_rows: rows of P that are held, those held twice counted twice.
        step_numel: elements of R, and of borrowed or drawn P, that a step needs beside the state, on the sharer that
            needs most.
        state_numel: by place among the sharers, elements of basis, moments and limiter's norm.
    """

    borrowed_entries: int
    borrowed_basis_rows: int
    basis_rows: int
    step_numel: int
    state_numel: tuple[int, ...]


@lru_cache(maxsize=1024)
def _sums(matrix: SharedEntries) -> EntrySums:
    touched, kept = matrix.touched, matrix.kept
    spans = matrix.spans_basis
    return EntrySums(
        matrix._borrowed(touched, kept),
        matrix._borrowed(matrix.basis_span, matrix.basis_rows) if matrix.shares_basis else 0,
        sum(len(matrix.basis_rows(sharer)) for sharer in matrix.sharers),
        matrix.rank * max(len(matrix.region(k)) + spans * len(matrix.basis_span(k)) for k in matrix.sharers),
        tuple(matrix.low_rank_numel(sharer) for sharer in matrix.sharers),
    )


@lru_cache(maxsize=256)
def _transfers(matrix: SharedEntries, of: int | None) -> tuple[Transfer, ...]:
    return tuple(matrix._find_transfers(matrix.touched, matrix.kept, of))


@lru_cache(maxsize=256)
def _basis_transfers(matrix: SharedEntries, of: int | None) -> tuple[Transfer, ...]:
    return tuple(matrix._find_transfers(matrix.basis_span, matrix.basis_rows, of))


@lru_cache(maxsize=256)
def _by_direction(matrix: SharedEntries, of: int, of_basis: bool) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
    found = matrix.basis_transfers(of) if of_basis else matrix.transfers(of)
    return tuple(t for t in found if t.borrower == of), tuple(t for t in found if t.keeper == of)
