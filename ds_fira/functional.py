"""The arithmetic of one Fira step on one whole matrix, and of AdamW, as functions of tensors and plain numbers.

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
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_fira.subspace import Side

# Keeps the quotients of norms finite; the released code's constant, in phi and in the limiter.
NORM_EPS = 1e-8
# Below this share of |phi * G|^2 the difference of squares has lost too many digits of |S|^2 in float32 (a relative
# error of about 5e-7 / share), and |S| is summed from the residual itself.
EXACT_RESIDUAL_SHARE = 0.01
# A residual norm under this share of |phi * G| is rounding, not residual, when the gradient is exact in float32.
NEGLIGIBLE_RESIDUAL = 1e-4
# Where a result has to be formed in blocks of rows, a block is this share of the matrix, and no smaller than so many
# rows: no temporary comes near the size of a large matrix, and a block stays in cache.
BLOCK_SHARE = 1 / 32
MIN_BLOCK_ROWS = 16
# Elements up to which a matrix is summed up in float64, at no cost worth saving.
SMALL_MATRIX = 2**16


def block_rows(rows: int) -> int:
    """Rows handled at once of a matrix with `rows` rows."""
    return max(MIN_BLOCK_ROWS, int(rows * BLOCK_SHARE))


def negligible_share(dtype: torch.dtype) -> float:
    """The share of |phi * G| under which a residual norm is only the rounding of gradients computed in `dtype`."""
    return max(torch.finfo(dtype).eps, NEGLIGIBLE_RESIDUAL)


def project(grad: Tensor, basis: Tensor, side: Side) -> Tensor:
    """R = P'G, (r, n), on the left; R = GP, (m, r), on the right."""
    return basis.t() @ grad if side == "left" else grad @ basis


def squared_norms(matrix: Tensor, side: Side) -> Tensor:
    """|G_j|^2 of every column (left, n values) or of every row (right, m values), in float64; R's likewise.

    In a large matrix squares are summed in its own dtype inside a block of rows (left) or a row (right), and in float64
    from there on; the errors average out over the blocks or rows. A small matrix has few of them, and is summed in
    float64 throughout. A sum that is not finite says that the matrix holds NaN, infinity or elements whose squares
    overflow.
    """
    if matrix.numel() <= SMALL_MATRIX:
        return matrix.double().square().sum(0 if side == "left" else 1)
    if side == "right":
        return torch.linalg.vector_norm(matrix, dim=1).double().square()
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for block in matrix.split(block_rows(matrix.shape[0])):
        total += block.square().sum(0)
    return total


def adam_direction_(low_rank: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float):
    """Update both moments with R and return N = M / (sqrt(V) + eps), without bias correction (lines 9 to 11)."""
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(low_rank, alpha=1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(low_rank, low_rank, value=1.0 - beta2)
    return exp_avg / exp_avg_sq.sqrt().add_(eps)


def bias_correction(step: int, betas: tuple[float, float]) -> float:
    """sqrt(1 - beta2^t) / (1 - beta1^t) at the t-th step, counted from 1."""
    return math.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step)


def scaling_factors(direction: Tensor, low_rank_sq: Tensor, *, side: Side, scaling: str) -> Tensor:
    """phi: one factor per column (left, (n,)) or row (right, (m,)) for "column", (1,) for "matrix" and "none".

    Args:
        direction: N.
        low_rank_sq: `squared_norms` of R.
        side: the projected side.
        scaling: "column", "matrix" or "none".
    """
    if scaling == "none":
        return torch.ones(1, dtype=direction.dtype, device=direction.device)
    direction_sq = squared_norms(direction, side)
    if scaling == "matrix":
        direction_sq, low_rank_sq = direction_sq.sum().view(1), low_rank_sq.sum().view(1)
    return (direction_sq.sqrt() / (low_rank_sq.sqrt() + NORM_EPS)).to(direction.dtype)


def exact_residual_square(grad: Tensor, basis: Tensor, low_rank: Tensor, phi: Tensor, *, side: Side, alpha: float):
    """|phi * (G - a P R)|^2 from the residual itself, formed in blocks of rows."""
    rows_of = basis if side == "left" else low_rank
    columns = low_rank if side == "left" else basis.t()
    scale = phi if side == "left" or phi.numel() == 1 else phi.unsqueeze(1)
    total = 0.0
    height = block_rows(grad.shape[0])
    for first in range(0, grad.shape[0], height):
        rows = slice(first, first + height)
        residual = torch.addmm(grad[rows], rows_of[rows], columns, alpha=-alpha)
        residual.mul_(scale if scale.dim() == 1 else scale[rows])
        total += float(residual.square().sum(dtype=torch.float64))
    return total


