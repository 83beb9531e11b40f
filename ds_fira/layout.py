"""Which rank holds, owns and sends what: pure plans, computed the same on every rank before the first step.

A *fragment* is a matrix's overlap with one rank's partition. A matrix with one fragment is whole on its rank, which
owns it, and needs no communication ever. A matrix with several is cut, and stepped in one of the ways of
`ds_fira.cuts`; one of the ranks that share it is its *owner*.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ds_fira.cuts import CutMatrix, plan_cut, state_numel
from ds_fira.shard import MatrixShard, cut

T = TypeVar("T")


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

    @property
    def base_cuts(self) -> tuple[CutMatrix, ...]:
        """The cut matrices that are stepped whole on their owners."""
        return tuple(matrix for matrix in self.cuts if matrix.way == "base")

    @property
    def lean_cuts(self) -> tuple[CutMatrix, ...]:
        """The cut matrices that are stepped where they lie."""
        return tuple(matrix for matrix in self.cuts if matrix.way == "lean")

    def owned_cuts(self, dp_rank: int) -> tuple[CutMatrix, ...]:
        """The cut matrices that `dp_rank` owns and steps whole."""
        return tuple(matrix for matrix in self.base_cuts if matrix.owner == dp_rank)

    def exchange_counts(self, dp_rank: int) -> tuple[list[int], list[int]]:
        """Elements of one flat buffer that `dp_rank` sends to, and receives from, every rank on the base way to owners.

        The way back has the two lists exchanged. The order inside each list is that of `cuts`.
        """
        ranks = len(self.whole)
        sent, received = [0] * ranks, [0] * ranks
        for matrix in self.base_cuts:
            for holder, fragment in matrix.fragments:
                if holder == dp_rank != matrix.owner:
                    sent[matrix.owner] += fragment.numel
                if holder != dp_rank == matrix.owner:
                    received[holder] += fragment.numel
        return sent, received


def plan_groups(
    groups: Sequence[tuple[Sequence[MatrixShard], int]], ranks: int, settings: Sequence[Mapping[str, Any]]
) -> list[GroupLayout]:
    """Cut the matrices of every group at its partition boundaries; give every cut matrix an owner and a way.

    Owners balance the state: the largest matrices first, each to the least loaded of the ranks that share it, counting
    what is whole on a rank as its load from the start. The way is the one that sends less (`CutMatrix.cheaper_way`).

    Args:
        groups: for every group its matrices, whole, `offset` counted in the group's buffer, and its partition size.
        ranks: partitions in each buffer.
        settings: of every group: `rank`, `proj_type`, `formulation`, `update_proj_gap`, `subspace`, `refresh_moments`
            and `exact_cuts`.
    """
    load = [0] * ranks
    whole = [[[] for _ in range(ranks)] for _ in groups]
    cuts: list[tuple[int, int, dict[int, MatrixShard]]] = []  # (state elements, group, fragments)
    for index, (matrices, partition_size) in enumerate(groups):
        chosen = settings[index]
        for matrix in matrices:
            fragments = cut(matrix, partition_size, ranks)
            size = state_numel(matrix.shape, chosen["rank"], chosen["proj_type"], chosen["formulation"])
            if len(fragments) == 1:
                holder, fragment = next(iter(fragments.items()))
                whole[index][holder].append(fragment)
                load[holder] += size
            else:
                cuts.append((size, index, fragments))
    owned: dict[int, list[tuple[int, CutMatrix]]] = defaultdict(list)
    for position, (_, index, fragments) in sorted(enumerate(cuts), key=lambda item: -item[1][0]):
        owner = min(fragments, key=lambda holder: (load[holder], holder))
        matrix = plan_cut(fragments, owner, ranks, settings[index])
        for holder in fragments:
            load[holder] += matrix.state_numel(holder)
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
    return digest(list(layouts))


def digest(*parts: Any) -> str:
    """A digest of anything whose `repr` says all there is to it."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


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
