"""Which elements of a parameter every rank holds that FSDP2, and tensor parallelism beside it, have cut.

`torch.distributed.fsdp.fully_shard` makes every parameter a DTensor: its dimension d is cut into blocks of
ceil(D / ranks), of which the last may be smaller or empty, over one dimension of a device mesh. Tensor parallelism cuts
it over another one; further dimensions of the mesh hold copies. Seen as rows and columns, a rank holds a block of rows,
of columns, or of both. Whole rows in the order of the ranks are ranges of elements, which is what a plan knows.
Otherwise the ranks change what they hold for such rows before a step, and back behind it.

Relies on, of torch 2.9 to 2.13: `DTensor.placements`, `device_mesh` and `to_local`, and for two cuts on
`torch.distributed.tensor._utils.compute_local_shape_and_global_offset`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ds_fira.sharding.geometry import MatrixShard, matrices_of

# Of a rank: sizes and offsets of its part, in every dimension.
Box = tuple[Sequence[int], Sequence[int]]


def blocks(size: int, ranks: int) -> tuple[range, ...]:
    """The blocks into which torch cuts a dimension, by rank."""
    block = -(-size // ranks)
    return tuple(range(min(rank * block, size), min((rank + 1) * block, size)) for rank in range(ranks))


def nested_blocks(size: int, mesh: Sequence[int]) -> tuple[range, ...]:
    """The same over several dimensions of a mesh, the first of which cuts first; by rank, the last counting fastest."""
    if not mesh:
        return (range(size),)
    parts = [(outer, nested_blocks(len(outer), mesh[1:])) for outer in blocks(size, mesh[0])]
    return tuple(range(outer.start + own.start, outer.start + own.stop) for outer, inner in parts for own in inner)


def sharded_dims(param: Tensor, optimizer: str, name: str) -> list[int]:
    """The dimensions of the mesh over which a parameter is cut.

    Args:
        param: the parameter; one that is no DTensor is not cut.
        optimizer: the name of the user's optimizer, for the error.
        name: of the parameter, likewise.

    Raises:
        ValueError: it is placed in a way that is not supported.
    """
    if not isinstance(param, DTensor):
        return []
    found = [dim for dim, placement in enumerate(param.placements) if type(placement) is not Replicate]
    two = len(found) > 1
    if any(each.is_partial() for each in param.placements) or (two and param.ndim > 2):
        raise ValueError(
            f"{optimizer}: {name} of shape {tuple(param.shape)} is placed as {tuple(map(str, param.placements))}, and "
            "a parameter may be cut over one dimension of a mesh, or over two where it has at most two of its own; use "
            "fully_shard alone for it."
        )
    return found


def own_box(param: DTensor) -> Box:
    """What this rank holds of a parameter."""
    return compute_local_shape_and_global_offset(tuple(param.shape), param.device_mesh, param.placements)


def coordinate(param: DTensor, dims: Sequence[int]) -> int:
    """This rank's number among those that a parameter is cut over, by its place in the mesh."""
    number = 0
    for dim in dims:
        number = number * param.device_mesh.size(dim) + param.device_mesh.get_local_rank(dim)
    return number


def local_of(param: Tensor) -> Tensor:
    """What this rank holds of a parameter or gradient, sharing its memory."""
    return param.to_local().detach() if isinstance(param, DTensor) else param.detach()


