"""The gathered way to step split matrices: their owner assembles each of them, steps it whole and sends it back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.row_blocks import row_blocks
from ds_fira.sharding.split_matrix import SplitMatrix


class GatherExchange:
    """Carries the fragments of some split matrices to their owners, and the new weights back to the sharers.

    Exact to the bit: the owner assembles gradient and weight and makes the step of an unsplit matrix. Both ways are a
    collective call, on all ranks of the communicator.

    Attributes:
        communicator: the ranks.
        owned: the matrices that this rank assembles, in the order given.
    """

    def __init__(self, matrices: Sequence[SplitMatrix], communicator: Communicator) -> None:
        """Look up what this rank owns and what it sends.

        Args:
            matrices: of one flat buffer; the same on all ranks, at least one.
            communicator: the ranks.
        """
        self.communicator = communicator
        rank = communicator.dp_rank
        self.owned = tuple(matrix for matrix in matrices if matrix.owner == rank)
        # (owner, fragment) of what this rank holds of the others' matrices.
        self._lent: list[tuple[int, MatrixShard]] = [
            (matrix.owner, matrix.fragment(rank))
            for matrix in matrices
            if rank in matrix.sharers and rank != matrix.owner
        ]

    def to_owners(self, *flats: Tensor) -> list[list[Tensor]]:
        """Assemble the matrices that this rank owns.

        Args:
            *flats: flat buffers of one dtype and layout, such as weights and gradients.

        Returns:
            For every owned matrix, in order, an (m, n) tensor from each buffer.
        """
        rank = self.communicator.dp_rank
        arrived = self.communicator.deliver(
            [(owner, [fragment.fragment(flat) for flat in flats]) for owner, fragment in self._lent],
            [
                (holder, (index, holder), len(flats) * fragment.numel)
                for index, matrix in enumerate(self.owned)
                for holder, fragment in matrix.fragments
                if holder != rank
            ],
            flats[0],
        )
        assembled = [[flat.new_empty(matrix.shape) for flat in flats] for matrix in self.owned]
        for index, matrix in enumerate(self.owned):
            for holder, fragment in matrix.fragments:
                own = holder == rank
                parts = map(fragment.fragment, flats) if own else arrived[index, holder].split(fragment.numel)
                for tensor, part in zip(assembled[index], parts, strict=True):
                    _copy(part.split(_sizes(fragment)), _parts(tensor, fragment))
        return assembled

    def to_holders(self, flat: Tensor, matrices: Sequence[Tensor]) -> None:
        """Write the new value of every matrix into the fragments of `flat`, on all ranks that share it.

        Args:
            flat: the flat weights.
            matrices: for every owned matrix, in order, its new (m, n) value.
        """
        sent = []
        for matrix, tensor in zip(self.owned, matrices, strict=True):
            for holder, fragment in matrix.fragments:
                if holder == self.communicator.dp_rank:
                    _copy(_parts(tensor, fragment), fragment.fragment(flat).split(_sizes(fragment)))
                else:
                    sent.append((holder, _parts(tensor, fragment)))
        expected = [(owner, index, fragment.numel) for index, (owner, fragment) in enumerate(self._lent)]
        for index, part in self.communicator.deliver(sent, expected, flat).items():
            self._lent[index][1].fragment(flat).copy_(part)


def _parts(matrix: Tensor, fragment: MatrixShard) -> list[Tensor]:
    """The elements of an assembled matrix that a fragment stands for, in its order; of a slice of columns by block."""
    if fragment.columns is None:
        return [matrix.view(-1)[fragment.start : fragment.stop]]
    return [matrix[_within(block.rows), _within(block.columns)] for block in row_blocks(fragment)]


def _within(span: range) -> slice:
    return slice(span.start, span.stop)


def _sizes(fragment: MatrixShard) -> list[int]:
    """Elements of each of `_parts`."""
    if fragment.columns is None:
        return [fragment.numel]
    return [len(block.rows) * len(block.columns) for block in row_blocks(fragment)]


def _copy(parts: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for part, target in zip(parts, targets, strict=True):
        target.copy_(part.reshape(target.shape))
