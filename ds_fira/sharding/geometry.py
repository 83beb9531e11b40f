"""Frozen geometry: which elements of which matrix lie where in a flat buffer.

ZeRO flattens the parameters of one group into a buffer and splits it into equal partitions, one for each data-parallel
rank. A partition boundary falls between two matrices, or anywhere inside one:

    buffer      | A A A A A A | B B B B B B | C C C C C C | pad
    partitions  [0 . . . . . . . . . )[1 . . . . . . . . . . . )
                 A whole     B left   B right    C whole

ZeRO-3 splits every parameter by itself instead, and a rank's partition is its slices back to back:

    parameters  | A A A A A A | B B B B |
    partitions  [0: A A A B B )[1: A A A B B )

Under tensor parallelism a rank has a slice of a matrix, some of its rows or of its columns, which ZeRO splits besides
as if it were all there is.

`MatrixShard` is one matrix's overlap with one partition. Bounds are half-open and count elements in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

from ds_fira.core.matrix_slice import MatrixSlice
from ds_fira.sharding.scattered import place_of
from ds_fira.sharding.slice_names import param_of


@dataclass(frozen=True, slots=True)
class MatrixShard:
    """One matrix's overlap with one flat buffer.

    Attributes:
        name: the parameter's name in the module; an expert of a 3-D tensor has its index appended in brackets.
        shape: (m, n) of the whole matrix.
        offset: the index in the flat buffer at which the fragment begins.
        start: the matrix's first element in the fragment.
        stop: one past the matrix's last element in the fragment.
        columns: the matrix's columns in the slice that the fragment is a part of, whose elements `start` and `stop`
            count then; None for all of them.
    """

    name: str
    shape: tuple[int, int]
    offset: int
    start: int
    stop: int
    columns: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        assert min(self.shape) > 0, self
        assert 0 <= self.start < self.stop <= self.shape[0] * len(self.span), self
        assert self.offset >= 0, self

    def __repr__(self) -> str:
        """What the hash of a plan is made of: as version 0.1.0 wrote it, which knew no columns."""
        columns = "" if self.columns is None else f", columns={self.columns}"
        return (
            f"MatrixShard(name={self.name!r}, shape={self.shape}, offset={self.offset}, start={self.start}, "
            f"stop={self.stop}{columns})"
        )

    @property
    def span(self) -> range:
        """The matrix's columns, all or those of the slice, by which `start` and `stop` count."""
        return range(*self.columns) if self.columns is not None else range(self.shape[1])

    @property
    def numel(self) -> int:
        """Number of elements in the fragment."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether the fragment is the whole matrix."""
        return self.numel == self.shape[0] * self.shape[1]

    def within(self, shape: tuple[int, int], first: tuple[int, int]) -> MatrixShard:
        """The same fragment as one of a larger matrix, of which this one is a slice of some rows or some columns.

        Args:
            shape: (m, n) of the larger matrix.
            first: the row and the column of it at which the slice begins.
        """
        row, column = first
        if self.shape[1] == shape[1]:
            before = row * shape[1]
            return replace(self, shape=shape, start=self.start + before, stop=self.stop + before)
        return replace(self, shape=shape, columns=(column, column + self.shape[1]))

    def fragment(self, flat: Tensor) -> Tensor:
        """The fragment as a 1-D view that shares `flat`'s storage, or that of the tensor in which it lies.

        Args:
            flat: the buffer, of any shape whose row-major order is the buffer's order; contiguous.
        """
        tensor, offset = place_of(flat, self.offset)
        return tensor.view(-1).narrow(0, offset, self.numel)

    def matrix(self, flat: Tensor) -> Tensor:
        """The whole matrix as an (m, n) view that shares `flat`'s storage; only for a whole fragment."""
        return self.place(flat).view()

    def place(self, flat: Tensor) -> MatrixSlice:
        """Where the whole matrix lies in `flat`; only for a whole fragment."""
        assert self.is_whole, self
        assert flat.is_contiguous(), self
        return MatrixSlice(*place_of(flat, self.offset), self.shape, (self.shape[1], 1))


def matrices_of(
    name: str, shape: tuple[int, ...], begin: int = 0, optimizer: str = "", experts: range | None = None
) -> list[MatrixShard]:
    """The matrices of one parameter, whole, as they lie in a buffer from `begin` on.

    A 2-D parameter is one matrix, a 3-D one (experts, m, n) is `experts` of them.

    Args:
        name: of the parameter.
        shape: of the parameter.
        begin: the index in the buffer of its first element.
        optimizer: the name of the user's optimizer, for the error.
        experts: those that the buffer holds of a 3-D parameter, by their numbers; None for all.

    Raises:
        ValueError: the parameter has another number of dimensions, so it cannot be projected.
    """
    if len(shape) == 2:
        m, n = shape
        return [MatrixShard(name, (m, n), begin, 0, m * n)]
    if len(shape) == 3:
        count, m, n = shape
        numbers = enumerate(range(count) if experts is None else experts)
        return [MatrixShard(f"{name}[{e}]", (m, n), begin + i * m * n, 0, m * n) for i, e in numbers]
    raise ValueError(
        f"{optimizer and optimizer + ': '}{name or 'a parameter'} of shape {tuple(shape)} is in a group with a rank, "
        "which takes 2-D and 3-D weights; move it to a group without 'rank'."
    )


