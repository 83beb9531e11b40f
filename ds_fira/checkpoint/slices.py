"""Where the elements of each parameter lie: a saved state carries this description, and other ranks load by it.

A rank's share of a run is a number of tensors that the optimizer steps, each with its state. Their geometry depends on
the number of ranks, the ZeRO stage and the param groups. What it is geometry *of* does not: parameters, by name, and
their matrices. A `Piece` says which elements of a parameter a stepped tensor holds, a `StateSlice` which part of a
matrix's low-rank state. Both go into the checkpoint as plain lists, so that it can be read with `weights_only=True`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import positions
from ds_fira.core.subspace import Side, basis_shape, effective_rank, low_rank_shape
from ds_fira.sharding.local_matrices import LocalMatrices
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of one parameter in a tensor that the optimizer steps.

    Attributes:
        name: of the parameter in the module.
        offset: the index in the tensor at which they begin.
        start: the first of them among the parameter's elements, in row-major order.
        stop: one past the last.
    """

    name: str
    offset: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StateSlice:
    """Where a rank keeps the state of one matrix, or of its part of a cut one.

    Attributes:
        name: of the matrix.
        shape: (m, n).
        side: the projected side.
        rank: r.
        mark: what the keys of its states end in.
        row: its index in the leading dimension of the states; None where they have none.
        basis: the rows of P held.
        kept: the entries of R, columns on the left and rows on the right, whose moments are held.
    """

    name: str
    shape: tuple[int, int]
    side: Side
    rank: int
    mark: str
    row: int | None
    basis: range
    kept: range

    @property
    def index(self) -> Any:
        """What takes the matrix's part out of a state tensor."""
        return ... if self.row is None else self.row

    @property
    def axis(self) -> int:
        """The dimension of the moments that `kept` counts."""
        return 1 if self.side == "left" else 0

    @property
    def rows(self) -> int:
        """Rows of the whole P."""
        return self.shape[0 if self.side == "left" else 1]

    @property
    def entries(self) -> int:
        """Entries of the whole R along its axis."""
        return self.shape[1 if self.side == "left" else 0]

    def to_plain(self) -> list[Any]:
        """As numbers, strings and lists."""
        ranges = [self.basis.start, self.basis.stop, self.kept.start, self.kept.stop]
        return [self.name, list(self.shape), self.side, self.rank, self.mark, self.row, *ranges]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> StateSlice:
        """The reverse of `to_plain`."""
        name, shape, side, rank, mark, row, *bounds = plain
        return cls(name, tuple(shape), side, rank, mark, row, range(*bounds[:2]), range(*bounds[2:]))


def state_slices(matrices: LocalMatrices, settings: GroupSettings, prefix: str = "") -> list[StateSlice]:
    """Where a rank keeps the states of the matrices of one stepped tensor.

    Args:
        matrices: of the tensor.
        settings: of its param group.
        prefix: put before the names of matrices; the parameter's name where they do not know it.
    """
    owned = [matrix for exchange in matrices.exchanges for matrix in exchange.owned]
    slices = []
    for matrix, (mark, row) in zip((*matrices.whole, *owned), positions(matrices.shapes), strict=True):
        side = settings.side_of(matrix.shape)
        rows = basis_shape(matrix.shape, settings.rank, side)[0]
        entries = low_rank_shape(matrix.shape, settings.rank, side)[1 if side == "left" else 0]
        slices.append(
            StateSlice(
                prefix + matrix.name,
                matrix.shape,
                side,
                effective_rank(matrix.shape, settings.rank),
                mark,
                row if matrices.batched else None,
                range(rows),
                range(entries),
            )
        )
    plans = matrices.low_rank.plans if matrices.low_rank is not None else ()
    return slices + [_split_slice(plan) for plan in plans]


def _split_slice(plan: LocalShardPlan) -> StateSlice:
    matrix = plan.matrix
    mark, rows = f".cut{plan.position}", matrix.basis_rows(plan.dp_rank)
    return StateSlice(matrix.name, matrix.shape, matrix.side, matrix.rank, mark, None, rows, plan.kept)


def overlap(first: range, second: range) -> range:
    """What two ranges have in common; empty where they have nothing."""
    start = max(first.start, second.start)
    return range(start, max(start, min(first.stop, second.stop)))


class Missing:
    """Which elements of a range have not been found yet.

    Attributes:
        ranges: of those, in order, none of them empty.
    """

    def __init__(self, wanted: range) -> None:
        self.ranges = [wanted] if len(wanted) else []

    def take(self, found: range) -> list[range]:
        """The part of a range that was missing until now; it is marked as found."""
        taken: list[range] = []
        left: list[range] = []
        for part in self.ranges:
            common = overlap(part, found)
            if len(common):
                taken.append(common)
                sides = (range(part.start, common.start), range(common.stop, part.stop))
                left += [side for side in sides if len(side)]
            else:
                left.append(part)
        self.ranges = left
        return taken
