"""The arithmetic of one Fira step as functions of tensors and plain numbers.

Nothing here knows of processes, partitions or param groups. Names that end in _ change their first arguments.

Letters: W, G are m x n; r = min(rank, m, n); a is alpha. On the left P is m x r, R = P'G is r x n, and there is one
scale per column j of G; on the right everything is transposed. The method (Fira, arXiv 2410.01623, Algorithm 1):

    R = P'G;  M, V <- Adam moments of R;  N = M / (sqrt(V) + eps)
    phi_j = |N_j| / (|R_j| + 1e-8)                                            scaling factors, equation 11
    S = phi * (G - a P R)                                                     scaled residual, equation 10
    S <- S / (max(|S| / (|S_prev| + 1e-8), gamma) / gamma);  S_prev <- |S|    norm-growth limiter, equation 12
    W <- W - step_size * (a P N + S)

It is computed without forming S. The update is phi * G + P (a N - a phi * R), one product accumulated into W; and P is
orthonormal, so |G_j - a P R_j|^2 = |G_j|^2 - (2a - a^2) |R_j|^2, with the norms accumulated in float64.

The functions of full-size matrices (`project`, `residual_square`, `apply_update_`, `adam_direction_`) take one matrix;
they are the reference of their twins in `ds_fira.core.kernels`, which take a batch and decide on the device. Those
between them take either: scales of shape (..., n) or (..., m), and a `Scalar` for each matrix.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ds_fira.core.norms import reduced_squares, row_slices, squared_norms, sums_by_blocks
from ds_fira.core.precision import matmul_precision
from ds_fira.core.rounding import store_weight_
from ds_fira.core.scalars import Scalar, at_least, sqrt, where
from ds_fira.core.subspace import Side

# Keeps the quotients of norms finite; the released code's constant, in phi and in the limiter.
NORM_EPS = 1e-8
# Below this share of |phi * G|^2 the difference of squares has lost too many digits of |S|^2 in float32 (an error of
# about 5e-7 / share), and |S| is summed from the residual itself.
EXACT_RESIDUAL_SHARE = 0.01
# An eps below it does not keep a step finite where no gradient has been: the smallest normal number of float32.
NO_EPS = torch.finfo(torch.float32).tiny


def project(grad: Tensor, basis: Tensor, side: Side, precision: str = "float32") -> tuple[Tensor, Tensor]:
    """R and the squared norms of G's columns (left) or rows (right).

    Args:
        grad: G, (m, n); in a lower precision than P it is converted in blocks of rows.
        basis: P, (m, r) on the left, (n, r) on the right.
        side: the projected side.
        precision: of the product, as in `matmul_precision`.

    Returns:
        R = P'G, (r, n), or R = GP, (m, r), in P's dtype; `squared_norms` of G in P's dtype.
    """
    (m, n), r, left = grad.shape, basis.shape[1], side == "left"
    with matmul_precision(precision, grad.device):
        if grad.dtype == basis.dtype:
            return basis.t() @ grad if left else grad @ basis, squared_norms(grad, side)
        low_rank = basis.new_zeros((r, n) if left else (m, r))
        by_blocks = sums_by_blocks(grad)
        if by_blocks:
            grad_sq = torch.zeros(n if left else m, dtype=torch.float64)
        else:
            grad_sq = reduced_squares(grad, 0 if left else 1, basis.dtype)
        for rows in row_slices(m, basis.element_size() / grad.element_size()):
            block = grad[rows].to(basis.dtype)
            if left:
                low_rank.addmm_(basis[rows].t(), block)
            else:
                torch.mm(block, basis, out=low_rank[rows])
            if by_blocks and left:
                grad_sq += squared_norms(block, side)
            elif by_blocks:
                grad_sq[rows] = squared_norms(block, side)
    return low_rank, grad_sq


def adam_direction_(
    low_rank: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    side: Side,
) -> tuple[Tensor, Tensor, Tensor]:
    """Update both moments with R (lines 9 and 10) and give N = M / (sqrt(V) + eps), without bias correction.

    Where the divisor is zero, as with eps = 0 where no gradient has been, N is zero.

    Args:
        low_rank: R, (r, n) left or (m, r) right.
        exp_avg: M, the same shape, updated.
        exp_avg_sq: V, the same shape, updated.
        betas: decay rates of the moments.
        eps: added to sqrt(V).
        side: the projected side.

    Returns:
        N, and `squared_norms` of N and of R.
    """
    low_rank, direction = low_rank.contiguous(), torch.zeros_like(exp_avg)
    # A step of size -1 from zero is N itself.
    fused_adam_(direction, low_rank, exp_avg, exp_avg_sq, step_size=-1.0, betas=betas, eps=eps)
    if eps < NO_EPS:
        direction.masked_fill_(exp_avg_sq == 0.0, 0.0)
    return direction, squared_norms(direction, side), squared_norms(low_rank, side)


def fused_adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step_size: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """W <- W - step_size * M / (sqrt(V) + eps) with the moments updated before, in one pass of torch's fused Adam.

    Args:
        param: W, contiguous as all are, of one dtype; updated.
        grad: G.
        exp_avg: M, updated.
        exp_avg_sq: V, updated.
        step_size: what Adam's bias correction is already in.
        betas: decay rates of the moments.
        eps: added to sqrt(V); with 0, an element that has had no gradient becomes NaN.
    """
    torch._fused_adam_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [_late(param.device)],
        lr=step_size,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


@cache
def _late(device: torch.device) -> Tensor:
    """A step count at which nothing is left of a bias correction: beta^t is zero."""
    return torch.full((), math.inf, device=device)


def bias_correction(step: Tensor | int, betas: tuple[float, float]) -> Scalar:
    """sqrt(1 - beta2^t) / (1 - beta1^t) at the t-th step, counted from 1; float64, of `step`'s shape and device."""
    exponent = step.double() if isinstance(step, Tensor) else step
    return sqrt(1.0 - betas[1] ** exponent) / (1.0 - betas[0] ** exponent)