def local_gradient(param: Tensor) -> Tensor | None:
    """What this rank holds of a parameter's gradient; a collective call where it is placed otherwise than that."""
    grad = param.grad
    if isinstance(grad, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return None if grad is None else local_of(grad)


@dataclass(frozen=True, slots=True)
class Shards:
    """How one parameter is cut.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        mesh: sizes of the dimensions of the mesh over which it is cut.
        width: columns, in elements.
        rows: by rank, those that it holds some of.
        columns: by rank, those that it holds of its rows.
    """

    name: str
    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    width: int
    rows: tuple[range, ...]
    columns: tuple[range, ...]

    @classmethod
    def of_dimension(cls, name: str, shape: tuple[int, ...], dim: int, ranks: int) -> Shards:
        """Of a parameter that is cut along one dimension.

        Args:
            name: of the parameter.
            shape: of the whole parameter.
            dim: which is cut.
            ranks: over which.
        """
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        cut = blocks(shape[dim], ranks)
        if outer == 1:
            return cls(name, shape, (ranks,), inner, cut, (range(inner),) * ranks)
        columns = tuple(range(block.start * inner, block.stop * inner) for block in cut)
        return cls(name, shape, (ranks,), shape[dim] * inner, (range(outer),) * ranks, columns)

    @classmethod
    def of_boxes(cls, name: str, shape: tuple[int, ...], mesh: tuple[int, ...], boxes: Sequence[Box]) -> Shards:
        """Of one that is cut along several, of at most two that it has, from what every rank holds."""
        width = shape[1] if len(shape) == 2 else 1
        whole = [(tuple(sizes), tuple(offsets)) if math.prod(sizes) else ((0, 0), (0, 0)) for sizes, offsets in boxes]
        rows = tuple(range(offsets[0], offsets[0] + sizes[0]) for sizes, offsets in whole)
        columns = tuple(range(sizes[0] and 1) for sizes, _ in whole)
        if len(shape) == 2:
            columns = tuple(range(offsets[1], offsets[1] + sizes[1]) for sizes, offsets in whole)
        return cls(name, shape, mesh, width, rows, columns)

    @classmethod
    def of(cls, param: DTensor, dims: Sequence[int], name: str, boxes: Sequence[Box]) -> Shards:
        """Of a parameter that is cut over some dimensions of its mesh.

        Args:
            param: the parameter.
            dims: of the mesh.
            name: of the parameter.
            boxes: what every rank holds; read where there are several dimensions.
        """
        mesh, shape = tuple(param.device_mesh.size(dim) for dim in dims), tuple(param.shape)
        if len(dims) == 1 and type(param.placements[dims[0]]) is Shard:
            return cls.of_dimension(name, shape, param.placements[dims[0]].dim, mesh[0])
        return cls.of_boxes(name, shape, mesh, boxes)

    @property
    def ranks(self) -> int:
        """Over which it is cut."""
        return len(self.rows)

    @property
    def contiguous(self) -> bool:
        """Whether the ranks hold whole rows one after the other: ranges of elements in row-major order."""
        following = all(first.stop == second.start for first, second in pairwise(self.rows) if len(second))
        return following and all(len(each) == self.width for each in self.columns)

    @property
    def stepped_rows(self) -> tuple[range, ...]:
        """By rank, the rows that it steps."""
        return self.rows if self.contiguous else blocks(math.prod(self.shape) // self.width, self.ranks)

    @property
    def stepped(self) -> tuple[range, ...]:
        """By rank, the elements that it steps, in row-major order."""
        return tuple(range(block.start * self.width, block.stop * self.width) for block in self.stepped_rows)

    def held(self, rank: int) -> list[range]:
        """The elements that a rank holds, in the order in which it does, as ranges."""
        rows, columns = self.rows[rank], self.columns[rank]
        if len(columns) == self.width:
            return [range(rows.start * self.width, rows.stop * self.width)]
        starts = (row * self.width for row in rows)
        return [range(start + columns.start, start + columns.stop) for start in starts if len(columns)]

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """What a rank holds of a whole tensor of this shape, as rows and columns."""
        rows, columns = self.rows[rank], self.columns[rank]
        return whole.reshape(-1, self.width)[rows.start : rows.stop, columns.start : columns.stop]

    def fragments(self, offsets: Sequence[int]) -> list[dict[int, MatrixShard]]:
        """The fragments of every matrix by rank.

        Args:
            offsets: by rank, where the parameter's elements begin in the rank's partition.
        """
        return [dict(self._fragments(matrix, offsets)) for matrix in matrices_of(self.name, self.shape)]

    def _fragments(self, matrix: MatrixShard, offsets: Sequence[int]) -> Iterator[tuple[int, MatrixShard]]:
        begin, end = matrix.offset, matrix.offset + math.prod(matrix.shape)
        for rank, held in enumerate(self.stepped):
            first, last = max(begin, held.start), min(end, held.stop)
            if first < last:
                offset = offsets[rank] + first - held.start
                yield rank, replace(matrix, offset=offset, start=first - begin, stop=last - begin)


def boxes_of(boxes: Mapping[int, Mapping[str, Box]], ranks: Sequence[int], name: str) -> list[Box]:
    """What some ranks hold of a parameter.

    Args:
        boxes: by rank and name, of parameters with several cuts.
        ranks: which.
        name: of the parameter.
    """
    return [boxes[rank][name] for rank in ranks if name in boxes[rank]]
