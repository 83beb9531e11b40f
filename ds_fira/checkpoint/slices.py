"""Which part of a matrix's low-rank state a rank keeps: a saved state carries this, and other ranks load by it.

The tensors that the optimizer of a rank steps depend on the number of ranks, the ZeRO stage and the param groups.
Parameters and matrices, by name, do not. So a checkpoint says of each stepped tensor which elements of which parameters
it holds (`ds_fira.sharding.geometry.ParamSlice`), and which parts of the states of which matrices (`StateSlice`). Both
are saved as plain lists, which `torch.load` reads with `weights_only=True`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType

from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import positions
from ds_fira.core.subspace import Side, effective_rank, low_rank_shape
from ds_fira.sharding.local_matrices import LocalMatrices


@dataclass(frozen=True, slots=True)
class StateSlice:
    """Where a rank keeps the state of one matrix, or of its part of a matrix that is split over ranks.

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
    def index(self) -> int | EllipsisType:
        """What takes the matrix's part out of a state tensor."""
        return ... if self.row is None else self.row

    @property
    def param(self) -> str:
        """The parameter that the matrix is, or is one expert of."""
        return self.name.partition("[")[0]

    @property
    def element(self) -> int:
        """Its number among the experts of the parameter."""
        return int(self.name.partition("[")[2].removesuffix("]") or 0)

    @property
    def kept_shape(self) -> tuple[int, int]:
        """Of the columns or rows of the matrix whose entries of R are kept."""
        m, n = self.shape
        return (m, len(self.kept)) if self.side == "left" else (len(self.kept), n)

    @property
    def axis(self) -> int:
        """The dimension of the moments that `kept` counts."""
        return 1 if self.side == "left" else 0

    def to_plain(self) -> list[object]:
        """As numbers, strings and lists."""
        ranges = [self.basis.start, self.basis.stop, self.kept.start, self.kept.stop]
        return [self.name, list(self.shape), self.side, self.rank, self.mark, self.row, *ranges]

    @classmethod
    def from_plain(cls, plain: Sequence[object]) -> StateSlice:
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
    found = []
    for matrix, (mark, row) in zip((*matrices.unsplit, *owned), positions(matrices.shapes), strict=True):
        shape, rank, side = matrix.shape, settings.rank, settings.side_of(matrix.shape)
        basis = range(settings.basis_shape(shape)[0])
        kept = range(low_rank_shape(shape, rank, side)[1 if side == "left" else 0])
        row = row if matrices.batched else None
        found.append(StateSlice(prefix + matrix.name, shape, side, effective_rank(shape, rank), mark, row, basis, kept))
    for plan in matrices.low_rank.plans if matrices.low_rank is not None else ():
        matrix, mark = plan.matrix, f".cut{plan.position}"
        rows = matrix.basis_rows(plan.dp_rank)
        found.append(StateSlice(matrix.name, matrix.shape, matrix.side, matrix.rank, mark, None, rows, plan.kept))
    return found


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
        """Mark a range as found; returns the parts of it that were missing until now."""
        taken = [overlap(part, found) for part in self.ranges]
        left = [
            overlap(part, side) for part in self.ranges for side in (range(found.start), range(found.stop, part.stop))
        ]
        self.ranges = [part for part in left if len(part)]
        return [part for part in taken if len(part)]
