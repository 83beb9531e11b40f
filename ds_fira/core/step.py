"""Fira's step: Algorithm 1 of the paper (Chen et al., arXiv 2410.01623) on one matrix, or on a batch of one shape.

Read `update`: its lines are lines 8 to 16 of Algorithm 1. Lines 4 to 7, a new basis every T steps, are in
`ds_fira.core.basis`, the formulas in `ds_fira.core.functional`, and their GPU kernels in `ds_fira.core.kernels`.

    W, G    weight and gradient, (m, n)
    P       the basis: (m, r) where the left side is projected, (n, r) on the right; orthonormal columns
    R       the low-rank gradient: P'G, (r, n), on the left; GP, (m, r), on the right
    M, V    Adam's moments of R, of R's shape; N = M / (sqrt(V) + eps), Adam's direction
    phi     scaling factors, one for each column of G, (n,), on the left; for each row, (m,), on the right
    S       the scaled residual phi * (G - a P R); never formed: |S| follows from squared norms

Another `residual` than the paper's has another phi, or no S: a row of `ds_fira.core.residuals`.

A batch of k matrices has a leading dimension k. The numbers of a matrix (norms, step size) are plain on a CPU and stay
tensors on a GPU, where nothing reads them: the device decides whether a gradient is finite, and one that is not leaves
weight and state alone. A matrix that ZeRO splits takes the same phases (`adapt`, `scale`, `limit`, `combine`) with sums
over the ranks between them: `ds_fira.sharding.lowrank`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ds_fira.core import functional as F
from ds_fira.core import kernels
from ds_fira.core.base_optimizer import adapt, step_factor
from ds_fira.core.matrix_slice import MatrixSlice
from ds_fira.core.norms import total_square
from ds_fira.core.residuals import Squares, StepContext
from ds_fira.core.scalars import (
    Scalar,
    is_finite,
    over_entries,
    over_matrix,
    scalar,
    store_scalar_,
    weighted_sums,
    where,
)
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState

# What `ResidualForm.recorded` gives; computed where it is recorded, not in every step.
Quotient = Callable[[], tuple[Tensor, Tensor, Scalar]]


@dataclass(slots=True)
class MatrixTask:
    """One matrix to step, or k of one shape that are stepped together.

    Attributes:
        weight: W, (m, n) or (k, m, n); updated in place.
        grad: G, of W's shape, of any floating dtype.
        state: P, M, V, the step count, |S| of the step before, p.
        settings: of the param group.
        negligible_ratio: a residual norm below this share of |phi * G| is rounding.
    """

    weight: Tensor
    grad: Tensor
    state: MatrixState
    settings: GroupSettings
    negligible_ratio: float
    _by_kernels: bool | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def by_kernels(self) -> bool:
        """Whether the kernels take it; asked once, with the choice of the step that it belongs to."""
        if self._by_kernels is None:
            self._by_kernels = kernels.supports(self.places()[0].tensor)
        return self._by_kernels

    def places(self) -> tuple[MatrixSlice, MatrixSlice]:
        """Where weight and gradient lie, without a view of either."""
        return MatrixSlice.of(self.weight), MatrixSlice.of(self.grad)

    def grad_square(self) -> float:
        """|G|^2 of one matrix, on the host; zero, NaN or infinity where the gradient has no subspace."""
        return float(total_square(self.grad, self.state.dtype, self.state.side))


@dataclass(frozen=True)
class StepStats:
    """The numbers of one step, for metrics and recorders.

    Attributes:
        grad_sq: |G|^2.
        low_rank_sq: |R_j|^2 of every column (left) or row (right), (n,) or (m,), float64.
        quotient: what phi is the quotient of, see `ResidualForm.recorded`.
        residual_sq: |S|^2 before the limiter.
        limiter_divisor: S is divided by it; None without a limiter.
        grad_finite: whether the gradient was finite, so that the step was made.
    """

    grad_sq: Scalar
    low_rank_sq: Tensor
    quotient: Quotient
    residual_sq: Scalar
    limiter_divisor: Scalar | None
    grad_finite: Tensor | bool

    @property
    def device(self) -> torch.device | None:
        """Where the numbers are; None where they are plain."""
        return self.grad_sq.device if isinstance(self.grad_sq, Tensor) else None

    def add_to_(self, sums: Tensor, residual_scale: float) -> None:
        """Add the matrices with a gradient that is finite and not zero to sums on their device, where nothing is read.

        Args:
            sums: float64, (4,): matrices, |R|^2 / |G|^2, those whose residual the limiter shrank, |S|^2 after it.
            residual_scale: multiplies S in the update.
        """
        one = torch.ones_like(self.grad_sq)
        shrunk = one if self.limiter_divisor is None else self.limiter_divisor
        residual = self.residual_sq.clamp(min=0.0) * (residual_scale / shrunk).square()
        found = torch.stack([one, self.low_rank_sq.sum(-1) / self.grad_sq, shrunk > 1.0, residual])
        counted = self.grad_finite & (self.grad_sq > 0.0)
        sums.add_(torch.where(counted, found, 0.0).view(4, -1).sum(1))


def update(task: MatrixTask) -> StepStats | None:
    """Step one matrix, or a batch whose matrices all have a basis; weights and states change in place.

    Returns:
        The numbers of the step; None where none was made, for want of a finite gradient or of a basis: the weight of a
        matrix that has not had a gradient with a subspace yet only decays.
    """
    state, settings = task.state, task.settings
    if state.refresh_step.ndim == 0 and not state.has_basis:
        if is_finite(task.grad_square(), state.dtype):
            task.weight.mul_(settings.decay_factor)
        return None
    if task.by_kernels:
        return kernels.step_together([task])
    weight, grad = task.weight, task.grad
    host = grad.device.type == "cpu"
    basis, precision = state.projector(), settings.chosen_precision
    low_rank, grad_sq = F.project(grad, basis, state.side, precision)  # line 8: R
    grad_square = scalar(grad_sq.sum(-1), host)
    grad_finite = is_finite(grad_square, state.dtype)
    if not grad_finite:
        return None
    state.step += grad_finite
    bias_correction, form = step_factor(state.step, settings, host), settings.residual_form
    context = StepContext(state, settings, weight.shape[-2:], bias_correction, grad_finite)
    direction, direction_sq, low_rank_sq = adapt(low_rank, state, settings, grad_finite)  # lines 9 to 11: M, V, N
    squares = form.squares(grad_sq, direction_sq, low_rank_sq, settings)
    phi, residual_sq, scaled_grad_sq = scale(grad_sq, squares, context)  # lines 12 and 13: phi and |S|
    recorded = partial(form.recorded, squares, phi, bias_correction)
    if settings.measures_residual:
        needed = F.residual_needed(residual_sq, scaled_grad_sq) & grad_finite
        if needed is not False:
            options = {"side": state.side, "alpha": settings.inner_alpha, "needed": needed, "precision": precision}
            exact = F.residual_square(grad, basis, low_rank, phi, **options)
            residual_sq = where(needed, scalar(exact, host), residual_sq)
    divisor = limit(residual_sq, scaled_grad_sq, state, settings, grad_finite, task.negligible_ratio)  # line 14: S
    sizes = 1.0, 1.0
    if host:  # line 15: C
        phi, low_rank_update, sizes = combine_on_host(phi, low_rank, direction, divisor, context)
    else:
        phi, low_rank_update = combine(phi, low_rank, direction, divisor, context)
    F.apply_update_(  # line 16: W
        weight,
        grad,
        *factors(basis, low_rank_update, state.side),
        phi,
        by_row=state.side == "right",
        decay_factor=settings.decay_factor,
        step_sizes=sizes,
        precision=precision,
        seed=settings.weight_seed(state.step),
    )
    return StepStats(grad_square, low_rank_sq, recorded, residual_sq, divisor, grad_finite)


def scale(grad_sq: Tensor, squares: Squares, context: StepContext) -> tuple[Tensor | None, Scalar, Scalar]:
    """Lines 12 and 13: phi, |S|^2 and |phi * G|^2; None and zeros without a residual.

    Args:
        grad_sq: |G_j|^2 of every column (left) or row (right), float64.
        squares: of the same entries, as `ResidualForm.squares` gives them.
        context: of the step; what the form of the residual remembers changes.
    """
    form, host = context.settings.residual_form, context.host
    if form.factors is None:
        zero = 0.0 * context.bias_correction
        return None, zero, zero
    phi = form.factors(squares, context)
    scaled_grad_sq, scaled_sq = weighted_sums((grad_sq, squares[1]), phi.square(), host)
    return phi, form.residual_sq(scaled_grad_sq, scaled_sq, context.settings), scaled_grad_sq


def limit(
    residual_sq: Scalar,
    scaled_grad_sq: Scalar,
    state: MatrixState,
    settings: GroupSettings,
    grad_finite: Tensor | bool,
    negligible_ratio: float,
) -> Scalar | None:
    """Line 14: the norm-growth limiter's divisor, None without one; the state remembers |S| after it."""
    if not settings.has_limiter:
        return None
    previous = scalar(state.residual_norm, not isinstance(residual_sq, Tensor))
    divisor, norm = F.limit_growth(
        residual_sq, scaled_grad_sq, previous, gamma=settings.gamma, negligible_ratio=negligible_ratio
    )
    store_scalar_(state.residual_norm, norm, grad_finite)
    return divisor


