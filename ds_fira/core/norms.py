"""Sums of squares over matrices, and the blocks of rows in which a CPU forms what it needs beside a matrix.

A CPU adds up in blocks that stay in its cache. On another device a call is a launch, whatever it sums: a matrix of a
large model has up to a hundred blocks, so there one reduction sums all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fira.core.subspace import Side

# What has to be formed beside a matrix is formed in blocks of rows of this share of its bytes and no fewer than so many
# rows: no temporary comes near the size of a large matrix, and a block stays in cache.
BLOCK_SHARE = 1 / 32
MIN_BLOCK_ROWS = 8
# Elements up to which a matrix is summed up in float64: there it costs less than the calls.
SMALL_MATRIX = 2**13
# Elements, for each thread, of a block whose squares are formed at once where there is memory for them: they stay in
# the cache of a core, and threads wait for each other at the end of every block.
CACHED_BLOCK = 2**18


def block_rows(rows: int, bytes_ratio: float = 1.0) -> int:
    """Rows handled at once of a matrix with `rows` rows.

    `bytes_ratio` is that of the bytes formed for an element of the block to those that the matrix holds for it.
    """
    return max(MIN_BLOCK_ROWS, int(rows * BLOCK_SHARE / max(1.0, bytes_ratio)))


def row_slices(rows: int, bytes_ratio: float) -> list[slice]:
    """The blocks of `block_rows` rows that make up a matrix with `rows` rows."""
    height = block_rows(rows, bytes_ratio)
    return [slice(first, first + height) for first in range(0, rows, height)]


def summed_rows(shape: torch.Size, bytes_ratio: float = 1.0) -> int:
    """Rows summed at once of a matrix, (m, n): `block_rows`, and more of them in a small one, to make fewer calls."""
    return max(block_rows(shape[0], bytes_ratio), SMALL_MATRIX // max(1, shape[1]))


def sums_by_blocks(matrix: Tensor) -> bool:
    """Whether sums over a matrix are made in blocks of rows: on a CPU, where a block stays in cache.

    Elsewhere every call is a launch, and the device's own reduction adds in a tree.
    """
    return matrix.device.type == "cpu"


def reduced_squares(matrix: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The squared norms along a dimension, float64, by one reduction in `dtype`, without a copy of the matrix.

    Not `sum(dtype=torch.float64)`, which copies a float32 matrix to float64 first. A CUDA reduction reads half
    precision and adds in float32.
    """
    return torch.linalg.vector_norm(matrix, dim=dim, dtype=dtype).double().square()


def squared_norms(matrix: Tensor, side: Side, scratch: Tensor | None = None) -> Tensor:
    """|G_j|^2 of every column (left, n values) or of every row (right, m values), in float64; R's likewise.

    On a CPU squares are summed in the matrix's dtype inside a block of rows (left) or a row (right), and in float64
    from there on; in a small matrix in float64 throughout. Elsewhere one reduction sums a column or row in the matrix's
    dtype. A sum that is not finite says that the matrix holds NaN, infinity or elements whose squares overflow.

    Args:
        matrix: (m, n).
        side: the projected side.
        scratch: (k, n) of the matrix's dtype, whose values are not needed; squares may be formed in it, as many rows at
            once as it has and a cache holds, so that fewer calls sum a matrix.
    """
    if not sums_by_blocks(matrix):
        return reduced_squares(matrix, 0 if side == "left" else 1, matrix.dtype)
    if matrix.numel() <= SMALL_MATRIX:
        return matrix.double().square().sum(0 if side == "left" else 1)
    if side == "right":
        return reduced_squares(matrix, 1, matrix.dtype)
    rows = summed_rows(matrix.shape)
    if scratch is None or len(scratch) < rows:
        scratch = matrix.new_empty(rows, matrix.shape[1])
    scratch = scratch[: max(rows, CACHED_BLOCK * torch.get_num_threads() // matrix.shape[1])]
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for block in matrix.split(len(scratch)):
        total += torch.mul(block, block, out=scratch[: len(block)]).sum(0)
    return total


def total_square(grad: Tensor, dtype: torch.dtype, side: Side) -> Tensor:
    """|G|^2 of a gradient, or of a block of one, float64, 0-dim; formed in `dtype`, on a CPU in blocks of rows."""
    if not sums_by_blocks(grad):
        return reduced_squares(grad, 1, dtype).sum()
    blocks = grad.split(summed_rows(grad.shape, 4.0))
    return sum(squared_norms(block.to(dtype), side).sum() for block in blocks)
