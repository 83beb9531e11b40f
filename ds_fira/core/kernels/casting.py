"""A factor of a product rounded once, so that the programs that read it read half the bytes and round nothing."""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fira.core.kernels.tiles import launch, rounded, tile, tile_at
from ds_fira.core.kernels.views import View

# Of a factor that is stored row by row.
TILE = (16, 128)


def launch_cast(values: View, out: View, sizes: tuple[int, int, int]) -> None:
    """Round matrices to the dtype of `out`, to the nearest, ties to even, as a product would round them for itself.

    Args:
        values: of any floating dtype.
        out: written.
        sizes: k, rows, columns.
    """
    count, rows, columns = sizes
    shape = (tile(rows, TILE[0]), tile(columns, TILE[1]))
    launch(
        _cast,
        (triton.cdiv(rows, shape[0]), triton.cdiv(columns, shape[1]), count),
        values.data,
        values,
        out,
        rows,
        columns,
        ROWS=shape[0],
        COLUMNS=shape[1],
        num_warps=4,
    )


@triton.jit
def _cast(values, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * COLUMNS
    values_at, inside = tile_at(values, matrix, row, column, rows, columns, ROWS, COLUMNS)
    out_at, _ = tile_at(out, matrix, row, column, rows, columns, ROWS, COLUMNS)
    found = tl.load(values_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, rounded(found, out_at.dtype.element_ty), mask=inside)
