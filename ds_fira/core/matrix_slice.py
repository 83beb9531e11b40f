"""Where a matrix lies in a tensor that holds others too, without a view of it: every view costs the host a call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MatrixSlice(NamedTuple):
    """One matrix, (m, n), or k of one shape at equal distances, (k, m, n), inside a tensor.

    Attributes:
        tensor: a parameter, a gradient, or a flat buffer.
        offset: elements from the tensor's first one to the matrix's.
        shape: of the matrix, or of the k.
        strides: elements from one entry to the next, in every dimension of the shape.
    """

    tensor: Tensor
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> MatrixSlice:
        """All of a tensor."""
        return cls(tensor, 0, tuple(tensor.shape), tensor.stride())

    def view(self) -> Tensor:
        """It as a tensor that shares the memory, or the tensor itself where it is all of it."""
        if self.offset == 0 and self.shape == self.tensor.shape and self.strides == self.tensor.stride():
            return self.tensor
        return self.tensor.as_strided(self.shape, self.strides, self.tensor.storage_offset() + self.offset)

    def origins(self) -> list[tuple[Tensor, int]]:
        """Where the matrix, or each of the k, begins: the tensor, and the offset in it."""
        if len(self.shape) == 2:
            return [(self.tensor, self.offset)]
        return [(self.tensor, self.offset + place * self.strides[0]) for place in range(self.shape[0])]
