"""Sums of squares of fragments of matrices that ZeRO splits, wherever in a gradient they begin and end."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.moving import table_of
from ds_fira.core.kernels.tiles import launch
from ds_fira.core.kernels.views import UNIT

# Programs that sum up one fragment, at most, and elements of each at a time.
PROGRAMS, BLOCK = 64, 1024
_PROGRAMS = tl.constexpr(PROGRAMS)


def launch_squares(
    grad: Tensor, spans: Sequence[tuple[int, int]], rows: Sequence[int], partial: Tensor, sums: Tensor
) -> None:
    """|G|^2 of fragments of a gradient, float64, as the first number of rows whose second becomes zero.

    Args:
        grad: all of it, contiguous.
        spans: of every fragment its first element and how many there are.
        rows: of every row of `sums` the number of its fragment; -1 for none, whose sum is zero.
        partial: at least 64 numbers for each fragment, float64; written.
        sums: (rows, 2), float64; written.
    """
    programs = min(PROGRAMS, max((triton.cdiv(numel, BLOCK) for _, numel in spans), default=0))
    if spans:
        # Whole 16-byte units, where the fragments are.
        unit = 1 if any(number % UNIT for span in spans for number in span) else UNIT
        table = table_of(grad.device, tuple((first // unit, numel // unit) for first, numel in spans))
        launch(_square_fragments, (programs, len(spans)), grad, grad, table, unit, partial, BLOCK=BLOCK, num_warps=4)
    table = table_of(grad.device, tuple((row,) for row in rows))
    launch(_sum_fragments, (len(rows),), sums, partial, table, sums, programs, num_warps=2)


@triton.jit
def _square_fragments(grad, spans, unit, partial, BLOCK: tl.constexpr):
    fragment = tl.program_id(1).to(tl.int64)
    first = grad + tl.load(spans + fragment * 2) * unit
    numel = tl.load(spans + fragment * 2 + 1) * unit
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < numel:
        place = start + tl.arange(0, BLOCK)
        value = tl.load(first + place, mask=place < numel, other=0.0).to(tl.float32)
        total += (value * value).to(tl.float64)
        start += tl.num_programs(0) * BLOCK
    tl.store(partial + fragment * _PROGRAMS + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _sum_fragments(partial, fragments, sums, programs):
    row = tl.program_id(0).to(tl.int64)
    fragment = tl.load(fragments + row)
    held = (tl.arange(0, _PROGRAMS) < programs) & (fragment >= 0)
    parts = tl.load(partial + fragment * _PROGRAMS + tl.arange(0, _PROGRAMS), mask=held, other=0.0)
    total = tl.sum(parts, axis=0)
    tl.store(sums + row * 2, total)
    tl.store(sums + row * 2 + 1, total * 0.0)
