"""The lean way to step cut matrices: what crosses ranks between refreshes is no larger than R.

A step of a param group, on all ranks of the communicator and in this order:

1. sum |G|^2 over the ranks: is the gradient finite, is a refresh due;
2. where one is due: gradients to the owners, bases back, in rounds of one matrix an owner;
3. where they are spread, rows of P to the ranks that work with them, for this step;
4. parts of R and of the squared norms to the ranks that keep the entries; these update the moments;
5. sum |R|^2 and the squares for the limiter;
6. rarely: R and phi back, and the sum of the residual itself;
7. C and phi back to the ranks that touch the entries; every rank updates its own weights.

From 3 on, as many matrices go together as `MAX_STEP_NUMEL` allows, so that what a step needs beside the state does not
grow with the group. All ranks see the same sums, so step counts, refreshes and the limiter are the same on all that
share a matrix without being sent. A rank that holds no part takes part in the same collectives. Sizes are known from
the plan, and what the plan leaves empty is not sent at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_fira.core import functional as F
from ds_fira.core.algorithms import algorithm_of
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import STEP, allocate_matrices, compute_dtype, state_views
from ds_fira.core.step import inner_alpha
from ds_fira.core.subspace import refresh_due
from ds_fira.observe.metrics import StepMetrics
from ds_fira.observe.scaling_series import Series
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.lowrank.exchange import LowRankExchange
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.lowrank.refresh import LowRankRefresh
from ds_fira.sharding.lowrank.shard_step import ShardStep
from ds_fira.sharding.plan import split_by_size
from ds_fira.sharding.refresher import Refresher, phase
from ds_fira.sharding.split_matrix import GRADIENT_SUMS, LOW_RANK_SUMS, SplitMatrix

# Elements of R and of borrowed bases that one rank works on at a time: 64 MiB in float32. A step holds a few as large.
MAX_STEP_NUMEL = 2**24


class LowRankMatrices:
    """The cut matrices of one param group that are stepped where they lie, as one rank sees them."""

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
        self.shares = [
            LocalShardPlan.of(matrix, position, numbers[matrix.name], rank)
            for position, matrix in self._matrices.items()
            if rank in matrix.sharers
        ]
        self._refresh = LowRankRefresh(self._matrices, communicator)
        self._exchange = LowRankExchange(self._matrices, communicator)
        sizes = [(matrix.step_numel(), position) for position, matrix in self._matrices.items()]
        self._turns = split_by_size(sizes, MAX_STEP_NUMEL)

    def allocate(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Zero state for this rank's parts; the keys of a matrix end in ".cut" and its number among the group's cuts.

        Args:
            param: the flat parameter.
            group: the param group.
        """
        state = {}
        for share in self.shares:
            basis = share.matrix.basis_shape(share.dp_rank)
            parts = allocate_matrices(param, basis, share.low_rank_shape, group["state_dtype"], (), algorithm_of(group))
            state |= {key + _mark(share): value for key, value in parts.items()}
        return state

    def step(
        self,
        param: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
        resolution: float,
        refresher: Refresher,
        metrics: StepMetrics,
        record: Sequence[Series] = (),
    ) -> None:
        """Make one step of all lean matrices of the group; a collective call.

        Args:
            param: the flat parameter with its gradient.
            state: of the parameter; what `allocate` made is in it.
            group: the param group.
            resolution: below this share of |phi * G| a residual is rounding.
            refresher: computes bases.
            metrics: counts on the owner of each matrix.
            record: what records the scaling factors of each of `shares`; () in a step that is not recorded.

        Raises:
            ValueError: the state was loaded from a run that stepped these matrices another way.
        """
        for share in self.shares:
            if STEP + _mark(share) not in state:
                raise ValueError(
                    f"FiraAdam: the loaded state has no part of {share.matrix.name}, which was cut or stepped another "
                    "way in the run that saved it; resume on as many ranks with the settings it had (rank, proj_type, "
                    "update_proj_gap, subspace, refresh_moments, exact_cuts)."
                )
        parts = {
            share.position: ShardStep(
                share,
                share.fragment.fragment(param),
                share.fragment.fragment(param.grad),
                state_views(
                    state,
                    share.matrix.side,
                    _mark(share),
                    algorithm=algorithm_of(group),
                    dtype=compute_dtype(param.dtype),
                ),
                group,
                resolution,
            )
            for share in self.shares
        }
        totals, due = self._decide(param, parts, group)
        # NaN compares as false.
        limit = torch.finfo(compute_dtype(param.dtype)).max
        usable = {position: total for position, total in totals.items() if total < limit}
        possible = [position for position in due if usable.get(position, 0.0) > 0.0]
        self._refresh.refresh(possible, param, parts, GroupSettings.of(group), refresher)
        series = {share.position: one for share, one in zip(self.shares, record, strict=False)}
        for turn in self._turns:
            mine = {position: parts.pop(position) for position in turn if position in parts}
            self._step_together(turn, mine, usable, param, group, metrics, series)

    def _step_together(
        self,
        turn: Sequence[int],
        parts: dict[int, ShardStep],
        usable: Mapping[int, float],
        param: Tensor,
        group: dict[str, Any],
        metrics: StepMetrics,
        record: Mapping[int, Series],
    ) -> None:
        """Everything but the refresh, for the matrices at some positions; a collective call.

        Args:
            turn: the positions.
            parts: this rank's, by position.
            usable: |G|^2 of every lean matrix of the group whose gradient is finite.
            param: the flat parameter.
            group: the param group.
            metrics: counts on the owner of each matrix.
            record: by position, what records the scaling factors of this rank's parts.
        """
        self._exchange.borrow_bases(turn, param, parts)
        for part in parts.values():
            part.project()
        self._exchange.collect(turn, param, parts)
        stepped = {position: part for position, part in parts.items() if position in usable and part.known}
        sums = self._sum(
            turn, param, LOW_RANK_SUMS, {position: torch.stack(part.advance()) for position, part in stepped.items()}
        )
        for position, part in stepped.items() if record else ():
            if part.step is not None:
                record[position].add(part.step.direction_sq, part.step.low_rank_sq, part.step.correction)
        squares = squares_of(sums, usable, group)
        scaled = {position: part.scale(sums[position], squares[position]) for position, part in stepped.items()}
        exact = self._exact_squares(param, stepped, squares, group)
        answers = {}
        for position, part in stepped.items():
            square, whole = scaled[position]
            square = exact.get(position, square)
            answers[position] = part.finish(square, whole, sums[position][0], usable[position], metrics)
        arrived = self._exchange.send_back(turn, param, parts, answers)
        for position, part in parts.items():
            if position in stepped:
                part.apply(*part.complete(answers[position], arrived[position]))
            elif position in usable:
                part.decay()

    def _sum(self, positions: Sequence[int], param: Tensor, width: int, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        """Sum a few float64 of some matrices over all ranks.

        Args:
            positions: of the matrices.
            param: gives the device.
            width: numbers for each matrix.
            rows: by position, this rank's part of them, (width,); nothing is added for the others.

        Returns:
            By position the sums, (width,).
        """
        none = torch.zeros(width, dtype=torch.float64, device=param.device)
        added = self.communicator.all_reduce(torch.stack([rows.get(position, none) for position in positions]))
        return dict(zip(positions, added, strict=True))

    def _decide(
        self, param: Tensor, parts: dict[int, ShardStep], group: dict[str, Any]
    ) -> tuple[dict[int, float], list[int]]:
        """|G|^2 of every lean matrix by position, and the positions whose refresh is due; the same on all ranks."""
        rows = {}
        for position, part in parts.items():
            moved = phase(group, part.share.number)
            last = int(part.state.refresh_step)
            waits = refresh_due(int(part.state.step), last, group["update_proj_gap"], moved)
            square = part.grad_square()
            rows[position] = torch.stack([square, torch.full_like(square, waits and part.share.owns)])
        found = torch.stack(list(self._sum(list(self._matrices), param, GRADIENT_SUMS, rows).values())).tolist()
        totals = {position: total for position, (total, _) in zip(self._matrices, found, strict=True)}
        return totals, [position for position, (_, due) in zip(self._matrices, found, strict=True) if due]

    def _exact_squares(
        self, param: Tensor, stepped: dict[int, ShardStep], squares: dict[int, Tensor], group: dict[str, Any]
    ) -> dict[int, Tensor]:
        """|S|^2 from the residual itself, by position, where the difference of squares has lost its digits.

        Which matrices these are all ranks know from the same sums; where there is none nothing is sent.
        """
        if group["limiter"] != "growth":
            return {}
        square, whole = torch.stack(list(squares.values())).unbind(1)
        flags = F.residual_needed(square, whole).tolist()
        needed = [position for position, flag in zip(squares, flags, strict=True) if flag]
        if not needed:
            return {}
        concerned = {position: stepped[position] for position in needed if position in stepped}
        kept = {position: part.kept_residual() for position, part in concerned.items()}
        arrived = self._exchange.send_back(needed, param, concerned, kept)
        rows = {}
        for position, part in concerned.items():
            rows[position] = part.residual_square(*part.complete(kept[position], arrived[position])).unsqueeze(0)
        sums = self._sum(needed, param, 1, rows)
        return {position: sums[position][0] for position in needed}


def squares_of(sums: dict[int, Tensor], totals: Mapping[int, float], group: dict[str, Any]) -> dict[int, Tensor]:
    """|S|^2 as a difference of squares and |phi * G|^2 by position, (2,): as summed, or with phi = 1 from |R|^2.

    With one scaling factor for a matrix its squares are found without it, so that ranks which hold no part of the
    matrix know too whether digits are lost.
    """
    if group["scaling"] == "column":
        return {position: part[1:] for position, part in sums.items()}
    alpha, found = inner_alpha(group), {}
    for position, part in sums.items():
        total = part.new_tensor([totals.get(position, math.nan)])
        pair = F.difference_of_squares(total, part[:1], torch.ones_like(total), alpha)
        found[position] = torch.stack(pair)
    return found


def _mark(share: LocalShardPlan) -> str:
    return f".cut{share.position}"
