"""The low-rank way to step split matrices: what crosses ranks between refreshes is no larger than R.

A step of a param group, on all ranks of the communicator. Each line is a phase of `ds_fira.core.step`; a collective is
started where its line begins, and waited for where a later line needs it:

1. where a matrix is evenly sharded, rows of P to the ranks that work with them, for this step; the first turn keeps
   what it has been sent (`ds_fira.sharding.lowrank.kept_rows`), and sends it anew where P has changed;
2. sum |G|^2 over the ranks: is the gradient finite, is a refresh due, is a basis not the one that others keep rows of;
3. parts of R and of the squared norms to the ranks that keep the entries (line 8);
4. behind 2 and 3, where a refresh is due: gradients to the owners, bases back, in rounds of one matrix an owner (lines
   4 to 7); then 1 and 3 once more for the matrices that have gone through them with their old bases;
5. the keepers update the moments (9 to 12); sum |R|^2 and the squares for the limiter (13 and 14);
6. C and phi, or what they are made of, back to the ranks that touch the entries (line 15);
7. rarely, behind 5: R and phi back, and the sum of the residual itself; then 6 again;
8. every rank updates its own weights (line 16).

2 travels beside 1 or 3, and 6 beside 5 where `answer_form` allows it, so that a step takes two round trips, and a third
at stage 3 where a turn is not short; one after another these were four and five. Two are the fewest: R needs the
gradients of all ranks, and C needs R. The matrices of a group go in *turns*, of which two are under way at
a time (`ds_fira.sharding.lowrank.turn`): one computes while what the other has started travels. A turn has at most
`MAX_STEP_NUMEL` elements, so a step's temporaries do not grow with the group. Weights and states are the same to the
bit however matrices are dealt out over turns: no number of a matrix goes by another matrix.

All ranks see the same sums, so step counts, refreshes and the limiter agree on all that hold a part of a matrix without
being sent. A rank that holds no part takes part in the same collectives. The plan gives all sizes, and what it leaves
empty is not sent at all. The host waits for its device twice a turn at most: for the sums of 2, once a group, and where
there is a limiter for those of 5, since both decide which collectives follow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_fira.core import kernels
from ds_fira.core.algorithms import Algorithm
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import STEP, MatrixState, allocate_matrices, compute_dtype, state_views
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.lowrank.agreement import Agreement
from ds_fira.sharding.lowrank.exchange import LowRankExchange
from ds_fira.sharding.lowrank.kept_rows import KeptRows
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.lowrank.refresh import LowRankRefresh
from ds_fira.sharding.lowrank.shard_step import ShardStep
from ds_fira.sharding.lowrank.turn import AT_ONCE, GroupStep, ShardStats, Turn, overlapped
from ds_fira.sharding.refresher import Refresher
from ds_fira.sharding.split_matrix import SplitMatrix

if TYPE_CHECKING:
    from ds_fira.sharding.lowrank.device_turn import DeviceGroup

# Elements of R and of borrowed bases that a turn works on, or one matrix: 64 MiB in float32. A turn holds a few as
# large, and two turns are under way.
MAX_STEP_NUMEL = 2**24
# Elements below which a group is not split for the sake of overlap: 4 MiB in float32 travel and are computed in about
# the time that further collectives take to start.
MIN_TURN_NUMEL = 2**20


class LowRankMatrices:
    """The split matrices of one param group that exchange low-rank data, as one rank sees them.

    Attributes:
        communicator: the ranks.
        plans: of the matrices that this rank holds a part of.
    """

    def __init__(
        self,
        matrices: Mapping[int, SplitMatrix],
        communicator: Communicator,
        numbers: Mapping[str, int],
        replicas: Communicator | None = None,
    ) -> None:
        """Plan the exchange.

        Args:
            matrices: the low-rank matrices of the group by their positions among its split ones.
            communicator: the ranks.
            numbers: by name, every matrix's number in the model.
            replicas: the ranks that hold the same parts as this one, and step them alike; None for this one alone.
        """
        self.communicator = communicator
        self._matrices = matrices
        rank = communicator.dp_rank
        self.plans = [
            LocalShardPlan.of(matrix, position, numbers[matrix.name], rank)
            for position, matrix in self._matrices.items()
            if rank in matrix.sharers
        ]
        self._refresh = LowRankRefresh(self._matrices, communicator, replicas)
        self._exchange = LowRankExchange(self._matrices, communicator)
        self.deal(turns_of(self._matrices))

    def deal(self, turns: Sequence[Sequence[int]]) -> None:
        """Step in these turns from now on, of which the first keeps its borrowed rows of P; nothing is kept yet.

        Args:
            turns: the positions in each; the same on every rank.
        """
        first = turns[0] if turns else ()
        self._turns = turns
        self._kept = KeptRows(first if any(self._matrices[position].shares_basis for position in first) else ())

    def move(self, move: Callable[[Tensor], Tensor]) -> None:
        """Move the borrowed rows of P that are kept."""
        self._kept.move(move)

    def allocate(self, param: Tensor, settings: GroupSettings, algorithm: Algorithm) -> dict[str, Tensor]:
        """Zero state for this rank's parts; the keys of a matrix end in ".cut" and its number among the group's.

        Args:
            param: the flat parameter.
            settings: of the param group.
            algorithm: says which states there are.
        """
        state = {}
        for plan in self.plans:
            basis = plan.matrix.basis_shape(plan.dp_rank)
            parts = allocate_matrices(
                param, basis, plan.low_rank_shape, settings.state_dtype, (), algorithm, plan.averages(settings)
            )
            state |= {key + _mark(plan): value for key, value in parts.items()}
        return state

    def step(
        self,
        param: Tensor,
        state: dict[str, Tensor],
        settings: GroupSettings,
        negligible_ratio: float,
        refresher: Refresher,
        algorithm: Algorithm,
    ) -> list[ShardStats]:
        """Make one step of all these matrices of the group; a collective call.

        Args:
            param: the flat parameter with its gradient.
            state: of the parameter; what `allocate` made is in it.
            settings: of the param group.
            negligible_ratio: as in `MatrixTask`.
            refresher: computes bases.
            algorithm: says which states there are.

        Returns:
            The numbers of the matrices that this rank has stepped its part of.

        Raises:
            ValueError: the state was loaded from a run that stepped these matrices another way.
        """
        dtype = compute_dtype(param.dtype)
        by_kernels = settings.rule is None and not settings.draws_basis and kernels.supports(param)
        states = {plan.position: self._state_of(plan, state, algorithm, dtype) for plan in self.plans}
        parts = {
            plan.position: self._part(plan, param, states[plan.position], settings, negligible_ratio, by_kernels)
            for plan in self.plans
        }

        def is_due(part: ShardStep) -> bool:
            return bool(refresher.due(state[STEP + _mark(part.plan)], [part], [part.plan.number]))

        def refresh(due: Sequence[int]) -> None:
            self._refresh.refresh(due, param, parts, settings, refresher)

        positions = list(self._matrices)
        measure = partial(self._device_group.grad_sums, param.grad) if by_kernels else None
        changed = self._kept.changed(parts)
        agreement = Agreement(self.communicator, positions, param, parts, is_due, refresh, dtype, measure, changed)
        step = GroupStep(self._matrices, self._exchange, agreement, param, settings, parts, self._kept)
        overlapped(self._turn(turn, step, negligible_ratio, by_kernels).run() for turn in self._turns)
        return sorted(step.done, key=lambda stats: stats[0].position)

    @cached_property
    def _device_group(self) -> DeviceGroup:
        # It imports Triton.
        from ds_fira.sharding.lowrank.device_turn import DeviceGroup

        return DeviceGroup(self._matrices, self.plans)

    @staticmethod
    def _part(
        plan: LocalShardPlan, param: Tensor, state: MatrixState, settings: GroupSettings, ratio: float, by_kernels: bool
    ) -> ShardStep:
        if by_kernels:
            from ds_fira.sharding.lowrank.device_part import DevicePart

            return DevicePart(plan, param, state, settings, ratio)
        fragments = plan.fragment.fragment(param), plan.fragment.fragment(param.grad)
        return ShardStep(plan, *fragments, state, settings, ratio)

    def _turn(self, positions: Sequence[int], step: GroupStep, ratio: float, by_kernels: bool) -> Turn:
        if by_kernels:
            from ds_fira.sharding.lowrank.device_turn import DeviceTurn

            return DeviceTurn(positions, step, self._device_group, ratio)
        return Turn(positions, step)

    def _state_of(
        self, plan: LocalShardPlan, state: dict[str, Tensor], algorithm: Algorithm, dtype: torch.dtype
    ) -> MatrixState:
        if STEP + _mark(plan) not in state:
            raise ValueError(
                f"{algorithm.name}: the loaded state has no part of {plan.matrix.name}, which was split or stepped "
                "another way in the run that saved it; resume on as many ranks with the settings it had (rank, "
                "proj_type, update_proj_gap, subspace, refresh_moments, exact_cuts)."
            )
        found = state_views(state, plan.matrix.side, _mark(plan), algorithm=algorithm, dtype=dtype)
        found.drawn = plan.drawn
        return found


def turns_of(matrices: Mapping[int, SplitMatrix]) -> list[list[int]]:
    """Deal matrices out over turns: of at most `MAX_STEP_NUMEL` elements, and two where their size makes it worth it.

    The elements are those of one rank, so matrices of different ranks go together however many they are. Matrices that
    borrow rows of P for a step wait for these first, so they have turns of their own; theirs come first.

    Args:
        matrices: by position.

    Returns:
        The positions in each turn.
    """
    sizes = {position: matrix.step_numel() for position, matrix in matrices.items()}
    kinds = [[p for p, matrix in matrices.items() if matrix.shares_basis == borrows] for borrows in (True, False)]
    limit = MAX_STEP_NUMEL
    if not all(kinds):
        # At half, and half of the largest, two turns suffice for all.
        half = (_fullest(matrices.values()) + max(sizes.values()) + 1) // AT_ONCE
        limit = min(limit, max(half, MIN_TURN_NUMEL))
    turns: list[list[int]] = []
    for kind in kinds:
        rooms: list[_Room] = []
        first = len(turns)
        for position in kind:
            matrix = matrices[position]
            # Where neighbours share a rank, every second one is in a turn.
            last = range(len(rooms) - 1, max(0, len(rooms) - AT_ONCE) - 1, -1)
            place = next((n for n in last if rooms[n].takes(matrix, limit)), len(rooms))
            if place == len(rooms):
                rooms.append(_Room())
                turns.append([])
            rooms[place].add(matrix)
            turns[first + place].append(position)
    return turns


class _Room:
    """What the matrices of a turn need in a step on the ranks that share them."""

    def __init__(self) -> None:
        self._taken: list[tuple[int, int, int]] = []  # the first rank, the last, elements

    def add(self, matrix: SplitMatrix) -> None:
        self._taken.append((*matrix.bounds, matrix.step_numel()))

    def takes(self, matrix: SplitMatrix, limit: int) -> bool:
        """Whether none of its ranks needs more than a limit then, or has another matrix."""
        first, last = matrix.bounds
        besides = sum(numel for low, high, numel in self._taken if low <= last and high >= first)
        return not besides or besides + matrix.step_numel() <= limit


def _fullest(matrices: Iterable[SplitMatrix]) -> int:
    """Elements that matrices need in a step on the rank that needs most."""
    changes: dict[int, int] = defaultdict(int)  # at a rank, to those of the one before
    for matrix in matrices:
        first, last = matrix.bounds
        changes[first] += matrix.step_numel()
        changes[last + 1] -= matrix.step_numel()
    return max(accumulate(changes[rank] for rank in sorted(changes)))


def _mark(plan: LocalShardPlan) -> str:
    return f".cut{plan.position}"
