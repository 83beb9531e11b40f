"""A matrix that partition boundaries split: the rows each rank holds, what a step sends, and which way is cheaper.

The ranks that hold a fragment of the matrix are its *sharers*; one of them is its *owner*. A step goes one of two ways:

*Gathered*: every sharer sends its fragments of gradient and weight to the owner, which steps the whole matrix and sends
the new weights back. The result equals that of an unsplit matrix to the bit.

*Low-rank*: gradients and weights stay where they are. Between refreshes only low-rank data crosses ranks: entries of R,
with one number each. An *entry* is a column of R on the left, where R = P'G sums over the rows of G, and a row of R on
the right, where row i of R = GP needs row i of G alone.

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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ds_fira.core.settings import GroupSettings
from ds_fira.core.subspace import Side, effective_rank, projection_side
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.projection import state_numel
from ds_fira.sharding.row_blocks import Transfer, common, even_share, hull, kept_rows, touched_columns, touched_rows

Way = Literal["gathered", "low_rank"]
# By sharer, entries of R or rows of P.
Spans = Callable[[int], range]
# float64 sums over all ranks in a low-rank step: |G|^2 and whether a refresh is due, or kept rows of P are no longer
# true; then |R|^2 and two that depend on the scaling. Each counts as two float32 elements.
GRADIENT_SUMS = 2
LOW_RANK_SUMS = 3
SUMS_NUMEL = 2 * (GRADIENT_SUMS + LOW_RANK_SUMS)
# The words in which version 0.1.0 named the ways.
FIRST_NAMES = {"gathered": "base", "low_rank": "lean"}


@dataclass(frozen=True, slots=True)
class SplitMatrix:
    """A matrix that partition boundaries split, with its owner.

    Attributes:
        name: as in `MatrixShard`.
        shape: (m, n).
        fragments: (dp_rank, fragment), which tile the matrix: in the order of its elements, or slice by slice of its
            columns.
        owner: gathered: the dp_rank that holds the state and makes the step. Low-rank: the one that computes the basis,
            and on the left, unless evenly sharded, keeps R and its moments.
        side: the projected side.
        rank: r = min(rank asked for, m, n).
        way: how it is stepped.
        evenly_sharded: whether the low-rank way keeps no state twice, and the same share of it on every sharer.
        draws_basis: whether sharers draw the rows of P that they work with, and hold none.
    """

    name: str
    shape: tuple[int, int]
    fragments: tuple[tuple[int, MatrixShard], ...]
    owner: int
    side: Side
    rank: int
    way: Way = "gathered"
    evenly_sharded: bool = False
    draws_basis: bool = False
    _consecutive: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Note once whether the sharers are consecutive ranks, as ZeRO's are: of many ranks no one is then searched."""
        first = self.fragments[0][0]
        consecutive = all(holder == first + place for place, (holder, _) in enumerate(self.fragments))
        object.__setattr__(self, "_consecutive", consecutive)

    def __repr__(self) -> str:
        """What the hash of a plan is made of: as version 0.1.0 wrote it, for its checkpoints hold such hashes."""
        return (
            f"CutMatrix(name={self.name!r}, shape={self.shape}, fragments={self.fragments}, owner={self.owner}, "
            f"side={self.side!r}, rank={self.rank}, way={FIRST_NAMES[self.way]!r}, spread={self.evenly_sharded})"
        )

    @property
    def sharers(self) -> Sequence[int]:
        """The ranks that hold a fragment, in the order of the fragments."""
        if self._consecutive:
            return range(self.fragments[0][0], self.fragments[-1][0] + 1)
        return tuple(holder for holder, _ in self.fragments)

    @property
    def sliced_by_columns(self) -> bool:
        """Whether the fragments are of slices of some columns."""
        return self.fragments[0][1].columns is not None

    def fragment(self, dp_rank: int) -> MatrixShard:
        """What a sharer holds of the matrix."""
        return self.fragments[self.sharers.index(dp_rank)][1]

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
        if not (self.shares_basis or self.draws_basis):
            return self.basis_rows(dp_rank)
        return (touched_rows if self.side == "left" else touched_columns)(self.fragment(dp_rank))

    def basis_shape(self, dp_rank: int) -> tuple[int, int]:
        """Shape of the part of P that a sharer holds in the low-rank way."""
        return len(self.basis_rows(dp_rank)), self.rank

    @property
    def shares_basis(self) -> bool:
        """Whether sharers borrow rows of P for every step."""
        return self.evenly_sharded and not self.draws_basis and (self.side == "right" or self.sliced_by_columns)

    def _share_of_columns(self, dp_rank: int) -> range:
        """Of the entries, or rows of P, that belong to columns those of one sharer: of its slice, or of all."""
        span = self.fragment(dp_rank).span
        if not self.sliced_by_columns:
            return even_share(span, self.sharers, dp_rank)
        return even_share(span, [holder for holder, fragment in self.fragments if fragment.span == span], dp_rank)

    def _share_of_rows(self, dp_rank: int) -> range:
        """Of the entries, or rows of P, that belong to rows those of one sharer."""
        return even_share(range(self.shape[0]), self.sharers, dp_rank)

    def transfers(self, of: int | None = None) -> Iterator[Transfer]:
        """The entries of R that are borrowed, or those that one sharer borrows or lends; by borrower, by keeper."""
        return self._transfers(self.touched, self.kept, of)

    def basis_transfers(self, of: int | None = None) -> Iterator[Transfer]:
        """The rows of P that are borrowed for every step, as `transfers`."""
        return self._transfers(self.basis_span, self.basis_rows, of) if self.shares_basis else iter(())

    def _transfers(self, needed: Spans, held: Spans, of: int | None) -> Iterator[Transfer]:
        parts = {keeper: held(keeper) for keeper in self.sharers}
        for borrower in self.sharers:
            span = needed(borrower)
            for keeper in parts if of in (None, borrower) else (of,):
                entries = common(span, parts[keeper])
                if keeper != borrower and len(entries):
                    yield Transfer(borrower, keeper, entries)

    @property
    def borrowed_entries(self) -> int:
        """Entries of R that are borrowed, over all sharers."""
        return self._borrowed(self.touched, self.kept)

    @property
    def borrowed_basis_rows(self) -> int:
        """Rows of P that are borrowed for every step, over all sharers."""
        return self._borrowed(self.basis_span, self.basis_rows) if self.shares_basis else 0

    def _borrowed(self, needed: Spans, held: Spans) -> int:
        # Transfers counted without naming them: their number grows with the square of the ranks.
        spans = ((needed(sharer), held(sharer)) for sharer in self.sharers)
        return sum(len(span) - len(common(span, own)) for span, own in spans)

    def state_numel(self, dp_rank: int) -> int:
        """Elements of basis, moments and limiter's norm that a rank holds; 0 for one that holds none of them."""
        if self.way == "gathered":
            return (dp_rank == self.owner) * state_numel(self.shape, self.rank, self.side, drawn=self.draws_basis)
        if dp_rank not in self.sharers:
            return 0
        return self.rank * (len(self.basis_rows(dp_rank)) + 2 * len(self.kept(dp_rank))) + 1

    def step_numel(self) -> int:
        """Elements of R and borrowed P that a low-rank step needs beside the state, on the sharer that needs most."""
        beside = self.shares_basis or self.draws_basis
        return self.rank * max(len(self.region(rank)) + beside * len(self.basis_span(rank)) for rank in self.sharers)

    def gathered_elements(self, dp_rank: int) -> int:
        """Elements that a rank sends in one gathered step: gradient and weight to the owner, weights back."""
        if dp_rank == self.owner:
            return sum(fragment.numel for holder, fragment in self.fragments if holder != dp_rank)
        return 2 * self.fragment(dp_rank).numel if dp_rank in self.sharers else 0

    def refresh_elements(self, dp_rank: int, settings: GroupSettings) -> int:
        """Elements that a rank sends in one low-rank refresh: gradients, and bases if needed, to the owner; P back."""
        if self.draws_basis or dp_rank not in self.sharers:
            return 0
        if dp_rank == self.owner:
            return sum(self.answer_numel(holder, settings) for holder in self.sharers if holder != dp_rank)
        bases = needs_old_basis(settings) and self.basis_is_split
        return self.fragment(dp_rank).numel + bases * len(self.basis_rows(dp_rank)) * self.rank

    @property
    def basis_is_split(self) -> bool:
        """Whether sharers hold different rows of P."""
        return self.evenly_sharded or self.side == "left"

    def answer_numel(self, dp_rank: int, settings: GroupSettings) -> int:
        """Elements that the owner sends another sharer at a refresh.

        Whether there is a new basis, 1; the rows of it that the sharer holds; and C of
        `ds_fira.core.basis.basis_change`, r x r, where those rows do not suffice to change the moments.
        """
        r = self.rank
        return 1 + len(self.basis_rows(dp_rank)) * r + r * r * self.sends_change(settings)

    def sends_change(self, settings: GroupSettings) -> bool:
        """Whether sharers that keep moments lack the whole bases to rotate them with."""
        return self.evenly_sharded and settings.refresh_moments == "rotate"

    def cheaper_way(self, ranks: int, settings: GroupSettings) -> Way:
        """The way that sends fewer elements per step over all ranks, with the cost of a refresh divided by the gap.

        An answer counts as C and phi whatever its form (`lowrank.answer_form`), so that a setting of the residual moves
        no matrix from one way to the other.

        Args:
            ranks: data-parallel ranks; all take part in the sums of a low-rank step.
            settings: of the param group; `exact_cuts` leaves only the gathered way.
        """
        if settings.exact_cuts:
            return "gathered"
        gathered = sum(map(self.gathered_elements, self.sharers))
        numbers = self.rank + settings.update_rank(self.rank) + 2
        borrowed = numbers * self.borrowed_entries + self.rank * self.borrowed_basis_rows
        low_rank = borrowed + ranks * SUMS_NUMEL
        refresh = sum(self.refresh_elements(rank, settings) for rank in self.sharers)
        return "low_rank" if low_rank + refresh / settings.update_proj_gap < gathered else "gathered"


def needs_old_basis(settings: GroupSettings) -> bool:
    """Whether a refresh reads the basis it replaces: to start from, to align signs with, or to rotate moments from."""
    return settings.subspace != "svd" or settings.refresh_moments == "rotate"


def plan_split(
    fragments: Mapping[int, MatrixShard], owner: int, ranks: int, settings: GroupSettings, evenly_sharded: bool = False
) -> SplitMatrix:
    """The split matrix of given fragments and owner, stepped in the way that sends less.

    Args:
        fragments: by dp_rank, in the order of `SplitMatrix.fragments`.
        owner: one of them.
        ranks: data-parallel ranks.
        settings: of the param group.
        evenly_sharded: as in `SplitMatrix`.
    """
    first = next(iter(fragments.values()))
    side = projection_side(first.shape, settings.proj_type, settings.formulation)
    r = effective_rank(first.shape, settings.rank)
    shards = tuple(fragments.items())
    drawn = settings.draws_basis
    matrix = SplitMatrix(first.name, first.shape, shards, owner, side, r, "gathered", evenly_sharded, drawn)
    return replace(matrix, way=matrix.cheaper_way(ranks, settings))
