"""The normalized residual (`residual = "normalized"`): each column by a running average of its own square.

    q_j = max(|G_j|^2 - |R_j|^2, tau |G_j|^2)      |D_j|^2 of the residual D = G - P R, for P is orthonormal
    p <- beta p + (1 - beta) q                     before it is used; p_hat = p / (1 - beta^t)
    S_j = sqrt(m - r) D_j / sqrt(p_hat_j)          0 where p_hat_j is

on the left; on the right for every row, with n - r. With `scaling = "matrix"` there is one p, of the sum of q, and
S = sqrt(n (m - r)) D / sqrt(p_hat). So S = phi * (G - P R), as in Algorithm 1 with another phi, and its entries are of
size 1 as Adam's are, whatever the size of the gradient. With beta = 0 a column is divided by its own norm of this step,
and there is no p.

tau: |G_j|^2 - |R_j|^2 is known to the relative error of |R_j|^2 only. Where the residual is smaller than that, as for a
gradient of low rank, it is rounding: the floor then keeps 1 / sqrt(p_hat) from blowing it up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_fira.core.precision import ROUNDING
from ds_fira.core.scalars import Scalar, over_entries

if TYPE_CHECKING:  # their table is made of this
    from ds_fira.core.residuals import Squares, StepContext
    from ds_fira.core.settings import GroupSettings
    from ds_fira.core.state import MatrixState
    from ds_fira.core.subspace import Side

# A basis stored in bfloat16 is off by up to 2^-9, and |R|^2 by twice that: 4e-3, 6e-3 with products in tf32.
FLOOR_OF_BFLOAT16_BASES = 1e-2


def residual_floor(settings: GroupSettings) -> float:
    """Tau: the share of |G_j|^2 below which |G_j|^2 - |R_j|^2 is taken for rounding."""
    floor = ROUNDING[settings.chosen_precision].squares
    return floor if settings.state_dtype == "float32" else max(floor, FLOOR_OF_BFLOAT16_BASES)


def residual_squares(grad_sq: Tensor, direction_sq: Tensor, low_rank_sq: Tensor, settings: GroupSettings) -> Squares:
    """The numbers q of entries from their squared norms in G and R, float64, twice: phi and |S| are made of them."""
    squares = torch.maximum(grad_sq - low_rank_sq, residual_floor(settings) * grad_sq)
    return squares, squares


def normalizing_factors(squares: Squares, context: StepContext) -> Tensor:
    """Update p where the gradient is finite, and give phi = sqrt(m - r) / sqrt(p_hat), float64, of the shape of p.

    An entry of p below 0 has no history, as in the first step, or after a run with another residual, and then takes its
    share of q as if that had been there from the start.

    Args:
        squares: q, (..., n or m), float64; with one factor also its sum, (..., 1).
        context: p of its state changes.

    Raises:
        ValueError: as in `require_average`.
    """
    state, settings, own = context.state, context.settings, squares[0]
    if settings.has_one_factor:
        own = own.sum(-1, keepdim=True)
    beta, before = settings.residual_beta, state.residual_avg_sq
    require_average(state, settings)
    if before is None:
        return _quotient(own.to(state.dtype), 1.0, context)
    share = 1.0 - beta ** (int(state.step) if context.host else over_entries(state.step.double()))
    average = torch.where(before < 0.0, share * own, beta * before.double() + (1.0 - beta) * own)
    # As it is stored: what underflows there is 0, so that phi stays in the range of a float32.
    average = average.to(before.dtype)
    finite = over_entries(context.grad_finite)
    before.copy_(torch.where(finite, average, before) if isinstance(finite, Tensor) else average)
    return _quotient(average, share, context)


def require_average(state: MatrixState, settings: GroupSettings) -> None:
    """Stop where a param group was given a `residual_beta` above 0 after its states were made without p.

    Raises:
        ValueError: it was.
    """
    if state.residual_avg_sq is None and settings.residual_beta > 0.0:
        raise ValueError(
            f"residual_beta = {settings.residual_beta} needs an average that this run began without, at "
            "residual_beta = 0; give it from the start, or save and resume with it."
        )


def recorded(squares: Squares, phi: Tensor, bias_correction: Scalar) -> tuple[Tensor, Tensor, Scalar]:
    """What phi is the quotient of, for records: |S_j|^2 and |D_j|^2, (..., n or m), and 1."""
    return phi.square() * squares[1], squares[1], 1.0 + 0.0 * bias_correction


def _quotient(average: Tensor, share: Scalar, context: StepContext) -> Tensor:
    """Phi, float64, from p as it is stored and 1 - beta^t."""
    average = average.double()
    state = context.state
    elements = elements_of(context.shape, state.basis.shape[-1], state.side, context.settings)
    return torch.where(average > 0.0, (elements * share / average).sqrt(), 0.0)


def elements_of(shape: tuple[int, int], rank: int, side: Side, settings: GroupSettings) -> int:
    """The elements of size 1 in S for one factor: m - r, for a whole matrix n (m - r); transposed on the right."""
    length, entries = shape if side == "left" else reversed(shape)
    return (length - rank) * (entries if settings.has_one_factor else 1)
