"""One step of one matrix, or of a batch of one shape: Algorithm 1 with the paper's or the released code's formulas.

Nothing here reads a number from the device. On a CPU the full-size functions ask for the few decisions there are (is
the gradient finite, does the residual's norm need the residual); the kernels for GPUs decide where the data is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ds_fira.core import base_optimizer, kernels, quantization
from ds_fira.core import functional as F
from ds_fira.core.algorithms import without_residual
from ds_fira.core.base_optimizer import rule_direction, rule_of, store
from ds_fira.core.state import EXP_AVG, EXP_AVG_SQ, MatrixState
from ds_fira.observe.metrics import StepMetrics
from ds_fira.observe.scaling_series import Series, add_batch


@dataclass
class MatrixTask:
    """What to step: views of weights and gradients, their state, their group. k matrices of one shape are a batch.

    Attributes:
        weight: (m, n) or (k, m, n), updated in place.
        grad: the same shape, any floating dtype.
        state: of the same k matrices.
        group: the param group.
        resolution: below this share of |phi * G| a residual is rounding.
        record: what records the scaling factors of each of the k; () in a step that is not recorded.
    """

    weight: Tensor
    grad: Tensor
    state: MatrixState
    group: dict[str, Any]
    resolution: float
    record: tuple[Series, ...] = ()

    @cached_property
    def grad_square(self) -> float:
        """|G|^2 of one matrix, in the host; zero, NaN and infinity say that the gradient has no subspace."""
        return float(total_square(self.grad, self.state))

    @property
    def finite(self) -> bool:
        """Whether one matrix's gradient is finite, and its squares and their sum are too in the state's dtype."""
        return self.grad_square < torch.finfo(self.state.dtype).max


def total_square(grad: Tensor, state: MatrixState) -> Tensor:
    """|G|^2 of a gradient, or of a block of one, float64, 0-dim; formed in blocks of rows."""
    blocks = grad.split(F.summed_rows(grad.shape, 4.0))
    return sum(F.squared_norms(block.to(state.dtype), state.side).sum() for block in blocks)


@dataclass
class LowRankStep:
    """What lines 8 to 13 of Algorithm 1 give: everything of a step that is no larger than R.

    Attributes:
        low_rank: R.
        direction: N.
        low_rank_sq: `squared_norms` of R.
        phi: scaling factors before the limiter, float64.
        square: |S|^2 as a difference of squares.
        whole: |phi * G|^2.
        correction: Adam's bias correction, or a rule's factor of the step size.
        direction_sq: `squared_norms` of N.
    """

    low_rank: Tensor
    direction: Tensor
    low_rank_sq: Tensor
    phi: Tensor
    square: Tensor
    whole: Tensor
    correction: Tensor
    direction_sq: Tensor


def inner_alpha(group: dict[str, Any]) -> float:
    """A inside the update: alpha in the released formulation, 1 in the paper's, where alpha multiplies all of it."""
    return 1.0 if group["formulation"] == "paper" else group["alpha"]


def low_rank_step(
    low_rank: Tensor, grad_sq: Tensor, state: MatrixState, group: dict[str, Any], usable: Tensor, ops: Any = F
) -> LowRankStep:
    """Lines 8 to 11 of Algorithm 1: moments, N, scaling factors, and the squares that the limiter needs.

    Args:
        low_rank: R.
        grad_sq: `squared_norms` of G.
        state: its moments are updated and its step is counted where the gradient is usable.
        group: the param group.
        usable: whether the gradient is finite, (...).
        ops: `ds_fira.core.functional` or `ds_fira.core.kernels`.
    """
    state.step += usable
    correction = step_factor(state.step, group)
    direction, direction_sq, low_rank_sq = adapt(low_rank, state, group, usable, ops)
    if without_residual(group):
        none = torch.zeros_like(correction)
        return LowRankStep(low_rank, direction, low_rank_sq, none.unsqueeze(-1), none, none, correction, direction_sq)
    phi = scaling_factors(direction_sq, low_rank_sq, correction, group)
    square, whole = F.difference_of_squares(grad_sq, low_rank_sq, phi, inner_alpha(group))
    return LowRankStep(low_rank, direction, low_rank_sq, phi, square, whole, correction, direction_sq)


def step_factor(step: Tensor, group: dict[str, Any]) -> Tensor:
    """The base optimizer's factor of the learning rate, Adam's bias correction; float64, of `step`'s shape."""
    rule = rule_of(group)
    return F.bias_correction(step, group["betas"]) if rule is None else base_optimizer.step_factor(rule, step)


