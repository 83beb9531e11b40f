"""Sums of squares over matrices, and the blocks of rows in which a CPU forms what it needs beside a matrix.

A CPU adds up in blocks that stay in its cache. On another device a call is a launch, whatever it sums: a matrix of a
large model has up to a hundred blocks, so there one reduction sums all of it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ds_fira.core.subspace import Side

# What has to be formed beside a matrix is formed in blocks of rows of this share of its bytes and no fewer than so many
# rows: no temporary comes near the size of a large matrix, and a block stays in cache.
BLOCK_SHARE = 1 / 32
MIN_BLOCK_ROWS = 8
# Elements up to which a matrix is summed up in float64: there it costs no more calls, and few sums share the roundings.
SMALL_MATRIX = 2**11
# Rows that a sum over columns adds up in a matrix's own dtype before float64 takes over, about: the longer, the fewer
# sums are kept, and the more roundings each has (5e-7 of a sum of 128 float32 squares).
SUMMED_ROWS = 128


def block_rows(rows: int, bytes_ratio: float = 1.0) -> int:
    """Rows handled at once of a matrix with `rows` rows.

    `bytes_ratio` is that of the bytes formed for an element of the block to those that the matrix holds for it.
    """
    return max(MIN_BLOCK_ROWS, int(rows * BLOCK_SHARE / max(1.0, bytes_ratio)))


def row_slices(rows: int, bytes_ratio: float) -> list[slice]:
    """The blocks of `block_rows` rows that make up a matrix with `rows` rows."""
    height = block_rows(rows, bytes_ratio)
    return [slice(first, first + height) for first in range(0, rows, height)]


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
    return torch.linalg.vector_norm(matrix, dim=dim, dtype=dtype).double().square_()


def squared_norms(matrix: Tensor, side: Side) -> Tensor:
    """|G_j|^2 of every column (left, n values) or of every row (right, m values), in float64; R's likewise.

    On a CPU squares are summed in the matrix's dtype over some rows of a column (left) or over a row (right), and in
    float64 from there on; in a small matrix in float64 throughout. Elsewhere one reduction sums a column or row in the
    matrix's dtype. A sum that is not finite says that the matrix holds NaN, infinity or elements whose squares
    overflow.

    Args:
        matrix: (m, n).
        side: the projected side.
    """
    dim = 0 if side == "left" else 1
    if matrix.numel() <= SMALL_MATRIX and sums_by_blocks(matrix):
        return matrix.double().square().sum(dim)
    if dim == 1 or not sums_by_blocks(matrix):
        return reduced_squares(matrix, dim, matrix.dtype)
    if not matrix.is_contiguous():
        return sum(column_squares(matrix[rows].contiguous()) for rows in row_slices(len(matrix), 1.0))
    return column_squares(matrix)


def column_squares(matrix: Tensor) -> Tensor:
    """The squared norms of the columns of a contiguous matrix on a CPU, float64, in one pass over it.

    They are what a layer normalization's backward pass gives its weight, the sums over rows of dY (X - mean) / std:
    with G for both, means of 0 and deviations of 1. torch's other sums over columns write the squares first, or read
    the matrix column by column. So that no sum gets long, several rows beside each other are one row with more columns.

    Args:
        matrix: (m, n), neither of them 0.
    """
    m, n = matrix.shape
    beside = _rows_beside(m)
    if m % beside:
        parts = matrix.split(m - m % beside)
        return column_squares(parts[0]) + column_squares(parts[1])
    folded = matrix.view(m // beside, beside * n)
    means, deviations = _no_means(len(folded), matrix.dtype)
    sums = torch.ops.aten.native_layer_norm_backward.default(
        folded, folded, (beside * n,), means, deviations, folded[0], None, _WEIGHT_ALONE
    )[1]
    return sums.double() if beside == 1 else sums.view(beside, n).sum(0, dtype=torch.float64)


@cache
def _rows_beside(rows: int) -> int:
    """How many rows are made one, a divisor where there is one near; 1 for fewer than twice `SUMMED_ROWS`."""
    most = max(1, rows // SUMMED_ROWS)
    return next((number for number in range(most, most // 2, -1) if rows % number == 0), most)


# Of the gradients of a layer normalization's input, weight and bias.
_WEIGHT_ALONE = (False, True, False)


@cache
def _no_means(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means of 0 and reciprocal deviations of 1; of about `SUMMED_ROWS` to twice as many rows, so there are few."""
    return torch.zeros(rows, dtype=dtype), torch.ones(rows, dtype=dtype)


def total_square(grad: Tensor, dtype: torch.dtype, side: Side) -> Tensor:
    """|G|^2 of a gradient, or of a block of one, float64, 0-dim; formed in `dtype`, on a CPU in blocks of rows."""
    if not sums_by_blocks(grad):
        return reduced_squares(grad, 1, dtype).sum()
    blocks = [grad] if grad.dtype == dtype else [grad[rows].to(dtype) for rows in row_slices(len(grad), 4.0)]
    return sum(squared_norms(block, side).sum() for block in blocks)
