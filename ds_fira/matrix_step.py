"""One step of one whole matrix: Algorithm 1 with the paper's or the released code's formulas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ds_fira import functional as F
from ds_fira.state import MatrixState
from ds_fira.subspace import compute_basis, refresh_due
from ds_fira.tracking import StepMetrics


@dataclass
class MatrixTask:
    """One whole matrix to step: views of weight and gradient, its state, its group."""

    weight: Tensor  # (m, n), updated in place
    grad: Tensor  # (m, n)
    state: MatrixState
    group: dict[str, Any]
    resolution: float  # below this share of |phi * G| a residual is rounding

    def computed_grad(self) -> Tensor:
        """The gradient in the states' dtype; a copy only where it was computed in another."""
        return self.grad.to(self.state.basis.dtype)

    @cached_property
    def grad_sq(self) -> Tensor:
        """Squared norms of the gradient's columns or rows, float64."""
        return F.squared_norms(self.computed_grad(), self.state.side)

    @cached_property
    def grad_square(self) -> float:
        """|G|^2; zero, NaN and infinity say that the gradient has no subspace."""
        return float(self.grad_sq.sum())

    @property
    def finite(self) -> bool:
        """Whether the gradient is finite, and its squares and their sum are too in the states' dtype."""
        return self.grad_square < torch.finfo(self.state.basis.dtype).max

    @property
    def refresh_due(self) -> bool:
        """Whether the matrix needs a new basis before this step."""
        return refresh_due(int(self.state.step), int(self.state.refresh_step), self.group["update_proj_gap"])


def new_basis(task: MatrixTask) -> Tensor | None:
    """The basis of a task's gradient; None for a gradient that is zero or not finite.

    Raises:
        torch.linalg.LinAlgError: the decomposition failed.
    """
    if not task.finite or task.grad_square == 0.0:
        return None
    return compute_basis(task.computed_grad(), task.group["rank"], task.state.side, task.group["subspace"])


def update_matrix(task: MatrixTask, metrics: StepMetrics) -> None:
    """Lines 8 to 16 of Algorithm 1 for one matrix, and weight decay.

    A gradient that is not finite leaves everything as it is: one bad batch must not stay in basis, moments and
    limiter. A matrix that has not seen a usable gradient yet has no basis, and is only decayed.

    Args:
        task: the matrix; its weight and state are changed.
        metrics: counts the step.
    """
    group, state = task.group, task.state
    if not task.finite:
        return
    if state.refresh_step < 0:
        F.decay_(task.weight, group["lr"] * group["weight_decay"])
        return
    state.step += 1
    _apply(task, metrics)


def _apply(task: MatrixTask, metrics: StepMetrics) -> None:
    group, state, grad = task.group, task.state, task.computed_grad()
    betas = tuple(group["betas"])
    # The two formulations differ in where alpha and the bias correction stand.
    paper = group["formulation"] == "paper"
    alpha = 1.0 if paper else group["alpha"]
    correction = F.bias_correction(int(state.step), betas)

    low_rank = F.project(grad, state.basis, state.side)
    direction = F.adam_direction_(low_rank, state.exp_avg, state.exp_avg_sq, betas=betas, eps=group["eps"])
    if paper:
        direction.mul_(correction)
    low_rank_sq = F.squared_norms(low_rank, state.side)
    phi = F.scaling_factors(direction, low_rank_sq, side=state.side, scaling=group["scaling"])
    if group["limiter"] == "growth":
        norm, whole = F.scaled_residual_norm(
            grad, task.grad_sq, state.basis, low_rank, low_rank_sq, phi, side=state.side, alpha=alpha
        )
        phi = phi / _limiter(task, norm, whole, metrics)
    F.apply_update_(
        task.weight,
        grad,
        state.basis,
        direction,
        low_rank,
        phi,
        side=state.side,
        step_size=group["lr"] * (group["alpha"] if paper else correction),
        alpha=alpha,
        residual_scale=group["residual_scale"],
        decay=group["lr"] * group["weight_decay"],
    )
    metrics.record_energy(float(low_rank_sq.sum()), task.grad_square)


def _limiter(task: MatrixTask, norm: float, whole: float, metrics: StepMetrics) -> float:
    """The norm-growth limiter's divisor for |S| = norm beside |phi * G| = whole; records |S| for the next step."""
    state = task.state
    if norm <= task.resolution * whole:
        # Rounding, not a residual: recorded as history it would pin the next real one for a thousand steps.
        state.residual_norm.zero_()
        return 1.0
    divisor = F.limit_growth(norm, float(state.residual_norm), gamma=task.group["gamma"])
    state.residual_norm.fill_(norm / divisor)
    metrics.limiter_activations += divisor > 1.0
    return divisor
