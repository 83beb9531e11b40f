"""What the kernels share: tile sizes, launching, and the products of tiles.

Sizes are for an H100 (132 multiprocessors, 227 KB of shared memory and 64 K registers each). A tile shrinks to the
next power of two of a small matrix, and no further than 16, the least that tl.dot takes.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.views import View, batched, origin

MIN_TILE = 16
# The widest tile of matrices with odd strides.
ODD_COLUMNS = 64
# The interpreter handles bfloat16 in its own way.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Tiles(NamedTuple):
    """The tile of a product: rows x columns of the result, depth of a slice of the sum, and how a program runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def within(self, rows: int, columns: int, depth: int, *views: View) -> Tiles:
        """These tiles for a product (rows, depth) x (depth, columns) of `views`, no larger than it needs.

        Rows that are not whole 16-byte units are read element by element, whose addresses take up the registers that
        a wide tile would have to have.
        """
        odd = any(stride != 1 and stride % 16 for view in views for stride in (view.rows, view.columns))
        return self._replace(
            rows=tile(rows, self.rows),
            columns=tile(columns, min(self.columns, ODD_COLUMNS) if odd else self.columns),
            depth=tile(depth, self.depth),
        )

    @property
    def options(self) -> dict[str, int]:
        """What `launch` has to say of them."""
        sizes = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        # A narrow tile is work for few threads, and eight warps of them have too few registers each on an sm_100.
        warps = self.warps if self.columns > MIN_TILE else min(self.warps, 4)
        return {**sizes, "num_warps": warps, "num_stages": self.stages}


# Products in float32 run on the plain units, whose operands pass through registers: a deeper slice spills them.
TILES = {
    "project": {
        "float32": Tiles(rows=128, columns=64, depth=16, warps=8, stages=3),
        "tf32": Tiles(rows=128, columns=256, depth=32, warps=8, stages=3),
        "bfloat16": Tiles(rows=128, columns=256, depth=32, warps=8, stages=3),
    },
    "update": {
        "float32": Tiles(rows=128, columns=64, depth=16, warps=8, stages=3),
        "tf32": Tiles(rows=128, columns=128, depth=32, warps=8, stages=3),
        "bfloat16": Tiles(rows=128, columns=128, depth=64, warps=8, stages=3),
    },
    # A loop over tiles around a loop over the rank spills the registers of a larger tile.
    "residual": {
        "float32": Tiles(rows=64, columns=64, depth=16, warps=8, stages=3),
        "tf32": Tiles(rows=64, columns=64, depth=32, warps=8, stages=3),
        "bfloat16": Tiles(rows=64, columns=64, depth=32, warps=8, stages=3),
    },
}


def tiles(product: str, precision: str) -> Tiles:
    """The tiles of a product in `precision`.

    Args:
        product: "project", "update" or "residual".
        precision: "float32", "tf32" or "bfloat16".

    Raises:
        ValueError: no such precision.
    """
    if precision not in TILES[product]:
        legal = ", ".join(repr(name) for name in TILES[product])
        raise ValueError(f"precision = {precision!r} is not legal; choose one of {legal}.")
    return TILES[product][precision]


def tile(size: int, most: int) -> int:
    """A power of two that covers `size`, from 16 to `most`."""
    return min(most, max(MIN_TILE, triton.next_power_of_2(size)))