@dataclass(frozen=True, slots=True)
class EvenCut(Mapping[int, MatrixShard]):
    """The fragments of a matrix by rank, of a range of elements that boundaries cut at even distances.

    A model of 1,500 matrices on 2,000 ranks has three million fragments. A rank works with its own and needs of the
    others no more than where they begin, which is arithmetic: each is made when it is asked for.

    Attributes:
        name: of the matrix.
        shape: (m, n).
        begin: elements of the range before the matrix.
        size: elements of the range that each rank has.
        place: where a rank's part of the range begins in its partition, the same on all ranks or told by rank.
    """

    name: str
    shape: tuple[int, int]
    begin: int
    size: int
    place: int | Callable[[int], int] = 0

    @property
    def ranks(self) -> range:
        """Those that hold a fragment, one after the other."""
        last = self.begin + math.prod(self.shape) - 1
        return range(self.begin // self.size, last // self.size + 1)

    def __repr__(self) -> str:
        """What the hash of a plan is made of where a cut is not listed."""
        place = f", place={self.place}" if isinstance(self.place, int) else ""  # else by the cuts before it
        return f"EvenCut(name={self.name!r}, shape={self.shape}, begin={self.begin}, size={self.size}{place})"

    def __len__(self) -> int:
        return len(self.ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ranks)

    def __contains__(self, rank: object) -> bool:
        return rank in self.ranks

    def __getitem__(self, rank: int) -> MatrixShard:
        if rank not in self.ranks:
            raise KeyError(rank)
        edge = rank * self.size
        first, last = max(self.begin, edge), min(self.begin + math.prod(self.shape), edge + self.size)
        place = self.place if isinstance(self.place, int) else self.place(rank)
        return MatrixShard(self.name, self.shape, place + first - edge, first - self.begin, last - self.begin)

    @property
    def unnamed(self) -> EvenCut:
        """The same of a matrix without a name, wherever the ranks keep it: equal where the fragments are alike."""
        return EvenCut("", self.shape, self.begin, self.size)


def split(matrix: MatrixShard, partition_size: int, partitions: int, place: int | Callable[[int], int] = 0) -> EvenCut:
    """Split a whole matrix of a buffer at the partition boundaries.

    Args:
        matrix: whole, with `offset` counted from the start of the buffer.
        partition_size: elements in each partition.
        partitions: how many partitions the buffer has.
        place: as in `EvenCut`, where partitions hold more than this buffer's.

    Returns:
        The fragments by partition index, which are consecutive and ascending; `offset` counted from the start of the
        partition. The fragments tile the matrix.
    """
    assert matrix.is_whole, matrix
    assert matrix.offset + matrix.numel <= partition_size * partitions, (matrix, partition_size, partitions)
    return EvenCut(matrix.name, matrix.shape, matrix.offset, partition_size, place)


@dataclass(frozen=True, slots=True)
class ParamSlice:
    """Elements of one parameter that lie in a stepped tensor: a flat partition, or the parameter itself.

    Attributes:
        name: of the parameter in the module; of a slice that tensor parallelism leaves a rank that of the slice, whose
            elements are counted then.
        offset: the index in the tensor at which they begin.
        start: the first of them among the parameter's elements, in row-major order.
        stop: one past the last.
    """

    name: str
    offset: int
    start: int
    stop: int

    @property
    def param(self) -> str:
        """The name of the parameter."""
        return param_of(self.name)


@dataclass(frozen=True, slots=True)
class Partitioning:
    """Where ZeRO puts the parameters of one flat group.

    Attributes:
        numels: elements of every parameter.
        offsets: where every parameter begins: in the buffer, or, sliced, in every partition.
        partition_size: elements in each partition, padding included.
        ranks: partitions.
        sliced: whether every parameter is split by itself (ZeRO-3), not the buffer of all (ZeRO-1 and 2).
    """

    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    partition_size: int
    ranks: int
    sliced: bool

    @classmethod
    def of_slices(cls, numels: tuple[int, ...], ranks: int) -> Partitioning:
        """ZeRO-3's: of every parameter ceil(numel / ranks) elements on each rank, those of the last ones padded."""
        sizes = [-(-numel // ranks) for numel in numels]
        *offsets, total = accumulate(sizes, initial=0)
        return cls(numels, tuple(offsets), total, ranks, sliced=True)

    def fragments(self, index: int, matrix: MatrixShard) -> EvenCut:
        """Split a whole matrix of a parameter.

        Args:
            index: of the parameter.
            matrix: whole, with `offset` counted from the start of the parameter.

        Returns:
            As `split`.
        """
        begin = self.offsets[index]
        if not self.sliced:
            return split(replace(matrix, offset=begin + matrix.offset), self.partition_size, self.ranks)
        return split(matrix, -(-self.numels[index] // self.ranks), self.ranks, begin)

    def slices(self, dp_rank: int, names: Sequence[str], firsts: Sequence[int] | None = None) -> tuple[ParamSlice, ...]:
        """What lies in a rank's partition, in the order of the parameters; those with nothing there are left out.

        Args:
            dp_rank: of the rank.
            names: of the parameters.
            firsts: the number of the first element of each; None for 0, where the ranks have all of every parameter.
        """
        found = []
        firsts = [0] * len(names) if firsts is None else firsts
        for index, (name, numel, first) in enumerate(zip(names, self.numels, firsts, strict=True)):
            fragment = self.fragments(index, MatrixShard(name, (1, numel), 0, 0, numel)).get(dp_rank)
            if fragment is not None:
                found.append(ParamSlice(name, fragment.offset, first + fragment.start, first + fragment.stop))
        return tuple(found)
