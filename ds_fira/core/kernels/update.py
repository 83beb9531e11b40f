"""The update of W, without a temporary of its size."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.tiles import (
    batched,
    flags,
    launch,
    load_scale,
    load_tile,
    product,
    rounded,
    tile_at,
    tile_corner,
    tiles,
)


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
    """
    count, m, n = (1, *weight.shape)[-3:]
    rank = left.shape[-1]
    weights, grads = batched(weight, count, m, n), batched(grad, count, m, n)
    lefts, rights = batched(left, count, m, rank), batched(right, count, rank, n)
    # A kernel takes a pointer for what it does not read, too.
    phis = batched(weight.new_empty(1) if phi is None else phi, count, m if by_row else n)
    shaped = tiles(precision).within(m, n, rank, weights, grads, lefts, rights)
    launch(
        _apply_update,
        (triton.cdiv(m, shaped.rows) * triton.cdiv(n, shaped.columns), count),
        weight,
        weights,
        grads,
        lefts,
        rights,
        phis,
        flags(grad_finite, count),
        m,
        n,
        rank,
        float(decay_factor),
        BY_ROW=by_row,
        FULL_RANK=phi is not None,
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
    BY_ROW: tl.constexpr,
    FULL_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    if tl.load(grad_finite + matrix) == 0:
        return
    row, column = tile_corner(tl.program_id(0), m, n, ROWS, COLUMNS)
    update = product(left, right, matrix, row, column, m, n, rank, PRECISION, ROWS, COLUMNS, DEPTH)
    if FULL_RANK:
        scale = load_scale(phi, matrix, row, column, m, n, BY_ROW, ROWS, COLUMNS)
        update += scale * load_tile(grad, matrix, row, column, m, n, ROWS, COLUMNS)
    value = load_tile(weight, matrix, row, column, m, n, ROWS, COLUMNS) * decay_factor - update
    weight_at, inside = tile_at(weight, matrix, row, column, m, n, ROWS, COLUMNS)
    tl.store(weight_at, rounded(value, weight_at.dtype.element_ty), mask=inside)