def scaling_factors(direction_sq: Tensor, low_rank_sq: Tensor, scaling: str) -> Tensor:
    """Phi = |N| / |R| (equation 11), float64: per column or row (..., n or m) for "column", (..., 1) for the others.

    The squares are `squared_norms` of N and R; `scaling` is "column", "matrix" or "none", where phi is 1.
    """
    if scaling == "none":
        return torch.ones_like(low_rank_sq[..., :1])
    if scaling == "matrix":
        direction_sq, low_rank_sq = direction_sq.sum(-1, keepdim=True), low_rank_sq.sum(-1, keepdim=True)
    return direction_sq.sqrt().div_(low_rank_sq.sqrt().add_(NORM_EPS))


def residual_square(
    grad: Tensor,
    basis: Tensor,
    low_rank: Tensor,
    phi: Tensor,
    *,
    side: Side,
    alpha: float,
    needed: Tensor | bool,
    precision: str = "float32",
) -> Tensor:
    """|phi * (G - a P R)|^2 from the residual itself, formed in blocks of rows.

    Args:
        grad: G, (m, n).
        basis: P.
        low_rank: R.
        phi: scaling factors, one per column (left) or row (right), or one for all.
        side: the projected side.
        alpha: a inside the residual, 1 in the paper's formulation.
        needed: whether the caller wants it.
        precision: of the product, as in `matmul_precision`.

    Returns:
        float64, 0-dim; 0 where it is not needed.
    """
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    if not needed:
        return total
    rows_of, columns = (basis, low_rank) if side == "left" else (low_rank, basis.t())
    by_row = side == "right" and phi.shape[-1] > 1
    with matmul_precision(precision, grad.device):
        for rows in row_slices(grad.shape[0], 2 * basis.element_size() / grad.element_size()):
            residual = torch.addmm(grad[rows].to(basis.dtype), rows_of[rows], columns, alpha=-alpha)
            sums = squared_norms(residual, side)
            total += (sums * (phi[rows] if by_row else phi).square()).sum()
    return total


