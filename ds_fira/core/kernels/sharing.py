"""Lines 12 and 13 of Algorithm 1 for matrices whose entries several ranks keep, with a sum over the ranks between.

`_measure_entries` gives what the ranks add up, as `ShardStep.advance` has it; `_take_sums` makes of the sums what
`ds_fira.core.kernels.combining` goes on with, as `ShardStep.scale` has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fira.core.kernels import numbers as places
from ds_fira.core.kernels.finite import Finite, sum_of_strips
from ds_fira.core.kernels.measuring import BLOCK, Measuring, Memory, Squares, _factor, _squares_of, note_step
from ds_fira.core.kernels.numbers import double
from ds_fira.core.kernels.tiles import launch, tile
from ds_fira.core.kernels.views import View, origin
from ds_fira.core.settings import GroupSettings
from ds_fira.core.subspace import Side

_GRAD_SQ, _LOW_RANK_SQ, _DIFFERENCE = map(tl.constexpr, (places.GRAD_SQ, places.LOW_RANK_SQ, places.DIFFERENCE))
_SCALED_GRAD_SQ, _FINITE, _NEEDED = map(tl.constexpr, (places.SCALED_GRAD_SQ, places.FINITE, places.NEEDED))
_PREVIOUS, _BIAS, _SHARE = map(tl.constexpr, (places.PREVIOUS, places.BIAS_CORRECTION, places.SHARE))
_COUNT, _AVERAGE, _RESIDUAL_SQ = map(tl.constexpr, (places.COUNT, places.AVERAGE, places.RESIDUAL_SQ))


def launch_measure_entries(
    squares: Squares,
    phi: View,
    numbers: View,
    rows: View,
    total: Finite,
    memory: Memory,
    count: int,
    lines: int,
    shape: tuple[int, int],
    rank: int,
    settings: GroupSettings,
    side: Side,
) -> None:
    """Phi of the entries that a rank keeps, and what all ranks have to add up, of k matrices alike.

    Args:
        squares: of each entry.
        phi: float64; written where every entry has a factor of its own.
        numbers: written, see `ds_fira.core.kernels.numbers`; the squares are of the rank's own entries.
        rows: three numbers of each matrix, float64, written: |R|^2; then |S|^2 and |phi * G|^2, or with one factor for
            all entries the two squares that it is made of.
        total: |G|^2 over all ranks, as the one strip of a matrix.
        memory: of each entry p changes.
        count: k.
        lines: entries kept.
        shape: (m, n) of the whole matrix.
        rank: r.
        settings: of the param group.
        side: the projected side.
    """
    block, form = tile(lines, BLOCK), settings.residual_form
    launch(
        _measure_entries,
        (count,),
        phi.data,
        squares,
        phi,
        numbers,
        rows,
        total,
        memory,
        lines,
        Measuring.of(shape, rank, settings, side),
        FORM=form.kernel,
        SCALING=settings.scaling,
        ONE=settings.has_one_factor,
        CORRECTED=settings.formulation == "paper",
        AVERAGED=memory.residual_avg_sq is not None and not settings.has_one_factor,
        LIMITED=settings.has_limiter,
        WARMING=settings.residual_warmup > 0,
        BLOCK=block,
        num_warps=max(1, min(8, block // 32)),
    )


def launch_take_sums(
    rows: View,
    phi: View,
    numbers: View,
    memory: Memory,
    count: int,
    shape: tuple[int, int],
    rank: int,
    settings: GroupSettings,
    side: Side,
) -> None:
    """Of the sums over all ranks the numbers of k matrices alike, and phi where one factor is for all entries.

    Args:
        rows: as `launch_measure_entries` writes them, summed.
        phi: float64; written where one factor is for all entries.
        numbers: written.
        memory: p is read.
        count: k.
        shape: (m, n) of the whole matrix.
        rank: r.
        settings: of the param group.
        side: the projected side.
    """
    launch(
        _take_sums,
        (count,),
        phi.data,
        rows,
        phi,
        numbers,
        memory,
        Measuring.of(shape, rank, settings, side),
        FORM=settings.residual_form.kernel,
        SCALING=settings.scaling,
        ONE=settings.has_one_factor,
        CORRECTED=settings.formulation == "paper",
        AVERAGED=memory.residual_avg_sq is not None,
        num_warps=1,
    )


@triton.jit
def _measure_entries(
    squares,
    phi,
    numbers,
    rows,
    total,
    memory,
    lines,
    settings,
    FORM: tl.constexpr,
    SCALING: tl.constexpr,
    ONE: tl.constexpr,
    CORRECTED: tl.constexpr,
    AVERAGED: tl.constexpr,
    LIMITED: tl.constexpr,
    WARMING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(0).to(tl.int64)
    numbers_at = origin(numbers, matrix)
    rows_at = origin(rows, matrix)
    count = tl.load(origin(memory.step, matrix)) + 1
    count, bias = note_step(numbers_at, memory, matrix, count, settings, LIMITED, WARMING, False)
    tl.store(numbers_at + _FINITE, bias * 0.0 + 1.0)
    tl.store(numbers_at + _NEEDED, bias * 0.0)
    tl.store(numbers_at + _GRAD_SQ, sum_of_strips(total.strip_sq, total.strips, matrix))

    phi_at = origin(phi, matrix)
    average_at = phi_at
    if AVERAGED:
        average_at = origin(memory.residual_avg_sq, matrix)
    low_rank_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    first_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    second_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, lines, BLOCK):
        line = start + tl.arange(0, BLOCK)
        kept = line < lines
        first, second, grad_sq, low_rank_sq = _squares_of(squares, matrix, line, kept, settings, FORM)
        low_rank_sum += low_rank_sq
        if ONE:
            first_sum += first
            second_sum += second
        elif FORM != "none":
            own, averages = _factor(
                first, second, average_at + line, kept, count, bias, settings, FORM, SCALING, CORRECTED, AVERAGED
            )
            tl.store(phi_at + line, own, mask=kept)
            if AVERAGED:
                tl.store(average_at + line, averages, mask=kept)
            first_sum += own * own * second
            second_sum += own * own * grad_sq
    low_rank_total = tl.sum(low_rank_sum, axis=0)
    first_total = tl.sum(first_sum, axis=0)
    second_total = tl.sum(second_sum, axis=0)
    if FORM == "scaled" and not ONE:
        first_total = second_total - double(settings.cross) * first_total
    tl.store(rows_at, low_rank_total)
    tl.store(rows_at + 1, first_total)
    tl.store(rows_at + 2, second_total)
    # Where one rank keeps all entries these are the sums.
    tl.store(numbers_at + _LOW_RANK_SQ, low_rank_total)
    tl.store(numbers_at + _DIFFERENCE, first_total)
    tl.store(numbers_at + _SCALED_GRAD_SQ, second_total)


@triton.jit
def _take_sums(
    rows,
    phi,
    numbers,
    memory,
    settings,
    FORM: tl.constexpr,
    SCALING: tl.constexpr,
    ONE: tl.constexpr,
    CORRECTED: tl.constexpr,
    AVERAGED: tl.constexpr,
):
    matrix = tl.program_id(0).to(tl.int64)
    rows_at = origin(rows, matrix)
    numbers_at = origin(numbers, matrix)
    difference = tl.load(rows_at + 1)
    scaled_grad_sq = tl.load(rows_at + 2)
    if ONE:
        phi_at = origin(phi, matrix)
        average_at = phi_at
        if AVERAGED:
            average_at = origin(memory.residual_avg_sq, matrix)
        count = tl.load(numbers_at + _COUNT).to(tl.int64)
        bias = tl.load(numbers_at + _BIAS)
        factor, average = _factor(
            difference, scaled_grad_sq, average_at, count > 0, count, bias, settings, FORM, SCALING, CORRECTED, AVERAGED
        )
        tl.store(phi_at, factor)
        if AVERAGED:
            tl.store(numbers_at + _AVERAGE, average.to(tl.float64))
        lower = factor * factor * scaled_grad_sq
        scaled_grad_sq = factor * factor * tl.load(numbers_at + _GRAD_SQ)
        difference = lower
        if FORM == "scaled":
            difference = scaled_grad_sq - double(settings.cross) * lower
    tl.store(numbers_at + _LOW_RANK_SQ, tl.load(rows_at))
    tl.store(numbers_at + _DIFFERENCE, difference)
    tl.store(numbers_at + _RESIDUAL_SQ, difference)
    tl.store(numbers_at + _SCALED_GRAD_SQ, scaled_grad_sq)
