"""The low-rank way to step split matrices: what crosses ranks between refreshes is no larger than R.

A step of a param group, on all ranks of the communicator and in this order, each line the phase of `ds_fira.core.step`
that it stands for:

1. sum |G|^2 over the ranks: is the gradient finite, is a refresh due;
2. where one is due: gradients to the owners, bases back, in rounds of one matrix an owner (lines 4 to 7);
3. where a matrix is evenly sharded, rows of P to the ranks that work with them, for this step;
4. parts of R and of the squared norms to the ranks that keep the entries (line 8), which update the moments (9 to 12);
5. sum |R|^2 and the squares for the limiter (lines 13 and 14);
6. rarely: R and phi back, and the sum of the residual itself;
7. C and phi back to the ranks that touch the entries (line 15); every rank updates its own weights (line 16).

From 3 on, as many matrices go together as `MAX_STEP_NUMEL` allows, so that a step's temporaries do not grow with the
group. All ranks see the same sums, so step counts, refreshes and the limiter agree on all that hold a part of a matrix
without being sent. A rank that holds no part takes part in the same collectives. The plan gives all sizes, and what it
leaves empty is not sent at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_fira.core import functional as F
from ds_fira.core.algorithms import Algorithm
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import STEP, MatrixState, allocate_matrices, compute_dtype, state_views
from ds_fira.core.step import Quotient, StepStats
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.lowrank.exchange import LowRankExchange
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.lowrank.refresh import LowRankRefresh
from ds_fira.sharding.lowrank.shard_step import ShardStep
from ds_fira.sharding.plan import split_by_size
from ds_fira.sharding.refresher import Refresher
from ds_fira.sharding.split_matrix import GRADIENT_SUMS, LOW_RANK_SUMS, SplitMatrix

# Elements of R and of borrowed bases that one rank works on at a time: 64 MiB in float32. A step holds a few as large.
MAX_STEP_NUMEL = 2**24

# Of one matrix in one step: this rank's plan, the numbers of the whole step, and the `quotient` of the entries that the
# rank keeps, None where it keeps none.
ShardStats = tuple[LocalShardPlan, StepStats, Quotient | None]


class LowRankMatrices:
    """The split matrices of one param group that exchange low-rank data, as one rank sees them.

    Attributes:
        communicator: the ranks.
        plans: of the matrices that this rank holds a part of.
    """

    def __init__(
        self, matrices: Mapping[int, SplitMatrix], communicator: Communicator, numbers: Mapping[str, int]
    ) -> None:
        """Plan the exchange.

        Args:
            matrices: the low-rank matrices of the group by their positions among its split ones.
            communicator: the ranks.
            numbers: by name, every matrix's number in the model.
        """
        self.communicator = communicator
        self._matrices = matrices
        rank = communicator.dp_rank
        self.plans = [
            LocalShardPlan.of(matrix, position, numbers[matrix.name], rank)
            for position, matrix in self._matrices.items()
            if rank in matrix.sharers
        ]
        self._refresh = LowRankRefresh(self._matrices, communicator)
        self._exchange = LowRankExchange(self._matrices, communicator)
        sizes = [(matrix.step_numel(), position) for position, matrix in self._matrices.items()]
        self._turns = split_by_size(sizes, MAX_STEP_NUMEL)

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
        parts = {
            plan.position: ShardStep(
                plan,
                plan.fragment.fragment(param),
                plan.fragment.fragment(param.grad),
                self._state_of(plan, state, algorithm, dtype),
                settings,
                negligible_ratio,
            )
            for plan in self.plans
        }
        totals, due = self._decide(param, parts, state, refresher)
        # NaN compares as false.
        finite = {position: total for position, total in totals.items() if total < torch.finfo(dtype).max}
        possible = [position for position in due if finite.get(position, 0.0) > 0.0]
        self._refresh.refresh(possible, param, parts, settings, refresher)
        done: list[ShardStats] = []
        for turn in self._turns:
            mine = {position: parts.pop(position) for position in turn if position in parts}
            done += self._step_together(turn, mine, finite, param, settings)
        return done

    def _state_of(
        self, plan: LocalShardPlan, state: dict[str, Tensor], algorithm: Algorithm, dtype: torch.dtype
    ) -> MatrixState:
        if STEP + _mark(plan) not in state:
            raise ValueError(
                f"{algorithm.name}: the loaded state has no part of {plan.matrix.name}, which was split or stepped "
                "another way in the run that saved it; resume on as many ranks with the settings it had (rank, "
                "proj_type, update_proj_gap, subspace, refresh_moments, exact_cuts)."
            )
        return state_views(state, plan.matrix.side, _mark(plan), algorithm=algorithm, dtype=dtype)

    def _step_together(
        self,
        turn: Sequence[int],
        parts: dict[int, ShardStep],
        finite: Mapping[int, float],
        param: Tensor,
        settings: GroupSettings,
    ) -> list[ShardStats]:
        """Everything but the refresh, for the matrices at some positions; a collective call.

        Args:
            turn: the positions.
            parts: this rank's, by position.
            finite: |G|^2 of every matrix of the group whose gradient is finite.
            param: the flat parameter.
            settings: of the param group.
        """
        self._exchange.borrow_bases(turn, param, parts)
        for part in parts.values():
            part.project()
        self._exchange.collect(turn, param, parts)
        stepped = {position: part for position, part in parts.items() if position in finite and part.state.has_basis}
        rows = {position: row for position, part in stepped.items() if (row := part.advance()) is not None}
        together = self._sum(turn, param, LOW_RANK_SUMS, rows)
        found = squares_of(together, [finite.get(position, math.nan) for position in turn], settings)
        sums, squares = (dict(zip(turn, numbers, strict=True)) for numbers in (together, found))
        scaled = {position: part.scale(sums[position], squares[position]) for position, part in stepped.items()}
        exact = self._exact_squares(turn, param, stepped, found, settings)
        answers, done = {}, []
        for position, part in stepped.items():
            residual_sq, scaled_grad_sq = scaled[position]
            residual_sq = exact.get(position, residual_sq)
            stats, answers[position] = part.finish(residual_sq, scaled_grad_sq, sums[position][0], finite[position])
            done.append((part.plan, stats, part.quotient()))
        arrived = self._exchange.send_back(turn, param, parts, answers)
        for position, part in parts.items():
            if position in stepped:
                part.apply(*part.complete(answers[position], arrived[position]))
            elif position in finite:
                part.decay()
        return done

    def _sum(self, positions: Sequence[int], param: Tensor, width: int, rows: dict[int, Sequence[Tensor]]) -> Tensor:
        """Sum a few float64 of some matrices over all ranks.

        Args:
            positions: of the matrices.
            param: gives the device.
            width: numbers for each matrix.
            rows: by position, this rank's part of them, 0-dim; nothing is added for the others.

        Returns:
            The sums, (number of positions, width).
        """
        none = torch.zeros(width, dtype=torch.float64, device=param.device)
        own = [torch.stack(tuple(rows[position])) if position in rows else none for position in positions]
        return self.communicator.all_reduce(torch.stack(own))

    def _decide(
        self, param: Tensor, parts: dict[int, ShardStep], state: dict[str, Tensor], refresher: Refresher
    ) -> tuple[dict[int, float], list[int]]:
        """|G|^2 of every matrix by position, and the positions whose refresh is due; the same on all ranks."""
        rows = {}
        for position, part in parts.items():
            plan, grad_sq = part.plan, part.grad_square()
            # The owner decides: by the refresher's bound of its step count, so that few steps read one from a device.
            due = plan.owns and bool(refresher.due(state[STEP + _mark(plan)], [part], [plan.number]))
            rows[position] = (grad_sq, torch.full_like(grad_sq, due))
        found = self._sum(list(self._matrices), param, GRADIENT_SUMS, rows).tolist()
        totals = {position: total for position, (total, _) in zip(self._matrices, found, strict=True)}
        return totals, [position for position, (_, due) in zip(self._matrices, found, strict=True) if due]

    def _exact_squares(
        self,
        turn: Sequence[int],
        param: Tensor,
        stepped: dict[int, ShardStep],
        squares: Tensor,
        settings: GroupSettings,
    ) -> dict[int, Tensor]:
        """|S|^2 from the residual itself, by position, where the difference of squares has lost its digits.

        Which matrices these are all ranks know from the same sums; where there is none nothing is sent.
        """
        if not settings.measures_residual:
            return {}
        flags = F.residual_needed(*squares.unbind(1)).tolist()
        needed = [position for position, flag in zip(turn, flags, strict=True) if flag]
        if not needed:
            return {}
        concerned = {position: stepped[position] for position in needed if position in stepped}
        kept = {position: part.kept_residual() for position, part in concerned.items()}
        arrived = self._exchange.send_back(needed, param, concerned, kept)
        rows = {}
        for position, part in concerned.items():
            rows[position] = (part.residual_square(*part.complete(kept[position], arrived[position])),)
        sums = self._sum(needed, param, 1, rows)
        return dict(zip(needed, sums[:, 0], strict=True))


def squares_of(sums: Tensor, totals: Sequence[float], settings: GroupSettings) -> Tensor:
    """|S|^2 as the form of the residual has it and |phi * G|^2: as summed, or with phi = 1 from the sums.

    With one scaling factor for a matrix its squares are found without it, so that ranks which hold no part of the
    matrix know too whether digits are lost.

    Args:
        sums: over all ranks, of what `ShardStep.advance` returns, (k, 3).
        totals: |G|^2 of the same matrices; NaN where it is not finite.
        settings: of the param group.

    Returns:
        (k, 2), float64.
    """
    if not settings.has_one_factor:
        return sums[:, 1:]
    total = sums.new_tensor(totals)
    return torch.stack([settings.residual_form.residual_sq(total, sums[:, 2], settings), total], dim=1)


def _mark(plan: LocalShardPlan) -> str:
    return f".cut{plan.position}"