def difference_of_squares(scaled_grad_sq: Scalar, scaled_low_rank_sq: Scalar, alpha: float) -> Scalar:
    """|S|^2 = |phi * G|^2 - (2a - a^2) |phi * R|^2, for P is orthonormal; a is 1 in the paper's formulation."""
    return scaled_grad_sq - (2.0 * alpha - alpha * alpha) * scaled_low_rank_sq


def residual_needed(residual_sq: Scalar, scaled_grad_sq: Scalar) -> Tensor | bool:
    """Whether |S|^2 as a difference has lost so many digits beside |phi * G|^2 that S itself has to be summed."""
    return residual_sq < EXACT_RESIDUAL_SHARE * scaled_grad_sq


def limit_growth(
    residual_sq: Scalar, scaled_grad_sq: Scalar, previous: Scalar, *, gamma: float, negligible_ratio: float
) -> tuple[Scalar, Scalar]:
    """The norm-growth limiter (equation 12): its divisor, and |S| to remember.

    A norm that is rounding, not residual, is no history: it would pin the next real one for a thousand steps.

    Args:
        residual_sq: |S|^2, float64, (...).
        scaled_grad_sq: |phi * G|^2.
        previous: |S_prev|; 0 is no history.
        gamma: the largest growth.
        negligible_ratio: below this share of |phi * G| a norm is rounding.

    Returns:
        max(|S| / (|S_prev| + 1e-8), gamma) / gamma, 1 where there is no history; |S| after it.
    """
    norm = sqrt(at_least(residual_sq, 0.0))
    counts = norm > negligible_ratio * sqrt(scaled_grad_sq)
    divisor = at_least(norm / (previous + NORM_EPS), gamma) / gamma
    divisor = where(counts & (previous != 0.0), divisor, 1.0)
    return divisor, where(counts, norm / divisor, 0.0)


def apply_update_(
    weight: Tensor,
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    phi: Tensor | None,
    *,
    by_row: bool,
    decay_factor: float,
    step_sizes: tuple[float, float] = (1.0, 1.0),
    precision: str = "float32",
    seed: int | Tensor | None = None,
) -> None:
    """W <- decay_factor * W - (b phi * G + a L R): the update and weight decay.

    One product, accumulated into W, without a temporary where all are of one dtype; otherwise W is updated in blocks of
    rows in `left`'s dtype and rounded once.

    Args:
        weight: W, (m, n), updated.
        grad: G, (m, n).
        left: L, (m, r).
        right: R, (r, n).
        phi: one per column (n,), per row (m,) or for all (1,), in `left`'s dtype; None to leave phi * G out.
        by_row: whether phi is per row.
        decay_factor: 1 - lr * weight_decay.
        step_sizes: a and b; 1 where phi and the factors have them already.
        precision: of the product, as in `matmul_precision`.
        seed: of the noise with which W in bfloat16 is rounded; None rounds to the nearest.
    """
    of_product, of_residual = step_sizes
    by_row = by_row and phi is not None and phi.numel() > 1
    scale = phi.unsqueeze(1) if by_row else phi
    with matmul_precision(precision, grad.device):
        if weight.dtype == grad.dtype == left.dtype:
            weight.addmm_(left, right, beta=decay_factor, alpha=-of_product)
            if scale is not None:
                weight.addcmul_(grad, scale, value=-of_residual)
            return
        # Three blocks live at once: the gradient's, the weight's and the product's.
        for rows in row_slices(weight.shape[0], 3 * left.element_size() / weight.element_size()):
            value = weight[rows].to(left.dtype).addmm_(left[rows], right, beta=decay_factor, alpha=-of_product)
            if scale is not None:
                value.addcmul_(grad[rows].to(left.dtype), scale[rows] if by_row else scale, value=-of_residual)
            store_weight_(weight[rows], value, seed, rows.start * weight.shape[1])
