"""The normalized residual (`residual = "normalized"`): each column by a running average of its own square.

    q_j = max(|G_j|^2 - |R_j|^2, tau |G_j|^2)      |D_j|^2 of the residual D = G - P R, for P is orthonormal
    p <- beta p + (1 - beta) q                     before it is used; p_hat = p / (1 - beta^t)
    S_j = sqrt(m - r) D_j / sqrt(p_hat_j)          0 where p_hat_j is

on the left; on the right for every row, with n - r. With `scaling = "matrix"` there is one p, of the sum of q, and
S = sqrt(n (m - r)) D / sqrt(p_hat). So S = phi * (G - P R), as in Algorithm 1 with another phi, and its entries are of
size 1 as Adam's are, whatever the size of the gradient.

tau: |G_j|^2 - |R_j|^2 is known to the relative error of |R_j|^2 only. Where the residual is smaller than that, as for a
gradient of low rank, it is rounding: the floor then keeps 1 / sqrt(p_hat) from blowing it up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_fira.core.precision import ROUNDING
from ds_fira.core.scalars import over_entries
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState
from ds_fira.core.subspace import Side

# A basis stored in bfloat16 is off by up to 2^-9, and |R|^2 by twice that: 4e-3, 6e-3 with products in tf32.
FLOOR_OF_BFLOAT16_BASES = 1e-2


def residual_floor(settings: GroupSettings) -> float:
    """Tau: the share of |G_j|^2 below which |G_j|^2 - |R_j|^2 is taken for rounding."""
    floor = ROUNDING[settings.matmul_precision].squares
    return floor if settings.state_dtype == "float32" else max(floor, FLOOR_OF_BFLOAT16_BASES)


def residual_squares(grad_sq: Tensor, low_rank_sq: Tensor, settings: GroupSettings) -> Tensor:
    """The numbers q of entries of R from their squared norms in G and R, float64, of the same shape."""
    return torch.maximum(grad_sq - low_rank_sq, residual_floor(settings) * grad_sq)


def outside_directions(shape: Sequence[int], rank: int, side: Side, settings: GroupSettings) -> int:
    """The numbers of the residual of an (m, n) matrix that one factor is for: m - r, of a whole matrix n (m - r)."""
    length, entries = shape if side == "left" else reversed(shape)
    return (length - rank) * (entries if settings.has_one_factor else 1)


def normalizing_factors(
    squares: Tensor,
    outside: int,
    state: MatrixState,
    settings: GroupSettings,
    grad_finite: Tensor | bool,
    host: bool = False,
) -> Tensor:
    """Update p where the gradient is finite, and give phi = sqrt(outside) / sqrt(p_hat).

    Args:
        squares: q, (..., n or m), float64; with one factor also its sum, (..., 1).
        outside: as `outside_directions` gives it.
        state: its step is this step's count; p changes. An entry of p below 0 has no history, as in the first step, or
            after a run with another residual, and then takes its share of q as if that had been there from the start.
        settings: of the param group.
        grad_finite: whether the gradient was finite.
        host: whether the step count may be read.

    Returns:
        float64, of the shape of p.
    """
    if settings.has_one_factor:
        squares = squares.sum(-1, keepdim=True)
    beta, before = settings.residual_beta, state.residual_avg_sq
    share = 1.0 - beta ** (int(state.step) if host else over_entries(state.step.double()))
    average = torch.where(before < 0.0, share * squares, beta * before.double() + (1.0 - beta) * squares)
    # As it is stored: what underflows there is 0, so that phi stays in the range of a float32.
    average = average.to(before.dtype)
    finite = over_entries(grad_finite)
    before.copy_(torch.where(finite, average, before) if isinstance(finite, Tensor) else average)
    average = average.double()
    return torch.where(average > 0.0, (outside * share / average).sqrt(), 0.0)