def combine(
    phi: Tensor | None, low_rank: Tensor, direction: Tensor, divisor: Scalar | None, context: StepContext
) -> tuple[Tensor | None, Tensor]:
    """Line 15: the factors of lr (P N + S) = phi * G + P C, decay folded in; `direction`, N, is used up.

    Returns:
        phi, None without a residual; C = a N - a phi R, of R's shape, or C = a N, or of rank 0 where S is the whole
        update. Both in the state's dtype.
    """
    state = context.state
    of_direction, of_residual = step_sizes(divisor, context)
    low_rank_update = direction.mul_(over_matrix(of_direction, state.dtype))
    if phi is None:
        return None, low_rank_update
    phi = (phi * over_entries(of_residual)).to(state.dtype)
    if context.settings.residual_form.is_update:
        return phi, _empty_update(direction, state)
    return phi, low_rank_update.addcmul_(low_rank, _along(phi, state), value=-context.settings.inner_alpha)


def combine_on_host(
    phi: Tensor | None, low_rank: Tensor, direction: Tensor, divisor: Scalar | None, context: StepContext
) -> tuple[Tensor | None, Tensor, tuple[float, float]]:
    """As `combine`, of one matrix whose numbers are plain: they go to the product, and no pass multiplies by them.

    Returns:
        phi and C / a; then a and b, the step sizes of C and of phi.
    """
    of_direction, of_residual = step_sizes(divisor, context)
    if context.settings.residual_form.is_update:
        return phi.to(context.state.dtype), _empty_update(direction, context.state), (1.0, of_residual)
    if of_direction == 0.0:  # of a learning rate or of a rule
        direction.zero_()
        of_direction = 1.0
    if phi is None:
        return None, direction, (of_direction, of_residual)
    phi, share = phi.to(context.state.dtype), context.settings.inner_alpha * of_residual / of_direction
    low_rank_update = direction.addcmul_(low_rank, _along(phi, context.state), value=-share)
    return phi, low_rank_update, (of_direction, of_residual)


