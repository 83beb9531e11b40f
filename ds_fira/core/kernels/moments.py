"""Adam's moments of the low-rank gradient, decoded, updated and encoded in one pass over what it reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.finite import Finite, is_finite
from ds_fira.core.kernels.stored import Moment, load_blocks, store_blocks, store_rounded
from ds_fira.core.kernels.tiles import flags, launch, tile
from ds_fira.core.kernels.views import View, batched, origin
from ds_fira.core.quantization import BLOCK
from ds_fira.core.subspace import Side

# Tiles of the moments: lines (columns on the left, rows on the right) x entries of a line, longest where memory is
# contiguous.
LEFT_TILE = (32, 32)
RIGHT_TILE = (16, 64)
# Blocks of 8-bit codes of one program.
BLOCKS = 4


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
    batch, (rows, columns) = low_rank.shape[:-2], low_rank.shape[-2:]
    count, lines = batch[0] if batch else 1, columns if side == "left" else rows
    direction = torch.empty(low_rank.shape, dtype=torch.float32, device=low_rank.device)
    direction_sq, low_rank_sq = torch.empty((2, *batch, lines), dtype=torch.float64, device=low_rank.device)
    views = [batched(tensor, count, rows, columns) for tensor in (low_rank, exp_avg, exp_avg_sq, direction)]
    launch_adam(
        views[0],
        (Moment(views[1]), Moment(views[2])),
        views[3],
        (batched(direction_sq, count, lines), batched(low_rank_sq, count, lines)),
        Finite(flags(grad_finite, count)),
        None,
        (count, rows, columns),
        betas=betas,
        eps=eps,
        side=side,
    )
    return direction, direction_sq, low_rank_sq


def launch_adam(
    low_rank: View,
    moments: tuple[Moment, Moment],
    direction: View,
    squares: tuple[View, View],
    grad_finite: Finite,
    step: View | None,
    sizes: tuple[int, int, int],
    *,
    betas: tuple[float, float],
    eps: float,
    side: Side,
) -> None:
    """`adam_direction_` on stored moments, in memory that is there; 8-bit moments take a second kernel for the squares.

    Args:
        low_rank: R, float32; like the moments and N stored row by row without gaps.
        moments: M and V; where they are stored rounded, their noise goes by the step.
        direction: N, float32.
        squares: |N_j|^2 and |R_j|^2, float64.
        grad_finite: of each matrix.
        step: steps made before this one, int64; None to round a half precision to the nearest.
        sizes: k, and the rows and columns of R.
        betas: decay rates of the moments.
        eps: added to sqrt(V).
        side: the projected side.
    """
    count, rows, columns = sizes
    shares, form = shares_of(betas), moments[0].form(noisy=step is not None)
    if form == "blocks":
        numel = rows * columns
        launch(
            _adam_blocks,
            (triton.cdiv(numel, BLOCKS * BLOCK), count),
            low_rank.data,
            low_rank,
            *moments,
            direction,
            grad_finite,
            step,
            numel,
            shares,
            float(eps),
            BLOCKS=BLOCKS,
            BLOCK=BLOCK,
            num_warps=4,
        )
    # A line is a column on the left, where it is turned, and a row on the right.
    lines, rank, along, across = (columns, rows, 1, columns) if side == "left" else (rows, columns, columns, 1)
    most = LEFT_TILE if side == "left" else RIGHT_TILE
    shape = (tile(lines, most[0]), tile(rank, most[1]))
    launch(
        _adam_direction,
        (triton.cdiv(lines, shape[0]), count),
        low_rank.data,
        low_rank._replace(rows=along, columns=across),
        *(moment.elements for moment in moments),
        direction,
        *squares,
        grad_finite,
        step,
        lines,
        rank,
        shares,
        float(eps),
        FORM=form,
        LINES=shape[0],
        ENTRIES=shape[1],
        num_warps=4,
    )


def _row_major(tensor: Tensor) -> bool:
    """Whether the last two dimensions are contiguous; the batch may have any stride."""
    rows, columns = tensor.shape[-2:]
    return (columns == 1 or tensor.stride(-1) == 1) and (rows == 1 or tensor.stride(-2) == columns)


def shares_of(betas: tuple[float, float]) -> tuple[float, float, float, float]:
    """Of both moments the share that is kept and the share that is new."""
    return float(betas[0]), 1.0 - betas[0], float(betas[1]), 1.0 - betas[1]


@triton.jit
def adam(average, average_sq, value, kept, shares, eps):
    """Both moments with a gradient, and M / (sqrt(V) + eps), zero where it is zero by zero or nothing is kept."""
    beta1, fresh1, beta2, fresh2 = shares
    average = average * beta1 + value * fresh1
    average_sq = average_sq * beta2 + value * value * fresh2
    # An eps of zero would divide zero by zero, outside and where no gradient has been.
    divisor = tl.sqrt_rn(average_sq) + eps
    return average, average_sq, tl.where(kept & (divisor > 0.0), tl.div_rn(average, divisor), 0.0)


@triton.jit
def _adam_direction(
    low_rank,
    exp_avg,
    exp_avg_sq,
    direction,
    direction_sq,
    low_rank_sq,
    grad_finite,
    step,
    lines,
    rank,
    shares,
    eps,
    FORM: tl.constexpr,
    LINES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    line = tl.program_id(0) * LINES
    line_offsets = tl.arange(0, LINES)
    entry_offsets = tl.arange(0, ENTRIES)
    line_inside = line + line_offsets < lines
    # None of the lines where the gradient is not finite: its NaN must not be read, as a product with zero keeps it.
    line_kept = line + line_offsets < lines * is_finite(grad_finite, matrix)
    seed = matrix * 0
    if FORM == "noisy":
        seed = 2 * (tl.load(origin(step, matrix)) + 1)
    # All four are stored alike.
    at = line_offsets[:, None] * low_rank.rows + entry_offsets[None, :] * low_rank.columns
    corner = line.to(tl.int64) * low_rank.rows
    low = origin(low_rank, matrix)
    avg = origin(exp_avg, matrix)
    sq = origin(exp_avg_sq, matrix)
    out = origin(direction, matrix)
    direction_squares = tl.zeros((LINES,), dtype=tl.float64)
    low_squares = tl.zeros((LINES,), dtype=tl.float64)
    for start in range(0, rank, ENTRIES):
        entry_inside = (entry_offsets < rank - start)[None, :]
        kept = line_kept[:, None] & entry_inside
        value = tl.load(low + corner + at, mask=kept, other=0.0).to(tl.float32)
        if FORM == "blocks":
            # The moments are updated already.
            quotient = tl.load(out + corner + at, mask=kept, other=0.0)
        else:
            avg_at = avg + corner + at
            sq_at = sq + corner + at
            average = tl.load(avg_at, mask=kept, other=0.0).to(tl.float32)
            average_sq = tl.load(sq_at, mask=kept, other=0.0).to(tl.float32)
            average, average_sq, quotient = adam(average, average_sq, value, kept, shares, eps)
            store_rounded(avg_at, average, corner + at, seed, kept, FORM == "noisy")
            store_rounded(sq_at, average_sq, corner + at, seed + 1, kept, FORM == "noisy")
            tl.store(out + corner + at, quotient, mask=line_inside[:, None] & entry_inside)
        direction_squares += tl.sum(quotient * quotient, axis=1).to(tl.float64)
        low_squares += tl.sum(value * value, axis=1).to(tl.float64)
        corner += ENTRIES * low_rank.columns
    tl.store(origin(direction_sq, matrix) + line + line_offsets, direction_squares, mask=line_inside)
    tl.store(origin(low_rank_sq, matrix) + line + line_offsets, low_squares, mask=line_inside)


@triton.jit
def _adam_blocks(
    low_rank,
    exp_avg,
    exp_avg_sq,
    direction,
    grad_finite,
    step,
    numel,
    shares,
    eps,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # As above.
    finite = is_finite(grad_finite, matrix)
    kept = place < numel * finite
    block_kept = block * BLOCK < numel * finite
    seed = 2 * (tl.load(origin(step, matrix)) + 1)
    value = tl.load(origin(low_rank, matrix) + place, mask=kept, other=0.0)
    avg_at = origin(exp_avg.elements, matrix) + place
    avg_scale_at = origin(exp_avg.scale, matrix) + block
    sq_at = origin(exp_avg_sq.elements, matrix) + place
    sq_scale_at = origin(exp_avg_sq.scale, matrix) + block
    average = load_blocks(avg_at, avg_scale_at, exp_avg.tables, kept, block_kept)
    average_sq = load_blocks(sq_at, sq_scale_at, exp_avg_sq.tables, kept, block_kept)
    average, average_sq, quotient = adam(average, average_sq, value, kept, shares, eps)
    store_blocks(avg_at, avg_scale_at, exp_avg.tables, average, place, seed, kept, block_kept)
    store_blocks(sq_at, sq_scale_at, exp_avg_sq.tables, average_sq, place, seed + 1, kept, block_kept)
    tl.store(origin(direction, matrix) + place, quotient, mask=place < numel)
