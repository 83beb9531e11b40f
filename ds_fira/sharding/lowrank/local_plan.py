"""What one rank has to do with a matrix that is stepped the low-rank way, looked up once."""

from __future__ import annotations

from dataclasses import dataclass

from ds_fira.core.drawn_basis import DrawnBasis
from ds_fira.core.settings import GroupSettings
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.row_blocks import RowBlock, Transfer, row_blocks
from ds_fira.sharding.split_matrix import SplitMatrix


@dataclass(frozen=True, slots=True)
class LocalShardPlan:
    """One rank's part of a split matrix; `ds_fira.sharding.split_matrix` explains the words.

    Attributes:
        matrix: the split matrix.
        position: its number among the split matrices of its group; marks its states and payloads.
        number: its number in the model; `stagger` goes by it.
        dp_rank: the rank.
        fragment: what the rank holds of it.
        blocks: the fragment in blocks of rows.
        region: the entries of R that the rank works on.
        kept: those of them that it keeps, with their moments.
        borrowed: those that it borrows, by keeper in ascending order.
        lent: those that others borrow of it.
        basis_rows: the rows of P that the rank holds.
        basis_span: the rows of P that it works with.
        basis_borrowed: those of them that it borrows for a step.
        basis_lent: those that others borrow of it.
    """

    matrix: SplitMatrix
    position: int
    number: int
    dp_rank: int
    fragment: MatrixShard
    blocks: tuple[RowBlock, ...]
    region: range
    kept: range
    borrowed: tuple[Transfer, ...]
    lent: tuple[Transfer, ...]
    basis_rows: range
    basis_span: range
    basis_borrowed: tuple[Transfer, ...]
    basis_lent: tuple[Transfer, ...]

    @classmethod
    def of(cls, matrix: SplitMatrix, position: int, number: int, dp_rank: int) -> LocalShardPlan:
        """The plan of a rank that holds a fragment of the matrix."""
        fragment = matrix.fragment(dp_rank)
        borrowed, lent = matrix.borrowed_and_lent(dp_rank)
        basis_borrowed, basis_lent = matrix.basis_borrowed_and_lent(dp_rank)
        return cls(
            matrix=matrix,
            position=position,
            number=number,
            dp_rank=dp_rank,
            fragment=fragment,
            blocks=row_blocks(fragment),
            region=matrix.region(dp_rank),
            kept=matrix.kept(dp_rank),
            borrowed=borrowed,
            lent=lent,
            basis_rows=matrix.basis_rows(dp_rank),
            basis_span=matrix.basis_span(dp_rank),
            basis_borrowed=basis_borrowed,
            basis_lent=basis_lent,
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

    @property
    def drawn(self) -> DrawnBasis | None:
        """Which basis the matrix has where the ranks draw it."""
        matrix = self.matrix
        rows = matrix.shape[0 if matrix.side == "left" else 1]
        return DrawnBasis(self.number, rows, matrix.rank) if matrix.draws_basis else None

    def averages(self, settings: GroupSettings) -> int:
        """Numbers that the rank holds of the average of a normalized residual: of the entries kept, or one for all."""
        return settings.averages_of(len(self.kept))