def scaled_residual_norm(
    grad: Tensor,
    grad_sq: Tensor,
    basis: Tensor,
    low_rank: Tensor,
    low_rank_sq: Tensor,
    phi: Tensor,
    *,
    side: Side,
    alpha: float,
) -> tuple[float, float]:
    """|S| and |phi * G| for S = phi * (G - a P R), without forming S where its share is large enough.

    Args:
        grad: G, (m, n).
        grad_sq: `squared_norms` of G.
        basis: P.
        low_rank: R.
        low_rank_sq: `squared_norms` of R.
        phi: scaling factors, one per entry of `grad_sq` or one for all.
        side: the projected side.
        alpha: a, 1 in the paper's formulation.
    """
    weights = phi.double().square()
    whole = float((weights * grad_sq).sum())
    inside = float((weights * low_rank_sq).sum())
    square = whole - (2.0 * alpha - alpha * alpha) * inside
    if square < EXACT_RESIDUAL_SHARE * whole:
        square = exact_residual_square(grad, basis, low_rank, phi, side=side, alpha=alpha)
    return math.sqrt(square), math.sqrt(whole)


def limit_growth(norm: float, previous: float, *, gamma: float) -> float:
    """The limiter's divisor max(|S| / (|S_prev| + 1e-8), gamma) / gamma, 1 where there is no history (previous 0)."""
    if previous == 0.0:
        return 1.0
    return max(norm / (previous + NORM_EPS), gamma) / gamma


def apply_update_(
    weight: Tensor,
    grad: Tensor,
    basis: Tensor,
    direction: Tensor,
    low_rank: Tensor,
    phi: Tensor,
    *,
    side: Side,
    step_size: float,
    alpha: float,
    residual_scale: float,
    decay: float,
) -> None:
    """W <- (1 - decay) * (W - step_size * (a P N + residual_scale * phi * (G - a P R))), phi after the limiter.

    One product, accumulated into W. In float32 nothing as large as W is allocated; a weight of another dtype is
    updated in blocks of rows in the gradient's dtype and rounded once.

    Args:
        weight: W, (m, n).
        grad: G, (m, n).
        basis: P.
        direction: N.
        low_rank: R.
        phi: scaling factors divided by the limiter.
        side: the projected side.
        step_size: multiplies the whole update.
        alpha: a inside the update, 1 in the paper's formulation.
        residual_scale: multiplies the scaled residual.
        decay: lr * weight_decay.
    """
    phi = phi * residual_scale
    by_row = side == "right" and phi.numel() > 1
    if by_row:
        phi = phi.unsqueeze(1)
    # a N - a phi R: what the basis has to carry back, the residual's own part taken out.
    carried = torch.addcmul(direction, low_rank, phi, value=-1.0)
    left, right = (basis, carried) if side == "left" else (carried, basis.t())
    if weight.dtype == grad.dtype:
        weight.addcmul_(grad, phi.expand_as(grad), value=-step_size)
        weight.addmm_(left, right, alpha=-step_size * alpha)
        decay_(weight, decay)
        return
    height = block_rows(weight.shape[0])
    for first in range(0, weight.shape[0], height):
        rows = slice(first, first + height)
        update = (grad[rows] * (phi[rows] if by_row else phi)).addmm_(left[rows], right, alpha=alpha)
        value = weight[rows].to(grad.dtype).sub_(update, alpha=step_size)
        decay_(value, decay)
        weight[rows] = value.to(weight.dtype)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step as the released code makes it: bias correction on the step size, decay after the update.

    Elements whose gradient is not finite, or has a square that overflows, are left as they are, moments included: one
    bad batch must not stay in the moments for good. Elementwise, so it is the same on any fragment of a parameter.

    Args:
        param: any shape and floating dtype; computed in the moments' dtype and rounded once.
        grad: the same shape.
        exp_avg: first moment, same shape.
        exp_avg_sq: second moment, same shape.
        step: this step's count, from 1.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to sqrt(V).
        weight_decay: decoupled, times lr.
    """
    grad = grad.to(exp_avg.dtype)
    # The norm is the quick test; it can also overflow where every single square is finite.
    usable = None if torch.isfinite(torch.linalg.vector_norm(grad)) else torch.isfinite(grad.square())
    if usable is not None and not usable.all():
        kept = [tensor[usable] for tensor in (param, grad, exp_avg, exp_avg_sq)]
        adamw_(*kept, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for tensor, part in zip((param, exp_avg, exp_avg_sq), (kept[0], *kept[2:]), strict=True):
            tensor[usable] = part
        return
    value = param if param.dtype == exp_avg.dtype else param.to(exp_avg.dtype)
    direction = adam_direction_(grad, exp_avg, exp_avg_sq, betas=betas, eps=eps)
    value.add_(direction, alpha=-lr * bias_correction(step, betas))
    decay_(value, lr * weight_decay)
    if value is not param:
        param.copy_(value)


def decay_(weight: Tensor, decay: float) -> None:
    """Decoupled weight decay, W <- (1 - decay) * W for decay = lr * weight_decay."""
    if decay != 0.0:
        weight.mul_(1.0 - decay)