def adapt(
    low_rank: Tensor, state: MatrixState, group: dict[str, Any], usable: Tensor, ops: Any = F
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines 9 and 10 of Algorithm 1 on the stored moments: N, and `squared_norms` of N and of R.

    Arguments as in `low_rank_step`.
    """
    rule = rule_of(group)
    if rule is not None:
        direction = rule_direction(rule, low_rank, state.moments, state.step, usable, decided=ops is F)
        return direction, F.squared_norms(direction, state.side), F.squared_norms(low_rank, state.side)
    exp_avg, exp_avg_sq = (quantization.read(stored, state.dtype) for stored in (state.exp_avg, state.exp_avg_sq))
    result = ops.adam_direction_(
        low_rank, exp_avg, exp_avg_sq, betas=group["betas"], eps=group["eps"], side=state.side, usable=usable
    )
    store(state.moments, {EXP_AVG: exp_avg, EXP_AVG_SQ: exp_avg_sq}, state.step)
    return result


def scaling_factors(direction_sq: Tensor, low_rank_sq: Tensor, correction: Tensor, group: dict[str, Any]) -> Tensor:
    """Phi before the limiter, as `F.scaling_factors`, with the bias correction of the paper's formulation."""
    phi = F.scaling_factors(direction_sq, low_rank_sq, group["scaling"])
    if group["formulation"] == "paper" and group["scaling"] != "none":
        # Algorithm 1 corrects N before the scaling factors are taken, the released code the step size after all.
        phi = phi * correction.unsqueeze(-1)
    return phi


def limit(
    square: Tensor,
    whole: Tensor,
    task_resolution: float,
    state: MatrixState,
    group: dict[str, Any],
    usable: Tensor,
) -> Tensor | None:
    """The norm-growth limiter's divisor, None without one; the residual norm in the state is updated.

    Args:
        square: |S|^2, summed exactly where the difference of squares would not do.
        whole: |phi * G|^2.
        task_resolution: below this share of |phi * G| a residual is rounding.
        state: its residual norm is updated.
        group: the param group.
        usable: whether the gradient is finite.
    """
    if group["limiter"] != "growth":
        return None
    divisor, norm = F.limit_growth(
        square, whole, state.residual_norm.double(), gamma=group["gamma"], resolution=task_resolution
    )
    state.residual_norm.copy_(torch.where(usable, norm, state.residual_norm))
    return divisor


def carry_step(
    step: LowRankStep, divisor: Tensor | None, state: MatrixState, group: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What is left to do at full size: W <- keep * W - (phi * G + P C).

    Args:
        step: its direction is used up.
        divisor: the limiter's, None without one.
        state: of the matrix, or of the part of it that `step` is of.
        group: the param group.

    Returns:
        phi and C = a N - a phi R, the step size and (1 - lr * weight_decay) folded into both; in the state's dtype.
        Without a residual C = a N.
    """
    paper = group["formulation"] == "paper"
    phi = step.phi * group["residual_scale"]
    if divisor is not None:
        phi = phi / divisor.unsqueeze(-1)
    step_size = group["lr"] * decay_factor(group) * (group["alpha"] if paper else step.correction.unsqueeze(-1))
    phi = (phi * step_size).to(state.dtype)
    # N's own factor: step size, a, and in the paper's formulation the bias correction.
    alpha = inner_alpha(group)
    factor = step_size * (step.correction.unsqueeze(-1) if paper else alpha)
    carried = step.direction.mul_(factor.unsqueeze(-1).to(state.dtype))
    if without_residual(group):
        return phi, carried
    across = phi.unsqueeze(-2 if state.side == "left" else -1)
    return phi, carried.addcmul_(step.low_rank, across, value=-alpha)


def decay_factor(group: dict[str, Any]) -> float:
    """What decoupled weight decay leaves of a weight in one step, 1 - lr * weight_decay."""
    return 1.0 - group["lr"] * group["weight_decay"]


def operands(basis: Tensor, carried: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """The two factors whose product goes back into W: (P, C) on the left, (C, P') on the right."""
    return (basis, carried) if side == "left" else (carried, basis.mT)


def update(task: MatrixTask, metrics: StepMetrics) -> None:
    """Lines 8 to 16 of Algorithm 1, and weight decay, for matrices that have had their first refresh or wait for it.

    A gradient that is not finite leaves everything as it is: one bad batch must not stay in basis, moments and
    limiter. A matrix that has not seen a usable gradient yet has no basis, and is only decayed.

    Args:
        task: one matrix, or a batch whose matrices all have a basis; weights and states are changed.
        metrics: counts the steps.
    """
    state, group, grad = task.state, task.group, task.grad
    if grad.ndim == 2 and int(state.refresh_step) < 0:
        if task.finite:
            task.weight.mul_(decay_factor(group))
        return
    ops = kernels if kernels.usable(task.weight) else F
    precision = group["matmul_precision"]
    basis = state.basis.to(state.dtype)
    low_rank, grad_sq = ops.project(grad, basis, state.side, precision)
    total = grad_sq.sum(-1)
    usable = total < torch.finfo(state.dtype).max
    if ops is F and not F.host_decides(usable):
        return
    step = low_rank_step(low_rank, grad_sq, state, group, usable, ops)
    if task.record:
        add_batch(task.record, step.direction_sq, step.low_rank_sq, step.correction, usable)
    square = step.square
    if group["limiter"] == "growth":
        needed = F.residual_needed(square, step.whole) & usable
        exact = ops.residual_square(
            grad,
            basis,
            low_rank,
            step.phi,
            side=state.side,
            alpha=inner_alpha(group),
            needed=needed,
            precision=precision,
        )
        square = torch.where(needed, exact, square)
    divisor = limit(square, step.whole, task.resolution, state, group, usable)
    on_host = ops is F and total.device.type == "cpu"
    metrics.record(step.low_rank_sq.sum(-1), total, square, divisor, usable, group["residual_scale"], on_host)
    phi, carried = carry_step(step, divisor, state, group)
    ops.apply_update_(
        task.weight,
        grad,
        *operands(basis, carried, state.side),
        None if without_residual(group) else phi,
        by_row=state.side == "right",
        keep=decay_factor(group),
        usable=usable,
        precision=precision,
    )
