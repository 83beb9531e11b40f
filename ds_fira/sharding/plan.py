"""Which rank holds, owns and sends what: pure plans, computed the same on every rank before the first step.

ZeRO splits the flat buffer of a param group into one partition for each rank. A *fragment* is a matrix's overlap with a
partition:

    buffer      | A A A A A A | B B B B B B | C C C C C C | pad
    partitions  [0 . . . . . . . . . )[1 . . . . . . . . . . . )
    fragments     A             B        B    C

    A, C   unsplit: the rank that holds the matrix owns and steps it, and never communicates about it
    B      split: ranks 0 and 1 share it, one of them owns it, and it is stepped in one of the two ways of
           `ds_fira.sharding.split_matrix`, whichever sends less (`SplitMatrix.cheaper_way`), unless one rank would
           have far more to hold or to send than others (`plan_groups`)

Owners balance the state that the ranks hold. Before the first step all ranks compare a hash of their plans. Nothing
here holds a tensor or communicates.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TypeVar

from ds_fira.core.settings import GroupSettings
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.projection import state_numel
from ds_fira.sharding.split_matrix import SplitMatrix, plan_split

T = TypeVar("T")
# The fullest rank's state over an even share, at most.
MAX_IMBALANCE = 1.25
# Where no rank holds more elements of state than this, 48 MB in float32, little is gained. There a plan may be less
# even at stages 1 and 2, and at stage 3 if to even it out sends more than so many times as much in a step.
MAX_UNEVEN_NUMEL, MAX_UNEVEN_COST = 12 * 10**6, 5
# Sharers above which what all of them send, R of a left matrix or its gradient, is much for one owner to take in.
MANY_SHARERS = 8
# Elements that an owner takes in and gives back in a step, above which a step may be waiting for it: 16 MiB in float32.
BUSY_OWNER_NUMEL = 2**22
# Elements of split matrices that an owner gathers at a time, or one matrix: gradient and weight of it, 512 MiB.
MAX_TURN_NUMEL = 2**26


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """One param group's matrices over all partitions of its flat buffer.

    Attributes:
        unsplit: for every dp_rank, the matrices that lie whole in its partition, in buffer order.
        split: the matrices that partition boundaries split, in buffer order.
        partition_size: elements in each partition.
    """

    unsplit: tuple[tuple[MatrixShard, ...], ...]
    split: tuple[SplitMatrix, ...]
    partition_size: int

    def __repr__(self) -> str:
        """What the hash of a plan is made of: as version 0.1.0 wrote it, for its checkpoints hold such hashes."""
        return f"GroupLayout(whole={self.unsplit}, cuts={self.split}, partition_size={self.partition_size})"

    @property
    def low_rank(self) -> dict[int, SplitMatrix]:
        """The matrices that are stepped where they lie, by their positions in `split`."""
        return {position: matrix for position, matrix in enumerate(self.split) if matrix.way == "low_rank"}

    def gathered_by(self, dp_rank: int) -> tuple[SplitMatrix, ...]:
        """The split matrices that `dp_rank` gathers, because it owns them, and steps whole."""
        return tuple(matrix for matrix in self.split if matrix.way == "gathered" and matrix.owner == dp_rank)

    @property
    def gathered_turns(self) -> list[tuple[SplitMatrix, ...]]:
        """The matrices stepped whole on their owners, in turns of `MAX_TURN_NUMEL` elements an owner."""
        gathered = [(matrix, matrix) for matrix in self.split if matrix.way == "gathered"]
        return [tuple(turn) for turn in owner_turns(gathered, MAX_TURN_NUMEL)]


def plan_groups(
    groups: Sequence[tuple[Sequence[Mapping[int, MatrixShard]], int]],
    ranks: int,
    settings: Sequence[GroupSettings],
    evenly_sharded: bool = False,
    beside: int = 0,
) -> list[GroupLayout]:
    """Give every matrix that lies on several ranks an owner and a way.

    The matrices with the largest states come first, and each goes to the least loaded of the ranks that share it. A
    rank's load is the state that it holds; unsplit matrices count from the start. An evenly sharded matrix loads all
    its sharers alike; its owner only computes the bases, so these are dealt out by the work that they make. Where a
    rank would hold more than `MAX_IMBALANCE` even shares, its matrices are sharded evenly.

    Args:
        groups: for every group the fragments of its matrices by dp_rank, `offset` counted in the rank's partition, and
            the elements of a partition.
        ranks: partitions of each group.
        settings: of every group.
        evenly_sharded: whether no state of split matrices may exist twice (ZeRO-3, which splits all of them).
        beside: elements of state that every rank holds for parameters that are not projected.
    """
    load, work = [0] * ranks, [0] * ranks
    unsplit: list[list[list[MatrixShard]]] = [[[] for _ in range(ranks)] for _ in groups]
    to_plan: list[tuple[int, int, int, Mapping[int, MatrixShard]]] = []  # state elements, position, group, fragments
    for index, (matrices, _) in enumerate(groups):
        own = settings[index]
        for fragments in matrices:
            holder, first = next(iter(fragments.items()))
            size = state_numel(first.shape, own.rank, own.proj_type, own.formulation, drawn=own.draws_basis)
            if len(fragments) > 1:
                to_plan.append((size, len(to_plan), index, fragments))
                continue
            unsplit[index][holder].append(first)
            load[holder] += size
    planned: dict[int, tuple[int, SplitMatrix]] = {}  # group and matrix by position in buffer order
    for _, position, index, fragments in sorted(to_plan, key=lambda item: -item[0]):
        sharers, own = sorted(fragments), settings[index]
        matrix = plan_split(fragments, min(sharers, key=load.__getitem__), ranks, own, evenly_sharded)
        if matrix.side == "left" and len(sharers) > MANY_SHARERS and not (evenly_sharded or own.exact_cuts):
            matrix = replace(matrix, way="low_rank", evenly_sharded=True)
        if matrix.evenly_sharded and matrix.way == "low_rank":
            matrix = replace(matrix, owner=min(sharers, key=work.__getitem__))
        work[matrix.owner] += math.prod(matrix.shape) * min(matrix.shape)
        _add(load, matrix, 1)
        planned[position] = (index, matrix)
    _relieve(planned, load, settings)
    _balance(planned, load, settings, MAX_UNEVEN_NUMEL - beside)
    return [
        GroupLayout(
            unsplit=tuple(map(tuple, unsplit[index])),
            split=tuple(matrix for _, (group, matrix) in sorted(planned.items()) if group == index),
            partition_size=partition_size,
        )
        for index, (_, partition_size) in enumerate(groups)
    ]


def _add(load: list[int], matrix: SplitMatrix, sign: int) -> None:
    """Count a matrix's state, or no longer, in the elements of state on every rank."""
    if matrix.way == "gathered":
        load[matrix.owner] += sign * matrix.state_numel(matrix.owner)
        return
    change, sharers, numels = (operator.add if sign > 0 else operator.sub), matrix.sharers, matrix.sums.state_numel
    if isinstance(sharers, range):  # of all ranks, for every matrix: in one go
        load[sharers.start : sharers.stop] = map(change, load[sharers.start : sharers.stop], numels)
        return
    for holder, numel in zip(sharers, numels, strict=True):
        load[holder] = change(load[holder], numel)


