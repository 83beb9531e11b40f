"""Which elements of a parameter every rank holds that `torch.distributed.fsdp.fully_shard` has cut.

FSDP2 makes every parameter a DTensor: its dimension d is cut into blocks of ceil(D / ranks), of which the last may be
smaller or empty, over one dimension of a device mesh. Other dimensions of the mesh hold copies. Of d = 0 a rank's block
is a range of the elements in row-major order, which is what a plan knows. Of another d it is not: of a tensor seen as
(A, D, B) rank k holds (A, block k of D, B). For a step the ranks change that for blocks of A, all elements of them.

Relies on, of torch 2.9 to 2.13: `DTensor.placements`, `device_mesh` and `to_local`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ds_fira.sharding.geometry import MatrixShard, matrices_of


def blocks(size: int, ranks: int) -> tuple[range, ...]:
    """The blocks into which torch cuts a dimension, by rank."""
    block = -(-size // ranks)
    return tuple(range(min(rank * block, size), min((rank + 1) * block, size)) for rank in range(ranks))


def sharded_dims(param: DTensor, optimizer: str, name: str) -> list[int]:
    """The dimensions of the mesh over which a parameter is cut; at most one.

    Args:
        param: the parameter.
        optimizer: the name of the user's optimizer, for the error.
        name: of the parameter, likewise.

    Raises:
        ValueError: it is placed in another way.
    """
    found = [dim for dim, placement in enumerate(param.placements) if type(placement) is not Replicate]
    if len(found) > 1 or any(type(param.placements[dim]) is not Shard for dim in found):
        raise ValueError(
            f"{optimizer}: {name} is placed as {tuple(map(str, param.placements))} on a mesh of "
            f"{tuple(param.device_mesh.shape)} ranks, and low-rank states are sharded over one dimension of a mesh; "
            "use fully_shard alone, on a mesh of one dimension or of (replicas, shards), without tensor parallelism."
        )
    return found


def local_of(param: Tensor) -> Tensor:
    """What this rank holds of a parameter or gradient, sharing its memory."""
    return param.to_local().detach() if isinstance(param, DTensor) else param.detach()


@dataclass(frozen=True, slots=True)
class Shards:
    """How one parameter is cut.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        dim: the dimension that is cut.
        ranks: over which.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    ranks: int

    @classmethod
    def of(cls, param: DTensor, mesh_dim: int, name: str) -> Shards:
        """Of a parameter that is cut over one dimension of its mesh."""
        return cls(name, tuple(param.shape), param.placements[mesh_dim].dim, param.device_mesh.size(mesh_dim))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(A, D, B), see above."""
        return math.prod(self.shape[: self.dim]), self.shape[self.dim], math.prod(self.shape[self.dim + 1 :])

    @property
    def contiguous(self) -> bool:
        """Whether what a rank holds is a range of elements in row-major order."""
        return self.sizes[0] == 1

    @property
    def cut(self) -> tuple[range, ...]:
        """By rank, the block of D that it holds."""
        return blocks(self.sizes[1], self.ranks)

    @property
    def outer(self) -> tuple[range, ...]:
        """By rank, the block of A that it steps where blocks of D are no ranges of elements."""
        return blocks(self.sizes[0], self.ranks)

    @property
    def stepped(self) -> tuple[range, ...]:
        """By rank, the elements that it steps, in row-major order."""
        _, middle, inner = self.sizes
        found, width = (self.cut, inner) if self.contiguous else (self.outer, middle * inner)
        return tuple(range(block.start * width, block.stop * width) for block in found)

    def held(self, rank: int) -> list[range]:
        """The elements that a rank holds, in the order in which it does, as ranges."""
        outer, middle, inner = self.sizes
        block = self.cut[rank]
        starts = range(0, outer * middle * inner, middle * inner)
        return [range(first + block.start * inner, first + block.stop * inner) for first in starts if len(block)]

    def fragments(self, offsets: Sequence[int]) -> list[dict[int, MatrixShard]]:
        """The fragments of every matrix by rank.

        Args:
            offsets: by rank, where the parameter's elements begin in the rank's partition.
        """
        found = []
        for matrix in matrices_of(self.name, self.shape):
            begin, end = matrix.offset, matrix.offset + math.prod(matrix.shape)
            parts = {}
            for rank, held in enumerate(self.stepped):
                first, last = max(begin, held.start), min(end, held.stop)
                if first < last:
                    offset = offsets[rank] + first - held.start
                    parts[rank] = replace(matrix, offset=offset, start=first - begin, stop=last - begin)
            found.append(parts)
        return found
