"""R = P'G or GP together with the squared norms of G's columns or rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.tiles import dot, launch, tile, tile_at, tiles
from ds_fira.core.kernels.views import View, batched, origin
from ds_fira.core.subspace import Side


def project(grad: Tensor, basis: Tensor, side: Side, precision: str) -> tuple[Tensor, Tensor]:
    """R and |G_j|^2 from one pass over G (lines 8 and 13 of Algorithm 1, arXiv 2410.01623).

    G is converted to the product's precision as it is loaded. Its squares are summed in float32 inside a tile and in
    float64 over tiles; NaN, infinity and squares that overflow make the sum of their column or row not finite.

    Args:
        grad: G, (m, n) or (k, m, n), float32, bfloat16 or float16, any strides.
        basis: P, (m, r) on the left, (n, r) on the right, with the same leading dimension.
        side: the projected side.
        precision: of the product: "float32", "tf32" or "bfloat16"; accumulated in float32 in each.

    Returns:
        R, float32, (..., r, n) on the left and (..., m, r) on the right; |G_j|^2, float64, (..., n) per column on the
        left and (..., m) per row on the right.
    """
    (m, n), rank, left = grad.shape[-2:], basis.shape[-1], side == "left"
    batch, lines, depth = grad.shape[:-2], n if left else m, m if left else n
    count = batch[0] if batch else 1
    low_rank = torch.empty((*batch, *((rank, n) if left else (m, rank))), dtype=torch.float32, device=grad.device)
    grad_sq = torch.empty((*batch, lines), dtype=torch.float64, device=grad.device)
    launch_project(
        batched(grad, count, m, n),
        batched(basis, count, depth, rank),
        batched(low_rank, count, *low_rank.shape[-2:]),
        batched(grad_sq, count, lines),
        None,
        (count, m, n, rank),
        side,
        precision,
    )
    return low_rank, grad_sq


def launch_project(
    grad: View,
    basis: View,
    low_rank: View,
    grad_sq: View,
    strip_sq: View | None,
    sizes: tuple[int, int, int, int],
    side: Side,
    precision: str,
) -> None:
    """`project` into memory that is there.

    Args:
        grad: G, (m, n).
        basis: P.
        low_rank: R, float32.
        grad_sq: |G_j|^2, float64.
        strip_sq: sums of |G_j|^2 over strips, `strips` of them, float64; None where nobody wants them.
        sizes: k, m, n, r.
        side: the projected side.
        precision: as in `project`.
    """
    count, m, n, rank = sizes
    # On the left R' = G'P: then one kernel serves both sides, with "lines" for the columns (left) or rows (right) of G.
    lines, depth = (n, m) if side == "left" else (m, n)
    if side == "left":
        grad, low_rank = (view._replace(rows=view.columns, columns=view.rows) for view in (grad, low_rank))
    shaped = tiles("project", precision).within(lines, rank, depth, grad, basis, low_rank)
    programs = triton.cdiv(lines, shaped.rows) * triton.cdiv(rank, shaped.columns)
    launch(
        _project,
        (programs, count),
        grad.data,
        grad,
        basis,
        low_rank,
        grad_sq,
        strip_sq,
        lines,
        depth,
        rank,
        PRECISION=precision,
        **shaped.options,
    )


def strips(lines: int, precision: str) -> int:
    """How many strips of G, of `lines` columns (left) or rows (right), there are sums of squares of."""
    return triton.cdiv(lines, tile(lines, tiles("project", precision).rows))


@triton.jit
def _project(
    grad,
    basis,
    low_rank,
    grad_sq,
    strip_sq,
    lines,
    depth,
    rank,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    # The programs of one strip of G stand side by side, so that the strip comes from memory once and then from L2.
    blocks = tl.cdiv(rank, COLUMNS)
    block = tl.program_id(0) % blocks
    line = tl.program_id(0) // blocks * ROWS
    line_offsets = tl.arange(0, ROWS)
    depth_offsets = tl.arange(0, DEPTH)
    line_inside = line + line_offsets < lines
    grad_at = origin(grad, matrix) + line.to(tl.int64) * grad.rows
    grad_at = grad_at + (line_offsets[:, None] * grad.rows + depth_offsets[None, :] * grad.columns)

    column = block * COLUMNS
    column_offsets = tl.arange(0, COLUMNS)
    column_inside = column + column_offsets < rank
    basis_at = origin(basis, matrix) + column.to(tl.int64) * basis.columns
    basis_at = basis_at + (depth_offsets[:, None] * basis.rows + column_offsets[None, :] * basis.columns)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    # Each program sums them, of which the first of a strip tells them: a branch would stand in the pipeline's way.
    squares = tl.zeros((ROWS, DEPTH), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        inside = depth_offsets < depth - start
        grad_tile = tl.load(grad_at, mask=line_inside[:, None] & inside[None, :], other=0.0)
        basis_tile = tl.load(basis_at, mask=inside[:, None] & column_inside[None, :], other=0.0)
        total = dot(grad_tile, basis_tile, total, PRECISION)
        values = grad_tile.to(tl.float32)
        squares += values * values
        grad_at += DEPTH * grad.columns
        basis_at += DEPTH * basis.rows
    low_at, inside = tile_at(low_rank, matrix, line, column, lines, rank, ROWS, COLUMNS)
    tl.store(low_at, total, mask=inside)
    if block == 0:
        sums = tl.sum(squares.to(tl.float64), axis=1)
        tl.store(origin(grad_sq, matrix) + line + line_offsets, sums, mask=line_inside)
        if strip_sq is not None:
            tl.store(origin(strip_sq, matrix) + line // ROWS, tl.sum(sums, axis=0))
