"""Which elements of a parameter every rank holds that FSDP2, and tensor parallelism beside it, have cut.

`torch.distributed.fsdp.fully_shard` makes every parameter a DTensor: its dimension d is cut into blocks of
ceil(D / ranks), of which the last may be smaller or empty, over one dimension of a device mesh. Tensor parallelism cuts
it over another one; further dimensions of the mesh hold copies. Seen as rows and columns, a rank holds a block of rows,
of columns, or of both. Whole rows of a matrix in the order of the ranks are ranges of elements, which is what a plan
knows. Otherwise the ranks change what they hold for such rows before a step, and back behind it.

Relies on, of torch 2.9 to 2.13: `DTensor.placements`, `device_mesh` and `to_local`, and for two cuts on
`torch.distributed.tensor._utils.compute_local_shape_and_global_offset`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, pairwise

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ds_fira.sharding.geometry import MatrixShard, matrices_of, split

# Of a rank: sizes and offsets of its part, in every dimension.
Box = tuple[Sequence[int], Sequence[int]]


@lru_cache(maxsize=256)
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
        contiguous: whether the ranks hold whole rows one after the other: ranges of elements in row-major order.
    """

    name: str
    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    width: int
    rows: tuple[range, ...]
    columns: tuple[range, ...]
    contiguous: bool

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
            return cls(name, shape, (ranks,), inner, cut, (range(inner),) * ranks, True)
        columns = tuple(range(block.start * inner, block.stop * inner) for block in cut)
        return cls(name, shape, (ranks,), shape[dim] * inner, (range(outer),) * ranks, columns, ranks == 1)

    @classmethod
    def of_boxes(cls, name: str, shape: tuple[int, ...], mesh: tuple[int, ...], boxes: Sequence[Box]) -> Shards:
        """Of one that is cut along several, of at most two that it has, from what every rank holds."""
        width = shape[1] if len(shape) == 2 else 1
        whole = [(tuple(sizes), tuple(offsets)) if math.prod(sizes) else ((0, 0), (0, 0)) for sizes, offsets in boxes]
        rows = tuple(range(offsets[0], offsets[0] + sizes[0]) for sizes, offsets in whole)
        columns = tuple(range(sizes[0] and 1) for sizes, _ in whole)
        if len(shape) == 2:
            columns = tuple(range(offsets[1], offsets[1] + sizes[1]) for sizes, offsets in whole)
        following = all(first.stop == second.start for first, second in pairwise(rows) if len(second))
        contiguous = following and all(len(each) == width for each in columns)
        return cls(name, shape, mesh, width, rows, columns, contiguous)

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
    def by_matrix(self) -> bool:
        """Whether every matrix of a 3-D parameter is cut in rows: a rank holds some of each."""
        return not self.contiguous and len(self.shape) == 3 and self.width == self.shape[1] * self.shape[2]

    @property
    def steps_held(self) -> bool:
        """Whether a rank steps what it holds: a range of every matrix."""
        return self.contiguous or self.by_matrix

    @property
    def stepped_rows(self) -> tuple[range, ...]:
        """By rank, the rows that it steps."""
        return self.rows if self.steps_held else blocks(math.prod(self.shape) // self.width, self.ranks)

    def stepped(self, rank: int) -> list[range]:
        """The elements that a rank steps, in row-major order, as ranges."""
        if self.steps_held:
            return self.held(rank)
        rows = self.stepped_rows[rank]
        return [range(rows.start * self.width, rows.stop * self.width)]

    def stepped_numel(self, rank: int) -> int:
        """The number of these."""
        return sum(map(len, self.stepped(rank)))

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

    def fragments(self, place: int | Callable[[int], int] = 0) -> list[Mapping[int, MatrixShard]]:
        """The fragments of every matrix by rank.

        Args:
            place: where the parameter's elements begin in the rank's partition, the same on all ranks or told by rank.
        """
        rows, matrices, most = self.stepped_rows, matrices_of(self.name, self.shape), self.stepped_numel(0)
        if self.by_matrix:
            own = [replace(matrix, offset=0) for matrix in matrices]
            places = [partial(self._begin, place, index) for index in range(len(own))]
            return [split(each, most // len(own), self.ranks, at) for each, at in zip(own, places, strict=True)]
        if rows == blocks(math.prod(self.shape) // self.width, self.ranks):
            return [split(matrix, most, self.ranks, place) for matrix in matrices]
        return [dict(self._fragments(matrix, place)) for matrix in matrices]

    def _begin(self, place: int | Callable[[int], int], index: int, rank: int) -> int:
        """Where what a rank holds of one of several matrices begins in its partition."""
        return (place if isinstance(place, int) else place(rank)) + index * len(self.columns[rank])

    def _fragments(self, matrix: MatrixShard, place: int | Callable[[int], int]) -> Iterator[tuple[int, MatrixShard]]:
        begin, end = matrix.offset, matrix.offset + math.prod(matrix.shape)
        for rank in range(self.ranks):
            (held,) = self.stepped(rank)
            first, last = max(begin, held.start), min(end, held.stop)
            if first < last:
                offset = (place if isinstance(place, int) else place(rank)) + first - held.start
                yield rank, replace(matrix, offset=offset, start=first - begin, stop=last - begin)


class Packed:
    """Parameters of which every rank has what it steps behind one another: where each begins there."""

    def __init__(self, shards: Sequence[Shards]) -> None:
        """Take the parameters in their order."""
        self.shards = shards
        self._begins: dict[int, list[int]] = {}

    def begin(self, number: int, rank: int) -> int:
        """Where a parameter begins on a rank, by its number; behind the last, the elements that the rank steps."""
        if rank not in self._begins:
            held = (shards.stepped_numel(rank) for shards in self.shards)
            self._begins[rank] = list(accumulate(held, initial=0))
        return self._begins[rank][number]

    def fragments(self) -> list[Mapping[int, MatrixShard]]:
        """Those of all matrices, as `Shards.fragments` has them."""
        places = [partial(self.begin, number) for number in range(len(self.shards))]
        return [
            fragments
            for shards, place in zip(self.shards, places, strict=True)
            for fragments in shards.fragments(place)
        ]


def boxes_of(boxes: Mapping[int, Mapping[str, Box]], ranks: Sequence[int], name: str) -> list[Box]:
    """What some ranks hold of a parameter.

    Args:
        boxes: by rank and name, of parameters with several cuts.
        ranks: which.
        name: of the parameter.
    """
    return [boxes[rank][name] for rank in ranks if name in boxes[rank]]
