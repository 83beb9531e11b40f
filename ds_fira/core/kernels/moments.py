"""Adam's moments of the low-rank gradient, and AdamW, each in one pass over what it reads."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.tiles import batched, flags, launch, rounded, tile
from ds_fira.core.subspace import Side

# Elements of one program of AdamW.
BLOCK = 1024
# Tiles of the moments: lines (columns on the left, rows on the right) x entries of a line, longest where memory is
# contiguous.
LEFT_TILE = (32, 32)
RIGHT_TILE = (16, 64)


def adam_direction_(
    low_rank: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    side: Side,
    grad_finite: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Update both moments with R; N = M / (sqrt(V) + eps) and the norms that phi needs (lines 9 to 13, equation 11).

    Without bias correction. Squares are summed in float32 inside a tile and in float64 over tiles.

    Args:
        low_rank: R, float32, (r, n) or (k, r, n) on the left, (m, r) or (k, m, r) on the right.
        exp_avg: M, the same shape; changed.
        exp_avg_sq: V, the same shape; changed.
        betas: decay rates of the moments.
        eps: added to sqrt(V).
        side: the projected side.
        grad_finite: bool, (k,) or (); where it is False the moments stay as they are and all three results are zero.

    Returns:
        N, float32, shaped as R; |N_j|^2 and |R_j|^2, float64, (..., n) per column on the left and
        (..., m) per row on the right.

    Raises:
        ValueError: a tensor is not of R's shape, or its matrices are not stored row by row.
    """
    for name, tensor in (("low_rank", low_rank), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not _row_major(tensor) or tensor.shape != low_rank.shape:
            raise ValueError(
                f"{name} with shape {tuple(tensor.shape)} and strides {tensor.stride()} does not fit a low_rank of "
                f"shape {tuple(low_rank.shape)}; give matrices of one shape, stored row by row without gaps."
            )
    direction = torch.empty(low_rank.shape, dtype=torch.float32, device=low_rank.device)
    # A line is a column on the left, where it is turned, and a row on the right.
    turned = [t.mT if side == "left" else t for t in (low_rank, exp_avg, exp_avg_sq, direction)]
    count, lines, rank = (1, *turned[0].shape)[-3:]
    squares = (2, *low_rank.shape[:-2], lines)
    direction_sq, low_rank_sq = torch.empty(squares, dtype=torch.float64, device=low_rank.device)
    most = LEFT_TILE if side == "left" else RIGHT_TILE
    shape = (tile(lines, most[0]), tile(rank, most[1]))
    launch(
        _adam_direction,
        (triton.cdiv(lines, shape[0]), count),
        low_rank,
        *(batched(tensor, count, lines, rank) for tensor in turned),
        direction_sq,
        low_rank_sq,
        flags(grad_finite, count),
        lines,
        rank,
        _shares(betas),
        float(eps),
        LINES=shape[0],
        ENTRIES=shape[1],
        num_warps=4,
    )
    return direction, direction_sq, low_rank_sq


def _row_major(tensor: Tensor) -> bool:
    """Whether the last two dimensions are contiguous; the batch may have any stride."""
    rows, columns = tensor.shape[-2:]
    return (columns == 1 or tensor.stride(-1) == 1) and (rows == 1 or tensor.stride(-2) == columns)


def _shares(betas: tuple[float, float]) -> tuple[float, float, float, float]:
    """Of both moments the share that is kept and the share that is new."""
    return float(betas[0]), 1.0 - betas[0], float(betas[1]), 1.0 - betas[1]


@triton.jit
def _adam(avg_at, sq_at, value, kept, shares, eps):
    """Update both moments with a gradient where it is kept; M / (sqrt(V) + eps), zero where it is zero by zero."""
    beta1, fresh1, beta2, fresh2 = shares
    average = tl.load(avg_at, mask=kept, other=0.0).to(tl.float32) * beta1 + value * fresh1
    average_sq = tl.load(sq_at, mask=kept, other=0.0).to(tl.float32) * beta2 + value * value * fresh2
    tl.store(avg_at, rounded(average, avg_at.dtype.element_ty), mask=kept)
    tl.store(sq_at, rounded(average_sq, sq_at.dtype.element_ty), mask=kept)
    # An eps of zero would divide zero by zero, outside and where no gradient has been.
    divisor = tl.sqrt_rn(average_sq) + eps
    return tl.where(kept & (divisor > 0.0), tl.div_rn(average, divisor), 0.0)


@triton.jit
def _adam_direction(
    low_rank,
    exp_avg,
    exp_avg_sq,
    direction,
    direction_sq,
    low_rank_sq,
    grad_finite,
    lines,
    rank,
    shares,
    eps,
    LINES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    line = tl.program_id(0) * LINES
    line_offsets = tl.arange(0, LINES)
    entry_offsets = tl.arange(0, ENTRIES)
    line_inside = line + line_offsets < lines
    # None of the lines where the gradient is not finite: its NaN must not be read, as a product with zero keeps it.
    line_kept = line + line_offsets < lines * tl.load(grad_finite + matrix).to(tl.int32)
    # All four are stored alike.
    at = line_offsets[:, None] * low_rank.rows + entry_offsets[None, :] * low_rank.columns
    corner = line.to(tl.int64) * low_rank.rows
    low = low_rank.data + matrix * low_rank.batch
    avg = exp_avg.data + matrix * exp_avg.batch
    sq = exp_avg_sq.data + matrix * exp_avg_sq.batch
    out = direction.data + matrix * direction.batch
    direction_squares = tl.zeros((LINES,), dtype=tl.float64)
    low_squares = tl.zeros((LINES,), dtype=tl.float64)
    for start in range(0, rank, ENTRIES):
        entry_inside = (entry_offsets < rank - start)[None, :]
        kept = line_kept[:, None] & entry_inside
        value = tl.load(low + corner + at, mask=kept, other=0.0).to(tl.float32)
        quotient = _adam(avg + corner + at, sq + corner + at, value, kept, shares, eps)
        tl.store(out + corner + at, quotient, mask=line_inside[:, None] & entry_inside)
        direction_squares += tl.sum(quotient * quotient, axis=1).to(tl.float64)
        low_squares += tl.sum(value * value, axis=1).to(tl.float64)
        corner += ENTRIES * low_rank.columns
    sums_at = matrix * lines + line + line_offsets
    tl.store(direction_sq + sums_at, direction_squares, mask=line_inside)
    tl.store(low_rank_sq + sums_at, low_squares, mask=line_inside)


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
    alpha: float = 1.0,
) -> None:
    """One AdamW step as the released code makes it: bias correction on the step size, decay after the update.

    Elements whose gradient is not finite, or has a square that overflows, are left as they are, moments included.
    Computed in float32; param and moments are rounded once each.

    Args:
        param: any shape, contiguous, float32, bfloat16 or float16; changed.
        grad: the same shape, any of these dtypes.
        exp_avg: first moment, the same shape, any of these dtypes; changed.
        exp_avg_sq: second moment, likewise.
        step: this step's count, from 1.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to sqrt(V).
        weight_decay: decoupled, times lr.
        alpha: multiplies the step, not the decay.

    Raises:
        ValueError: a tensor is not contiguous, or not of the parameter's size.
    """
    for name, tensor in (("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not tensor.is_contiguous() or tensor.numel() != param.numel():
            raise ValueError(
                f"{name} with shape {tuple(tensor.shape)} and strides {tensor.stride()} does not fit a param of "
                f"{param.numel()} elements; give contiguous tensors of one shape."
            )
    numel = param.numel()
    launch(
        _adamw,
        (triton.cdiv(numel, BLOCK),),
        param,
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        numel,
        lr * alpha * math.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step),
        1.0 - lr * weight_decay,
        _shares(betas),
        float(eps),
        BLOCK=BLOCK,
        num_warps=4,
    )


@triton.jit
def _adamw(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    numel,
    step_size,
    decay_factor,
    shares,
    eps,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    gradient = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    # False for NaN, for infinity, and for a square that overflows.
    kept = inside & (gradient * gradient < float("inf"))
    quotient = _adam(exp_avg + at, exp_avg_sq + at, gradient, kept, shares, eps)
    value = tl.load(param + at, mask=kept, other=0.0).to(tl.float32)
    value = (value - step_size * quotient) * decay_factor
    tl.store(param + at, rounded(value, param.dtype.element_ty), mask=kept)