def step_sizes(divisor: Scalar | None, context: StepContext) -> tuple[Scalar, Scalar]:
    """What multiplies P N and S in the update, the limiter's divisor and decay included.

    Released: lr b (a P N + S) with the bias correction b; with alpha outside: lr a (b P N + S).
    """
    settings, bias_correction = context.settings, context.bias_correction
    outside = settings.alpha_is_outside
    step_size = settings.learning_rate * settings.decay_factor * (settings.alpha if outside else bias_correction)
    of_residual = settings.residual_factor * step_size
    if settings.residual_warmup:
        of_residual = of_residual * context.residual_share
    if divisor is not None:
        of_residual = of_residual / divisor
    return step_size * (bias_correction if outside else settings.inner_alpha), of_residual


def _along(phi: Tensor, state: MatrixState) -> Tensor:
    """Phi, shaped to go with the columns (left) or rows (right) of R."""
    return phi.unsqueeze(-2 if state.side == "left" else -1)


def _empty_update(direction: Tensor, state: MatrixState) -> Tensor:
    """C where S is the whole update: of rank 0."""
    return direction[:0] if state.side == "left" else direction[:, :0]


def factors(basis: Tensor, low_rank_update: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """The two factors of the product that goes back into W: (P, C) on the left, (C, P') on the right."""
    if low_rank_update.shape[0 if side == "left" else 1] == 0:  # a view costs a call
        basis = basis[:, :0]
    return (basis, low_rank_update) if side == "left" else (low_rank_update, basis.mT)
