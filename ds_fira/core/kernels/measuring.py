"""Lines 12 and 13 of Algorithm 1 in one kernel: phi and |S| of each matrix, as `ds_fira.core.step.scale` has them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ds_fira.core import functional as F
from ds_fira.core.kernels import numbers as places
from ds_fira.core.kernels.finite import Finite, is_finite, sum_of_strips
from ds_fira.core.kernels.numbers import Pair, double, pair
from ds_fira.core.kernels.tiles import launch, tile
from ds_fira.core.kernels.views import View, origin
from ds_fira.core.normalized import elements_of, residual_floor
from ds_fira.core.settings import GroupSettings
from ds_fira.core.subspace import Side

# Columns or rows that one program looks at together.
BLOCK = 1024
_NORM_EPS = tl.constexpr(F.NORM_EPS)
_EXACT_SHARE = tl.constexpr(F.EXACT_RESIDUAL_SHARE)
_GRAD_SQ, _LOW_RANK_SQ, _DIFFERENCE = map(tl.constexpr, (places.GRAD_SQ, places.LOW_RANK_SQ, places.DIFFERENCE))
_SCALED_GRAD_SQ, _FINITE, _NEEDED = map(tl.constexpr, (places.SCALED_GRAD_SQ, places.FINITE, places.NEEDED))
_PREVIOUS, _BIAS, _SHARE = map(tl.constexpr, (places.PREVIOUS, places.BIAS_CORRECTION, places.SHARE))
_COUNT, _AVERAGE = map(tl.constexpr, (places.COUNT, places.AVERAGE))


class Squares(NamedTuple):
    """Squared norms of every column (left) or row (right), float64: |G_j|^2, |N_j|^2, |R_j|^2."""

    grad: View
    direction: View
    low_rank: View


class Memory(NamedTuple):
    """What a matrix keeps from step to step beside basis and moments, as `MatrixState` has it."""

    step: View
    residual_norm: View | None
    residual_avg_sq: View | None


class Measuring(NamedTuple):
    """Settings of `_measure` and of the kernels of `ds_fira.core.kernels.sharing`."""

    betas: tuple[Pair, Pair]
    cross: Pair  # 2a - a^2, by which |phi * R|^2 goes off
    floor: Pair  # tau of a normalized residual
    residual_beta: Pair
    elements: Pair  # of size 1 in a normalized S for one factor
    warmup: Pair  # steps

    @classmethod
    def of(cls, shape: tuple[int, int], rank: int, settings: GroupSettings, side: Side) -> Measuring:
        """Of matrices of shape (m, n)."""
        return cls(
            betas=(pair(settings.betas[0]), pair(settings.betas[1])),
            cross=pair(2.0 * settings.inner_alpha - settings.inner_alpha**2),
            floor=pair(residual_floor(settings)),
            residual_beta=pair(settings.residual_beta),
            elements=pair(elements_of(shape, rank, side, settings)),
            warmup=pair(settings.residual_warmup),
        )


def launch_measure(
    squares: Squares,
    phi: View,
    numbers: View,
    grad_finite: Finite,
    memory: Memory,
    sizes: tuple[int, int, int, int],
    settings: GroupSettings,
    *,
    side: Side,
    given: bool,
) -> None:
    """Lines 12 and 13: phi and |S|^2 of each matrix, by one program, and p of a normalized residual.

    What is one number of a matrix is only read of its memory. The warps of a program read it each for themselves, and
    one that wrote would be ahead of others; so `launch_combine` writes it.

    Args:
        squares: of each column or row.
        phi: factors before the limiter, float64; written, one for each column or row or one for all.
        numbers: written, see `ds_fira.core.kernels.numbers`.
        grad_finite: by the sums of strips.
        memory: of each column or row p changes where the gradient is finite.
        sizes: k, m, n, r.
        settings: of the param group.
        side: the projected side.
        given: whether step count and bias correction are those of this step already.
    """
    count, m, n, rank = sizes
    lines, form = n if side == "left" else m, settings.residual_form
    block = tile(lines, BLOCK)
    launch(
        _measure,
        (count,),
        phi.data,
        squares,
        phi,
        numbers,
        grad_finite,
        memory,
        lines,
        Measuring.of((m, n), rank, settings, side),
        FORM=form.kernel,
        SCALING=settings.scaling,
        ONE=settings.has_one_factor,
        CORRECTED=settings.formulation == "paper",
        AVERAGED=memory.residual_avg_sq is not None,
        MEASURES=settings.measures_residual,
        LIMITED=settings.has_limiter,
        WARMING=settings.residual_warmup > 0,
        GIVEN=given,
        BLOCK=block,
        # No more threads than columns or rows: an entry of p is read and written by one.
        num_warps=max(1, min(8, block // 32)),
    )


@triton.jit
def power(base, exponent):
    """A float64 to the power of an int64 of at least 0."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def note_step(
    numbers_at,
    memory,
    matrix,
    count,
    settings,
    LIMITED: tl.constexpr,
    WARMING: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Write down what a step goes by besides its gradient; gives its count, 1 at least, and the bias correction."""
    tl.store(numbers_at + _COUNT, count.to(tl.float64))
    # Before the first finite gradient nothing asks for it, but it would be 0 / 0.
    count = tl.maximum(count, 1)
    if GIVEN:
        bias = tl.load(numbers_at + _BIAS)
    else:
        bias = tl.sqrt(1.0 - power(double(settings.betas[1]), count)) / (1.0 - power(double(settings.betas[0]), count))
        tl.store(numbers_at + _BIAS, bias)
    if WARMING:
        tl.store(numbers_at + _SHARE, tl.minimum(count.to(tl.float64) / double(settings.warmup), 1.0))
    if LIMITED:
        tl.store(numbers_at + _PREVIOUS, tl.load(origin(memory.residual_norm, matrix)).to(tl.float64))
    return count, bias


@triton.jit
def _squares_of(squares, matrix, line, kept, settings, FORM: tl.constexpr):
    """What phi is made of, of some lines: |N|^2 and |R|^2, or twice q; then |G|^2 and |R|^2."""
    grad_sq = tl.load(origin(squares.grad, matrix) + line, mask=kept, other=0.0)
    low_rank_sq = tl.load(origin(squares.low_rank, matrix) + line, mask=kept, other=0.0)
    if FORM == "normalized":
        first = tl.maximum(grad_sq - low_rank_sq, double(settings.floor) * grad_sq)
        second = first
    else:
        first = tl.load(origin(squares.direction, matrix) + line, mask=kept, other=0.0)
        second = low_rank_sq
    return first, second, grad_sq, low_rank_sq


@triton.jit
def _factor(
    first,
    second,
    average_at,
    kept,
    count,
    bias,
    settings,
    FORM: tl.constexpr,
    SCALING: tl.constexpr,
    CORRECTED: tl.constexpr,
    AVERAGED: tl.constexpr,
):
    """Phi from the squares of one line, or of their sums; and p afterwards."""
    if FORM == "normalized":
        share = first * 0.0 + 1.0
        average = first.to(tl.float32)
        if AVERAGED:
            beta = double(settings.residual_beta)
            share = share - power(beta, count)
            before = tl.load(average_at, mask=kept, other=-1.0).to(tl.float64)
            average = tl.where(before < 0.0, share * first, beta * before + (1.0 - beta) * first).to(tl.float32)
        # As it is stored: what underflows there is 0, so that phi stays in the range of a float32.
        divisor = tl.where(average > 0.0, average, 1.0).to(tl.float64)
        phi = tl.where(average > 0.0, tl.sqrt(double(settings.elements) * share / divisor), 0.0)
    elif SCALING == "none":
        average = first
        phi = first * 0.0 + 1.0
    else:
        average = first
        phi = tl.sqrt(first) / (tl.sqrt(second) + _NORM_EPS)
        if CORRECTED:
            phi = phi * bias
    return phi, average


@triton.jit
def _measure(
    squares,
    phi,
    numbers,
    grad_finite,
    memory,
    lines,
    settings,
    FORM: tl.constexpr,
    SCALING: tl.constexpr,
    ONE: tl.constexpr,
    CORRECTED: tl.constexpr,
    AVERAGED: tl.constexpr,
    MEASURES: tl.constexpr,
    LIMITED: tl.constexpr,
    WARMING: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(0).to(tl.int64)
    finite = is_finite(grad_finite, matrix)
    numbers_at = origin(numbers, matrix)
    step_at = origin(memory.step, matrix)
    count = tl.load(step_at)
    if not GIVEN:
        count += finite
    count, bias = note_step(numbers_at, memory, matrix, count, settings, LIMITED, WARMING, GIVEN)

    offsets = tl.arange(0, BLOCK)
    # Nothing is read of a gradient that is not finite; its sums are zero.
    end = lines * finite
    phi_at = origin(phi, matrix)
    average_at = phi_at
    if AVERAGED:
        average_at = origin(memory.residual_avg_sq, matrix)
    factor = bias * 0.0
    if ONE:
        first_sum = tl.zeros((BLOCK,), dtype=tl.float64)
        second_sum = tl.zeros((BLOCK,), dtype=tl.float64)
        for start in range(0, end, BLOCK):
            line = start + offsets
            first, second, _, _ = _squares_of(squares, matrix, line, line < end, settings, FORM)
            first_sum += first
            second_sum += second
        first = tl.sum(first_sum, axis=0)
        second = tl.sum(second_sum, axis=0)
        factor, average = _factor(
            first, second, average_at, end > 0, count, bias, settings, FORM, SCALING, CORRECTED, AVERAGED
        )
        tl.store(phi_at, factor)
        if AVERAGED:
            tl.store(numbers_at + _AVERAGE, average.to(tl.float64))
    low_rank_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    scaled_grad_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    scaled_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, end, BLOCK):
        line = start + offsets
        kept = line < end
        upper, lower, grad_sq, low_rank_sq = _squares_of(squares, matrix, line, kept, settings, FORM)
        low_rank_sum += low_rank_sq
        if FORM != "none":
            if ONE:
                own = factor
            else:
                own, averages = _factor(
                    upper, lower, average_at + line, kept, count, bias, settings, FORM, SCALING, CORRECTED, AVERAGED
                )
                tl.store(phi_at + line, own, mask=kept)
                if AVERAGED:
                    tl.store(average_at + line, averages, mask=kept)
            scaled_grad_sum += own * own * grad_sq
            scaled_sum += own * own * lower
    scaled_grad_sq = tl.sum(scaled_grad_sum, axis=0)
    difference = tl.sum(scaled_sum, axis=0)
    if FORM == "scaled":
        difference = scaled_grad_sq - double(settings.cross) * difference
    tl.store(numbers_at + _GRAD_SQ, sum_of_strips(grad_finite.strip_sq, grad_finite.strips, matrix))
    tl.store(numbers_at + _LOW_RANK_SQ, tl.sum(low_rank_sum, axis=0))
    tl.store(numbers_at + _DIFFERENCE, difference)
    tl.store(numbers_at + _SCALED_GRAD_SQ, scaled_grad_sq)
    tl.store(numbers_at + _FINITE, finite.to(tl.float64))
    if MEASURES:
        needed = (finite != 0) & (difference < scaled_grad_sq * _EXACT_SHARE)
        tl.store(numbers_at + _NEEDED, needed.to(tl.float64))