def flags(tensor: Tensor, count: int) -> View:
    """One byte per matrix of a bool tensor (k,) or (), as kernels load bytes and not truth values."""
    return batched(tensor.view(torch.uint8), count)


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], tensor: Tensor, *args: object, **options: object) -> None:
    """Run `kernel` on the device of `tensor`, which need not be the current one; an empty grid is nothing to do."""
    if 0 in grid:
        return
    device: AbstractContextManager[object] = (
        torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    )
    with device:
        # Said, because the default differs from one version of Triton to the next.
        kernel[grid](*args, enable_fp_fusion=True, **options)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """Float32 values rounded to the nearest, ties to even, in `dtype`."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts off the low half of the bits; with these added that rounds.
        bits = values.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def nearest_tf32(values):
    """A tile in float32 with 10 bits of mantissa, rounded to the nearest, ties away from zero.

    Tensor cores cut the other 13 bits off, which makes every factor 3.5e-4 too small on average, and |R|^2 1.4e-3.
    """
    if values.dtype == tl.float32:
        bits = values.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x1000) >> 13 << 13).to(tl.float32, bitcast=True)
        # The sum would carry a NaN of all ones over into zero; infinity ends in zeros and stays.
        values = tl.where(values == values, nearest, values)
    # bfloat16 and float16 have no more bits than that. Behind a return the compiler would read the rest for them too.
    return values.to(tl.float32)


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """Total + left @ right in float32 accumulation, for tiles of any floating dtype."""
    if PRECISION == "bfloat16":
        if INTERPRETED:
            # Here bfloat16 is kept as bits, which tl.dot would take for integers.
            left = rounded(left.to(tl.float32), tl.bfloat16).to(tl.float32)
            right = rounded(right.to(tl.float32), tl.bfloat16).to(tl.float32)
        else:
            left = left.to(tl.bfloat16)
            right = right.to(tl.bfloat16)
        total = tl.dot(left, right, total)
    elif PRECISION == "tf32":
        total = tl.dot(nearest_tf32(left), nearest_tf32(right), total, input_precision="tf32")
    else:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return total


@triton.jit
def product(
    left,
    right,
    matrix,
    row,
    column,
    m,
    n,
    rank,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The tile of left @ right that begins at (row, column), for views of left (m, rank) and right (rank, n)."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    depths = tl.arange(0, DEPTH)
    # Only the tile's corner can lie 2^31 elements in.
    left_at = origin(left, matrix) + row.to(tl.int64) * left.rows
    left_at = left_at + (rows[:, None] * left.rows + depths[None, :] * left.columns)
    right_at = origin(right, matrix) + column.to(tl.int64) * right.columns
    right_at = right_at + (depths[:, None] * right.rows + columns[None, :] * right.columns)
    row_inside = (row + rows < m)[:, None]
    column_inside = (column + columns < n)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rank, DEPTH):
        inside = depths < rank - start
        left_tile = tl.load(left_at, mask=row_inside & inside[None, :], other=0.0)
        right_tile = tl.load(right_at, mask=inside[:, None] & column_inside, other=0.0)
        total = dot(left_tile, right_tile, total, PRECISION)
        left_at += DEPTH * left.columns
        right_at += DEPTH * right.rows
    return total


@triton.jit
def tile_corner(index, m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr = 8):
    """The corner of tile `index` of an (m, n) matrix, in an order that works through GROUP rows of tiles at a time.

    Neighbors in this order share slices of both factors, which then stay in the L2 cache.
    """
    tiles_m = tl.cdiv(m, ROWS)
    tiles_n = tl.cdiv(n, COLUMNS)
    first = index // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = index % (GROUP * tiles_n)
    return (first + within % height) * ROWS, (within // height) * COLUMNS


@triton.jit
def tile_at(view, matrix, row, column, m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers into the tile of an (m, n) matrix that begins at (row, column), and which of them are inside."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    corner = origin(view, matrix) + row.to(tl.int64) * view.rows + column.to(tl.int64) * view.columns
    inside = (row + rows < m)[:, None] & (column + columns < n)[None, :]
    return corner + (rows[:, None] * view.rows + columns[None, :] * view.columns), inside


@triton.jit
def load_tile(view, matrix, row, column, m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """That tile in float32, zero outside the matrix."""
    at, inside = tile_at(view, matrix, row, column, m, n, ROWS, COLUMNS)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_scale(phi, matrix, row, column, m, n, BY_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Factors of that tile in float32, (ROWS, 1) or (1, COLUMNS); one for all is a stride of zero."""
    factors_at = origin(phi, matrix)
    if BY_ROW:
        rows = row + tl.arange(0, ROWS)
        factors = tl.load(factors_at + rows * phi.rows, mask=rows < m, other=0.0)[:, None]
    else:
        columns = column + tl.arange(0, COLUMNS)
        factors = tl.load(factors_at + columns * phi.rows, mask=columns < n, other=0.0)[None, :]
    return factors.to(tl.float32)
