"""R = P'G or GP together with the squared norms of G's columns or rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.tiles import batched, dot, launch, tile_at, tiles
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
    rank = basis.shape[-1]
    # On the left R' = G'P: then one kernel serves both sides, with "lines" for the columns (left) or rows (right) of G.
    turned = grad.mT if side == "left" else grad
    count, lines, depth = (1, *turned.shape)[-3:]
    grads, bases = batched(turned, count, lines, depth), batched(basis, count, depth, rank)
    batch, shape = grad.shape[:-2], (rank, lines) if side == "left" else (lines, rank)
    low_rank = torch.empty((*batch, *shape), dtype=torch.float32, device=grad.device)
    by_line = batched(low_rank.mT if side == "left" else low_rank, count, lines, rank)
    grad_sq = torch.empty((*batch, lines), dtype=torch.float64, device=grad.device)
    shaped = tiles(precision).within(lines, rank, depth, grads, bases, by_line)
    programs = triton.cdiv(lines, shaped.rows) * (triton.cdiv(rank, shaped.columns) + 1)
    launch(
        _project,
        (programs, count),
        grad,
        grads,
        bases,
        by_line,
        grad_sq,
        lines,
        depth,
        rank,
        PRECISION=precision,
        **shaped.options,
    )
    return low_rank, grad_sq


@triton.jit
def _project(
    grad,
    basis,
    low_rank,
    grad_sq,
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
    # The last of them sums the squares: that is no burden on the products, and as much work as one of them.
    blocks = tl.cdiv(rank, COLUMNS)
    block = tl.program_id(0) % (blocks + 1)
    line = tl.program_id(0) // (blocks + 1) * ROWS
    line_offsets = tl.arange(0, ROWS)
    depth_offsets = tl.arange(0, DEPTH)
    line_inside = line + line_offsets < lines
    grad_at = grad.data + matrix * grad.batch + line.to(tl.int64) * grad.rows
    grad_at = grad_at + (line_offsets[:, None] * grad.rows + depth_offsets[None, :] * grad.columns)

    if block == blocks:
        squares = tl.zeros((ROWS,), dtype=tl.float64)
        for start in range(0, depth, DEPTH):
            inside = line_inside[:, None] & (depth_offsets < depth - start)[None, :]
            values = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
            squares += tl.sum(values * values, axis=1).to(tl.float64)
            grad_at += DEPTH * grad.columns
        tl.store(grad_sq + matrix * lines + line + line_offsets, squares, mask=line_inside)
        return

    column = block * COLUMNS
    column_offsets = tl.arange(0, COLUMNS)
    column_inside = column + column_offsets < rank
    basis_at = basis.data + matrix * basis.batch + column.to(tl.int64) * basis.columns
    basis_at = basis_at + (depth_offsets[:, None] * basis.rows + column_offsets[None, :] * basis.columns)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        inside = depth_offsets < depth - start
        grad_tile = tl.load(grad_at, mask=line_inside[:, None] & inside[None, :], other=0.0)
        basis_tile = tl.load(basis_at, mask=inside[:, None] & column_inside[None, :], other=0.0)
        total = dot(grad_tile, basis_tile, total, PRECISION)
        grad_at += DEPTH * grad.columns
        basis_at += DEPTH * basis.rows
    low_at, inside = tile_at(low_rank, matrix, line, column, lines, rank, ROWS, COLUMNS)
    tl.store(low_at, total, mask=inside)