def _change(planned: dict[int, tuple[int, SplitMatrix]], load: list[int], position: int) -> None:
    """Shard a matrix evenly and step it the low-rank way."""
    index, before = planned[position]
    after = replace(before, way="low_rank", evenly_sharded=True)
    planned[position] = (index, after)
    _add(load, before, -1)
    _add(load, after, 1)


def _state_holders(matrix: SplitMatrix) -> Sequence[int]:
    return (matrix.owner,) if matrix.way == "gathered" else matrix.sharers


def _relieve(planned: dict[int, tuple[int, SplitMatrix]], load: list[int], settings: Sequence[GroupSettings]) -> None:
    """Step the gathered matrices of a group where they lie if that keeps no rank as long as its busiest owner.

    Which way sends less over all ranks says nothing about one rank: a group of few matrices has many ranks wait for a
    few owners. Concerns matrices that are evenly sharded over more than `MANY_SHARERS`; arguments as of `_balance`.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for position, (index, matrix) in planned.items():
        many = matrix.evenly_sharded and len(matrix.sharers) > MANY_SHARERS
        if many and matrix.way == "gathered" and not settings[index].exact_cuts:
            groups[index].append(position)
    for index, positions in groups.items():
        busy: dict[int, float] = defaultdict(float)
        together = 0.0
        for matrix in (planned[position][1] for position in positions):
            busy[matrix.owner] += matrix.step_cost("gathered", len(load), settings[index])
            together += matrix.step_cost("low_rank", len(load), settings[index]) / len(matrix.sharers)
        if max(busy.values()) > max(together, BUSY_OWNER_NUMEL):
            for position in positions:
                _change(planned, load, position)


def _balance(
    planned: dict[int, tuple[int, SplitMatrix]], load: list[int], settings: Sequence[GroupSettings], little: int
) -> None:
    """Shard matrices of the fullest rank evenly, the low-rank way, until no load exceeds `MAX_IMBALANCE` even shares.

    Args:
        planned: group and matrix by position, changed.
        load: elements of state on every rank, changed.
        settings: of every group; `exact_cuts` forbids the low-rank way.
        little: a load up to which a matrix is sharded evenly only if that costs little.
    """

    def worth_it(position: int) -> bool:
        index, matrix = planned[position]
        costs = [matrix.step_cost(way, len(load), settings[index]) for way in ("low_rank", "gathered")]
        return matrix.evenly_sharded and costs[0] <= MAX_UNEVEN_COST * costs[1]

    held: dict[int, set[int]] = defaultdict(set)  # by rank, positions of matrices that can be sharded more evenly
    for position, (index, matrix) in planned.items():
        if not settings[index].exact_cuts and (matrix.way == "gathered" or not matrix.evenly_sharded):
            for holder in _state_holders(matrix):
                held[holder].add(position)
    before: dict[int, tuple[int, SplitMatrix]] = {}
    while max(load) * len(load) > MAX_IMBALANCE * sum(load):
        fullest = load.index(max(load))
        chosen: Iterable[int] = held[fullest]
        if load[fullest] <= little:
            before = before or dict(planned)
            chosen = filter(worth_it, chosen)
        found = [(planned[position][1].state_numel(fullest), position) for position in chosen]
        if not found:
            planned.update(before if held[fullest] else {})  # half of the way costs, and gains nothing
            return
        _, position = max(found)
        for holder in _state_holders(planned[position][1]):
            held[holder].discard(position)
        _change(planned, load, position)


def plan_hash(layouts: Iterable[GroupLayout]) -> str:
    """A digest of the plan, to be equal on all ranks."""
    return digest(list(layouts))


def digest(*parts: object) -> str:
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
        ranks: partitions that ZeRO will split each group into.
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


def owner_turns(items: Iterable[tuple[SplitMatrix, T]], limit: int) -> list[list[T]]:
    """Share (matrix, item) pairs out over turns in which each owner has at most `limit` elements, or one matrix.

    Every owner meets its matrices in their order, and all owners are at work in the first turns.
    """
    queues: dict[int, list[tuple[int, T]]] = defaultdict(list)
    for matrix, item in items:
        queues[matrix.owner].append((math.prod(matrix.shape), item))
    turns = zip_longest(*(split_by_size(queue, limit) for queue in queues.values()), fillvalue=())
    return [[item for owned in turn for item in owned] for turn in turns]


def split_by_size(items: Sequence[tuple[int, T]], limit: int) -> list[list[T]]:
    """Split a sequence of (size, item) pairs into runs whose sizes sum to at most `limit`, or that are one item."""
    groups: list[list[T]] = []
    room = 0
    for size, item in items:
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= size
    return groups
