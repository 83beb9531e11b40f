"""The norm of the scaled residual, summed from the residual itself without forming it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.tiles import Tiles, flags, launch, load_scale, load_tile, product, tile_corner, tiles
from ds_fira.core.kernels.views import View, batched, origin
from ds_fira.core.subspace import Side

# Programs of one matrix: enough to fill the device, and soon over where the sum is not needed.
PROGRAMS = 256


def residual_square(
    grad: Tensor,
    basis: Tensor,
    low_rank: Tensor,
    phi: Tensor,
    *,
    side: Side,
    alpha: float,
    needed: Tensor,
    precision: str,
) -> Tensor:
    """|phi * (G - a P R)|^2 of each matrix from the residual itself (equation 10, arXiv 2410.01623).

    The squares are summed in float32 inside a row of a tile and in float64 from there on, in a fixed order.

    Args:
        grad: G, (m, n) or (k, m, n), float32, bfloat16 or float16, any strides.
        basis: P, (..., m, r) on the left, (..., n, r) on the right.
        low_rank: R, (..., r, n) on the left, (..., m, r) on the right.
        phi: scaling factors, (..., n) on the left, (..., m) on the right, or (..., 1).
        side: the projected side.
        alpha: a, 1 in the paper's formulation.
        needed: bool, (k,) or (); where it is False the result is 0 and costs next to nothing.
        precision: of the product: "float32", "tf32" or "bfloat16"; accumulated in float32 in each.

    Returns:
        float64, (k,) for a batch and () for one matrix.
    """
    count, m, n = (1, *grad.shape)[-3:]
    rank = basis.shape[-1]
    left, right = (basis, low_rank) if side == "left" else (low_rank, basis.mT)
    partial = torch.empty((count, programs(m, n, precision)), dtype=torch.float64, device=grad.device)
    launch_residual_square(
        batched(grad, count, m, n),
        batched(left, count, m, rank),
        batched(right, count, rank, n),
        batched(phi, count, n if side == "left" else m),
        flags(needed, count),
        batched(partial, *partial.shape),
        (count, m, n, rank),
        alpha,
        by_row=side == "right",
        precision=precision,
    )
    total = partial.sum(1)
    return total if grad.dim() > 2 else total[0]


def programs(m: int, n: int, precision: str) -> int:
    """How many programs sum the residual of an (m, n) matrix, each with a sum of its own."""
    shaped = _tiles(m, n, 0, precision)
    return min(triton.cdiv(m, shaped.rows) * triton.cdiv(n, shaped.columns), PROGRAMS)


def _tiles(m: int, n: int, rank: int, precision: str) -> Tiles:
    return tiles("residual", precision).within(m, n, rank)


def launch_residual_square(
    grad: View,
    left: View,
    right: View,
    phi: View,
    needed: View,
    partial: View,
    sizes: tuple[int, int, int, int],
    alpha: float,
    *,
    by_row: bool,
    precision: str,
) -> None:
    """`residual_square` as sums of its programs, in memory that is there.

    Args:
        grad: G, (m, n).
        left: (m, r); P on the left, R on the right.
        right: (r, n); R on the left, P' on the right.
        phi: scaling factors, one for each column or row, or for all.
        needed: a number of each matrix; where it is zero the sums are.
        partial: the sums, one for each of `programs`, float64.
        sizes: k, m, n, r.
        alpha: as in `residual_square`.
        by_row: whether phi has one factor per row.
        precision: as in `residual_square`.
    """
    count, m, n, rank = sizes
    launch(
        _residual_square,
        (programs(m, n, precision), count),
        grad.data,
        grad,
        left,
        right,
        phi,
        needed,
        partial,
        m,
        n,
        rank,
        float(alpha),
        BY_ROW=by_row,
        PRECISION=precision,
        **_tiles(m, n, rank, precision).options,
    )


@triton.jit
def _residual_square(
    grad,
    left,
    right,
    phi,
    needed,
    partial,
    m,
    n,
    rank,
    alpha,
    BY_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    partial_at = origin(partial, matrix) + tl.program_id(0)
    squares = tl.zeros((ROWS,), dtype=tl.float64)
    if tl.load(origin(needed, matrix)) == 0:
        tl.store(partial_at, tl.sum(squares, axis=0))
        return
    tiles_in_all = tl.cdiv(m, ROWS) * tl.cdiv(n, COLUMNS)
    for index in range(tl.program_id(0), tiles_in_all, tl.num_programs(0)):
        row, column = tile_corner(index, m, n, ROWS, COLUMNS)
        inside = product(left, right, matrix, row, column, m, n, rank, PRECISION, ROWS, COLUMNS, DEPTH)
        residual = load_tile(grad, matrix, row, column, m, n, ROWS, COLUMNS) - alpha * inside
        residual *= load_scale(phi, matrix, row, column, m, n, BY_ROW, ROWS, COLUMNS)
        squares += tl.sum(residual * residual, axis=1).to(tl.float64)
    tl.store(partial_at, tl.sum(squares, axis=0))
