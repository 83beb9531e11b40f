"""The update of W, without a temporary of its size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.stored import store_rounded
from ds_fira.core.kernels.tiles import (
    flags,
    launch,
    load_scale,
    load_tile,
    product,
    tile_at,
    tile_corner,
    tiles,
)
from ds_fira.core.kernels.views import View, batched, origin


def apply_update_(
    weight: Tensor,
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    phi: Tensor | None,
    *,
    by_row: bool,
    decay_factor: float,
    grad_finite: Tensor,
    precision: str,
    count: Tensor | None = None,
) -> None:
    """W <- decay_factor * W - (phi * G + left @ right): lines 15 and 16 of Algorithm 1 (arXiv 2410.01623).

    G and W are read once and W is written once, computed in float32 and rounded once.

    Args:
        weight: W, (m, n) or (k, m, n), float32, bfloat16 or float16, any strides.
        grad: G, the same shape, any of these dtypes.
        left: (..., m, r); P on the left, what P carries back on the right.
        right: (..., r, n); what P carries back on the left, P' on the right.
        phi: factors of G, (..., n), one per column, or (..., m), one per row, or (..., 1); None to
            leave phi * G out, and G unread.
        by_row: whether phi has one factor per row.
        decay_factor: the share of W that weight decay leaves.
        grad_finite: bool, (k,) or (); where it is False nothing is written.
        precision: of the product: "float32", "tf32" or "bfloat16"; accumulated in float32 in each.
        count: this step's, from 1, (k,) or (): W in bfloat16 is rounded stochastically by it; None for the nearest.
    """
    matrices, m, n = (1, *weight.shape)[-3:]
    rank = left.shape[-1]
    launch_update(
        batched(weight, matrices, m, n),
        batched(grad, matrices, m, n),
        batched(left, matrices, m, rank),
        batched(right, matrices, rank, n),
        None if phi is None else batched(phi, matrices, m if by_row else n),
        flags(grad_finite, matrices),
        (matrices, m, n, rank),
        decay_factor,
        None if count is None else batched(count, matrices),
        by_row=by_row,
        precision=precision,
    )


def launch_update(
    weight: View,
    grad: View,
    left: View,
    right: View,
    phi: View | None,
    grad_finite: View,
    sizes: tuple[int, int, int, int],
    decay_factor: float | View,
    count: View | None = None,
    *,
    by_row: bool,
    precision: str,
) -> None:
    """`apply_update_` on operands that lie anywhere.

    Args:
        weight: W, (m, n); changed.
        grad: G, (m, n).
        left: (m, r).
        right: (r, n).
        phi: one factor for each column or row, or for all; None to leave phi * G out.
        grad_finite: a number of each matrix; where it is zero nothing is written.
        sizes: k, m, n, r.
        decay_factor: as in `apply_update_`; or where that of each matrix lies.
        count: a number of each matrix, as in `apply_update_`.
        by_row: as in `apply_update_`.
        precision: as in `apply_update_`.
    """
    matrices, m, n, rank = sizes
    shaped = tiles("update", precision).within(m, n, rank, weight, grad, left, right)
    launch(
        _apply_update,
        (triton.cdiv(m, shaped.rows) * triton.cdiv(n, shaped.columns), matrices),
        weight.data,
        weight,
        grad,
        left,
        right,
        phi,
        grad_finite,
        m,
        n,
        rank,
        decay_factor if isinstance(decay_factor, View) else float(decay_factor),
        count,
        NOISY=count is not None and weight.data.dtype == torch.bfloat16,
        STORED_DECAY=isinstance(decay_factor, View),
        BY_ROW=by_row,
        PRECISION=precision,
        **shaped.options,
    )


@triton.jit
def _apply_update(
    weight,
    grad,
    left,
    right,
    phi,
    grad_finite,
    m,
    n,
    rank,
    decay_factor,
    count,
    NOISY: tl.constexpr,
    STORED_DECAY: tl.constexpr,
    BY_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    if tl.load(origin(grad_finite, matrix)) == 0:
        return
    row, column = tile_corner(tl.program_id(0), m, n, ROWS, COLUMNS)
    update = product(left, right, matrix, row, column, m, n, rank, PRECISION, ROWS, COLUMNS, DEPTH)
    kept = tl.load(origin(decay_factor, matrix)).to(tl.float32) if STORED_DECAY else decay_factor
    seed = -tl.load(origin(count, matrix)).to(tl.int64) if NOISY else matrix
    # By quarters of the tile, for W and G of all of it have no room in registers beside the product.
    HALF: tl.constexpr = COLUMNS // 2
    QUARTER: tl.constexpr = COLUMNS // 4
    one, two = _halves(update, ROWS, HALF)
    first, second = _halves(one, ROWS, QUARTER)
    third, fourth = _halves(two, ROWS, QUARTER)
    _write(weight, grad, phi, first, matrix, row, column, m, n, kept, seed, BY_ROW, NOISY, ROWS, QUARTER)
    _write(weight, grad, phi, second, matrix, row, column + QUARTER, m, n, kept, seed, BY_ROW, NOISY, ROWS, QUARTER)
    _write(weight, grad, phi, third, matrix, row, column + HALF, m, n, kept, seed, BY_ROW, NOISY, ROWS, QUARTER)
    _write(
        weight, grad, phi, fourth, matrix, row, column + HALF + QUARTER, m, n, kept, seed, BY_ROW, NOISY, ROWS, QUARTER
    )


@triton.jit
def _halves(values, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The left and the right half of a tile of (ROWS, 2 HALF)."""
    return tl.split(tl.permute(tl.reshape(values, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def _write(
    weight,
    grad,
    phi,
    update,
    matrix,
    row,
    column,
    m,
    n,
    kept,
    seed,
    BY_ROW: tl.constexpr,
    NOISY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The tile of W that begins at (row, column), with the product that belongs there."""
    if phi is not None:
        scale = load_scale(phi, matrix, row, column, m, n, BY_ROW, ROWS, COLUMNS)
        update += scale * load_tile(grad, matrix, row, column, m, n, ROWS, COLUMNS)
    value = load_tile(weight, matrix, row, column, m, n, ROWS, COLUMNS) * kept - update
    weight_at, inside = tile_at(weight, matrix, row, column, m, n, ROWS, COLUMNS)
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    place = rows[:, None] * n + (column + tl.arange(0, COLUMNS))[None, :]
    store_rounded(weight_at, value, place, seed, inside, NOISY)
