"""Which rank holds, owns and sends what: pure plans, computed the same on every rank before the first step.

A *fragment* is a matrix's overlap with one rank's partition. A matrix with one fragment is whole on its rank, which
owns it, and needs no communication ever. A matrix with several is cut: one of the ranks that share it is its *owner*,
holds its state, receives the other fragments, makes the whole step and sends the new weights back.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ds_fira.shard import MatrixShard, cut
from ds_fira.subspace import basis_shape, low_rank_shape, projection_side

T = TypeVar("T")


def state_numel(shape: tuple[int, int], rank: int, proj_type: str = "std", formulation: str = "released") -> int:
    """Elements of optimizer state of one projected matrix, the paper's mr + 2nr + 1 (Table 1).

    Counts the basis, the two moments and the limiter's norm.
    """
    side = projection_side(shape, proj_type, formulation)
    rows, r = basis_shape(shape, rank, side)
    a, b = low_rank_shape(shape, rank, side)
    return rows * r + 2 * a * b + 1


@dataclass(frozen=True, slots=True)
class CutMatrix:
    """A matrix that partition boundaries cut, with its owner.

    Attributes:
        name: as in `MatrixShard`.
        shape: (m, n).
        fragments: (dp_rank, fragment) in ascending order of rank; the fragments tile the matrix.
        owner: the dp_rank that holds the state and makes the step.
    """

    name: str
    shape: tuple[int, int]
    fragments: tuple[tuple[int, MatrixShard], ...]
    owner: int


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """One param group's matrices over all partitions of its flat buffer.

    Attributes:
        whole: for every dp_rank, the matrices that lie whole in its partition.
        cuts: the matrices that no rank holds whole, in buffer order.
        partition_size: elements in each partition.
    """

    whole: tuple[tuple[MatrixShard, ...], ...]
    cuts: tuple[CutMatrix, ...]
    partition_size: int

    def owned_cuts(self, dp_rank: int) -> tuple[CutMatrix, ...]:
        """The cut matrices that `dp_rank` owns."""
        return tuple(matrix for matrix in self.cuts if matrix.owner == dp_rank)

    def exchange_counts(self, dp_rank: int) -> tuple[list[int], list[int]]:
        """Elements of one flat buffer that `dp_rank` sends to, and receives from, every rank on the way to the owners.

        The way back has the two lists exchanged. The order inside each list is that of `cuts`.
        """
        ranks = len(self.whole)
        sent, received = [0] * ranks, [0] * ranks
        for matrix in self.cuts:
            for holder, fragment in matrix.fragments:
                if holder == dp_rank != matrix.owner:
                    sent[matrix.owner] += fragment.numel
                if holder != dp_rank == matrix.owner:
                    received[holder] += fragment.numel
        return sent, received


def plan_groups(
    groups: Sequence[tuple[Sequence[MatrixShard], int]],
    ranks: int,
    state_sizes: Sequence[Callable[[tuple[int, int]], int]],
) -> list[GroupLayout]:
    """Cut the matrices of every group at its partition boundaries and give every cut matrix an owner.

    Owners balance the state: the largest matrices first, each to the least loaded of the ranks that share it, counting
    what is whole on a rank as its load from the start.

    Args:
        groups: for every group its matrices, whole, `offset` counted in the group's buffer, and its partition size.
        ranks: partitions in each buffer.
        state_sizes: for every group, the elements of state of a matrix of a given shape.
    """
    load = [0] * ranks
    whole = [[[] for _ in range(ranks)] for _ in groups]
    cuts: list[tuple[int, int, dict[int, MatrixShard]]] = []  # (state elements, group, fragments)
    for index, (matrices, partition_size) in enumerate(groups):
        for matrix in matrices:
            fragments = cut(matrix, partition_size, ranks)
            size = state_sizes[index](matrix.shape)
            if len(fragments) == 1:
                holder, fragment = next(iter(fragments.items()))
                whole[index][holder].append(fragment)
                load[holder] += size
            else:
                cuts.append((size, index, fragments))
    owned: dict[int, list[tuple[int, CutMatrix]]] = defaultdict(list)
    for position, (size, index, fragments) in sorted(enumerate(cuts), key=lambda item: -item[1][0]):
        owner = min(fragments, key=lambda holder: (load[holder], holder))
        load[owner] += size
        first = next(iter(fragments.values()))
        matrix = CutMatrix(first.name, first.shape, tuple(fragments.items()), owner)
        owned[index].append((position, matrix))
    return [
        GroupLayout(
            whole=tuple(tuple(held) for held in whole[index]),
            cuts=tuple(matrix for _, matrix in sorted(owned[index], key=lambda item: item[0])),
            partition_size=partition_size,
        )
        for index, (_, partition_size) in enumerate(groups)
    ]


def plan_hash(layouts: Iterable[GroupLayout]) -> str:
    """A digest of the plan, to be equal on all ranks."""
    return hashlib.sha256(repr(list(layouts)).encode()).hexdigest()


def split_evenly(
    items: Sequence[tuple[Hashable, T]], ranks: int, most_of: Callable[[Hashable], int] | None = None
) -> list[list[T]]:
    """Arrange the parameters of one param group into groups whose partition boundaries fall between matrices.

    Parameters of one shape go together, in their own order: as many as divide evenly by `ranks` in one group, so that
    every partition holds the same number of them, and the remainder in another.

    Args:
        items: (shape, parameter) pairs.
        ranks: partitions that ZeRO will cut each group into.
        most_of: how many parameters of a shape a partition may hold; at least one is put there. None: any number.
    """
    by_shape: dict[Hashable, list[T]] = defaultdict(list)
    for shape, item in items:
        by_shape[shape].append(item)
    groups = []
    for shape, members in by_shape.items():
        even = len(members) - len(members) % ranks
        most = ranks * (len(members) if most_of is None else max(1, most_of(shape)))
        groups += [members[first : min(first + most, even)] for first in range(0, even, most)]
        groups += [members[even:]] if even < len(members) else []
    return groups


def split_by_size(items: Sequence[tuple[int, T]], limit: int) -> list[list[T]]:
    """Cut a sequence of (size, item) pairs into runs whose sizes sum to at most `limit`, or that are one item."""
    groups: list[list[T]] = []
    room = 0
    for size, item in items:
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= size
    return groups
