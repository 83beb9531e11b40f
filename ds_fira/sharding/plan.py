"""Which rank holds, owns and sends what: pure plans, computed the same on every rank before the first step.

A *fragment* is a matrix's overlap with one rank's partition. A matrix with one fragment is whole on its rank, which
owns it, and needs no communication ever. A matrix with several is cut, and stepped in one of the ways of
`ds_fira.sharding.split_matrix`; one of the ranks that share it is its *owner*.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar

from ds_fira.core.settings import GroupSettings
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.split_matrix import SplitMatrix, plan_split, state_numel

T = TypeVar("T")
# Most state that one rank may hold where it is spread, over an even share.
LARGEST_SHARE = 1.25
# Elements of cut matrices that an owner assembles at a time, or one matrix: gradient and weight of it, 512 MiB.
MAX_TURN_NUMEL = 2**26


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """One param group's matrices over all partitions of its flat buffer.

    Attributes:
        whole: for every dp_rank, the matrices that lie whole in its partition.
        cuts: the matrices that no rank holds whole, in buffer order.
        partition_size: elements in each partition.
    """

    whole: tuple[tuple[MatrixShard, ...], ...]
    cuts: tuple[SplitMatrix, ...]
    partition_size: int

    @property
    def base_cuts(self) -> tuple[SplitMatrix, ...]:
        """The cut matrices that are stepped whole on their owners."""
        return tuple(matrix for matrix in self.cuts if matrix.way == "base")

    @property
    def base_turns(self) -> list[GroupLayout]:
        """Layouts that share the base cuts out over turns, so that no owner assembles many at a time.

        Every owner meets its matrices in the order of `cuts`, and all owners are at work in the first turns.
        """
        queues: dict[int, list[tuple[int, SplitMatrix]]] = defaultdict(list)
        for matrix in self.base_cuts:
            queues[matrix.owner].append((math.prod(matrix.shape), matrix))
        turns = zip_longest(*(split_by_size(queue, MAX_TURN_NUMEL) for queue in queues.values()), fillvalue=[])
        return [replace(self, cuts=tuple(matrix for owned in turn for matrix in owned)) for turn in turns]

    @property
    def lean_cuts(self) -> tuple[SplitMatrix, ...]:
        """The cut matrices that are stepped where they lie."""
        return tuple(matrix for matrix in self.cuts if matrix.way == "lean")

    def owned_cuts(self, dp_rank: int) -> tuple[SplitMatrix, ...]:
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
    groups: Sequence[tuple[Sequence[Mapping[int, MatrixShard]], int]],
    ranks: int,
    settings: Sequence[GroupSettings],
    spread: bool = False,
) -> list[GroupLayout]:
    """Give every matrix that lies on several ranks an owner and a way.

    Owners balance the state: the largest matrices first, each to the least loaded of the ranks that share it, counting
    what is whole on a rank as its load from the start. The way is the one that sends less (`SplitMatrix.cheaper_way`).
    Where states are spread, an owner of a matrix that is stepped the lean way only computes its bases, and these are
    dealt out evenly; and the fullest rank gives matrices up to the lean way until no rank holds more than
    `LARGEST_SHARE` of an even share.

    Args:
        groups: for every group the fragments of its matrices by dp_rank, `offset` counted in the rank's partition, and
            the elements of a partition.
        ranks: partitions of each group.
        settings: of every group: `rank`, `proj_type`, `formulation`, `update_proj_gap`, `subspace`, `refresh_moments`
            and `exact_cuts`.
        spread: whether no state of cut matrices may exist twice (ZeRO-3, which cuts all of them).
    """
    load, work = [0] * ranks, [0] * ranks
    whole = [[[] for _ in range(ranks)] for _ in groups]
    cuts: list[tuple[int, int, Mapping[int, MatrixShard]]] = []  # (state elements, group, fragments)
    for index, (matrices, _) in enumerate(groups):
        chosen = settings[index]
        for fragments in matrices:
            holder, first = next(iter(fragments.items()))
            size = state_numel(first.shape, chosen.rank, chosen.proj_type, chosen.formulation)
            if len(fragments) == 1:
                whole[index][holder].append(first)
                load[holder] += size
            else:
                cuts.append((size, index, fragments))
    planned: dict[int, tuple[int, SplitMatrix]] = {}  # by position among the cuts: group, matrix
    for position, (_, index, fragments) in sorted(enumerate(cuts), key=lambda item: -item[1][0]):
        owner = min(fragments, key=lambda holder: (load[holder], holder))
        matrix = plan_split(fragments, owner, ranks, settings[index], spread)
        if spread and matrix.way == "lean":
            matrix = replace(matrix, owner=min(fragments, key=lambda holder: (work[holder], holder)))
        work[matrix.owner] += math.prod(matrix.shape) * min(matrix.shape)
        for holder in fragments:
            load[holder] += matrix.state_numel(holder)
        planned[position] = (index, matrix)
    if spread:
        _relieve(planned, load, [chosen.exact_cuts for chosen in settings])
    return [
        GroupLayout(
            whole=tuple(tuple(held) for held in whole[index]),
            cuts=tuple(matrix for _, (group, matrix) in sorted(planned.items()) if group == index),
            partition_size=partition_size,
        )
        for index, (_, partition_size) in enumerate(groups)
    ]


def _relieve(planned: dict[int, tuple[int, SplitMatrix]], load: list[int], exact: Sequence[bool]) -> None:
    """Step matrices of the fullest rank the lean way until it holds no more than `LARGEST_SHARE` of an even share.

    Args:
        planned: group and matrix by position, changed.
        load: elements of state on every rank, changed.
        exact: of every group `exact_cuts`, which allows no lean way.
    """
    while max(load) * len(load) > LARGEST_SHARE * sum(load):
        fullest = load.index(max(load))
        owned = [
            (state_numel(matrix.shape, matrix.rank, matrix.side), position)
            for position, (index, matrix) in planned.items()
            if matrix.way == "base" and matrix.owner == fullest and not exact[index]
        ]
        if not owned:
            return
        _, position = max(owned)
        index, before = planned[position]
        after = replace(before, way="lean")
        planned[position] = (index, after)
        for holder in before.by_rank:
            load[holder] += after.state_numel(holder) - before.state_numel(holder)


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
