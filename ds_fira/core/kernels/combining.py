"""Lines 14 and 15 of Algorithm 1 in one kernel: the limiter and C, as `limit` and `combine` of `ds_fira.core.step`."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ds_fira.core import functional as F
from ds_fira.core.kernels import numbers as places
from ds_fira.core.kernels.measuring import Memory
from ds_fira.core.kernels.moments import LEFT_TILE, RIGHT_TILE
from ds_fira.core.kernels.numbers import Pair, double, pair
from ds_fira.core.kernels.rates import Rate, learning_rate, rate_of
from ds_fira.core.kernels.tiles import launch, rounded, tile
from ds_fira.core.kernels.views import View, origin
from ds_fira.core.settings import GroupSettings
from ds_fira.core.subspace import Side

# Sums of the exact residual that are added up at once.
_PARTS = tl.constexpr(128)
_NORM_EPS = tl.constexpr(F.NORM_EPS)
_DIFFERENCE, _SCALED_GRAD_SQ = map(tl.constexpr, (places.DIFFERENCE, places.SCALED_GRAD_SQ))
_FINITE, _NEEDED, _PREVIOUS = map(tl.constexpr, (places.FINITE, places.NEEDED, places.PREVIOUS))
_BIAS, _SHARE = map(tl.constexpr, (places.BIAS_CORRECTION, places.SHARE))
_DECAY = tl.constexpr(places.DECAY)
_RESIDUAL_SQ, _DIVISOR = map(tl.constexpr, (places.RESIDUAL_SQ, places.DIVISOR))
_COUNT, _AVERAGE = map(tl.constexpr, (places.COUNT, places.AVERAGE))


class Combining(NamedTuple):
    """Numbers of the param group."""

    lr: Rate
    weight_decay: Pair
    outer_alpha: Pair  # of the whole update
    inner_alpha: Pair
    residual_factor: Pair
    gamma: Pair
    negligible_ratio: Pair


def launch_combine(
    low_rank: View,
    direction: View,
    low_rank_update: View,
    phi: View,
    scales: View,
    numbers: View,
    partial: View,
    memory: Memory,
    sizes: tuple[int, int, int, int],
    settings: GroupSettings,
    *,
    side: Side,
    negligible_ratio: float,
) -> None:
    """The limiter, its |S| to remember, and the factors of lr (P N + S) = phi * G + P C, decay folded in.

    Args:
        low_rank: R, float32.
        direction: N, float32.
        low_rank_update: C, float32 or rounded to bfloat16; may be where N is.
        phi: factors before the limiter, float64.
        scales: float32; phi as `launch_update` takes it.
        numbers: see `ds_fira.core.kernels.numbers`; |S|^2, the divisor and the share that decay leaves are written.
        partial: |S|^2 from the residual itself as sums of so many programs as `rows` says, float64.
        memory: where the gradient is finite, the step count, |S| to remember and p with one factor change.
        sizes: k, r, the columns (left) or rows (right) of G, and how many sums `partial` has.
        settings: of the param group.
        side: the projected side.
        negligible_ratio: a residual norm below this share of |phi * G| is rounding.
    """
    count, rank, lines, parts = sizes
    most = LEFT_TILE if side == "left" else RIGHT_TILE
    shape = (tile(lines, most[0]), tile(rank, most[1]))
    combining = Combining(
        lr=rate_of(settings),
        weight_decay=pair(settings.weight_decay),
        outer_alpha=pair(settings.alpha if settings.alpha_is_outside else 1.0),
        inner_alpha=pair(settings.inner_alpha),
        residual_factor=pair(settings.residual_factor),
        gamma=pair(settings.gamma),
        negligible_ratio=pair(negligible_ratio),
    )
    rows, columns = (1, lines) if side == "left" else (rank, 1)
    launch(
        _combine,
        (triton.cdiv(lines, shape[0]), count),
        low_rank.data,
        low_rank._replace(rows=rows, columns=columns),
        direction,
        low_rank_update,
        phi,
        scales,
        numbers,
        partial,
        memory,
        lines,
        rank,
        parts,
        combining,
        FULL_RANK=settings.residual_form.factors is not None,
        ONE=settings.has_one_factor,
        AVERAGED=memory.residual_avg_sq is not None and settings.has_one_factor,
        MEASURES=settings.measures_residual,
        WARMING=settings.residual_warmup > 0,
        OUTSIDE=settings.alpha_is_outside,
        LINES=shape[0],
        ENTRIES=shape[1],
        num_warps=4,
    )


@triton.jit
def _combine(
    low_rank,
    direction,
    low_rank_update,
    phi,
    scales,
    numbers,
    partial,
    memory,
    lines,
    rank,
    parts,
    settings,
    FULL_RANK: tl.constexpr,
    ONE: tl.constexpr,
    AVERAGED: tl.constexpr,
    MEASURES: tl.constexpr,
    WARMING: tl.constexpr,
    OUTSIDE: tl.constexpr,
    LINES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    numbers_at = origin(numbers, matrix)
    if tl.load(numbers_at + _FINITE) == 0.0:
        return
    # Every program finds the same few numbers by itself.
    residual_sq = tl.load(numbers_at + _DIFFERENCE)
    if MEASURES:
        needed = tl.load(numbers_at + _NEEDED) != 0.0
        offsets = tl.arange(0, _PARTS)
        total = tl.zeros((_PARTS,), dtype=tl.float64)
        for start in range(0, parts * needed.to(tl.int32), _PARTS):
            total += tl.load(origin(partial, matrix) + start + offsets, mask=offsets < parts - start, other=0.0)
        residual_sq = tl.where(needed, tl.sum(total, axis=0), residual_sq)
    divisor = residual_sq * 0.0 + 1.0
    remembered = divisor
    if memory.residual_norm is not None:
        previous = tl.load(numbers_at + _PREVIOUS)
        norm = tl.sqrt(tl.maximum(residual_sq, 0.0))
        ratio = double(settings.negligible_ratio)
        counts = norm > ratio * tl.sqrt(tl.load(numbers_at + _SCALED_GRAD_SQ))
        gamma = double(settings.gamma)
        growth = tl.maximum(norm / (previous + _NORM_EPS), gamma) / gamma
        divisor = tl.where(counts & (previous != 0.0), growth, divisor)
        remembered = tl.where(counts, norm / divisor, 0.0)
    lr = learning_rate(settings.lr)
    decay = 1.0 - lr * double(settings.weight_decay)
    # What they were found from is not read again.
    if tl.program_id(0) == 0:
        tl.store(numbers_at + _RESIDUAL_SQ, residual_sq)
        tl.store(numbers_at + _DIVISOR, divisor)
        tl.store(numbers_at + _DECAY, decay)
        tl.store(origin(memory.step, matrix), tl.load(numbers_at + _COUNT).to(tl.int64))
        if memory.residual_norm is not None:
            norm_at = origin(memory.residual_norm, matrix)
            tl.store(norm_at, remembered.to(norm_at.dtype.element_ty))
        if AVERAGED:
            tl.store(origin(memory.residual_avg_sq, matrix), tl.load(numbers_at + _AVERAGE).to(tl.float32))

    bias = tl.load(numbers_at + _BIAS)
    inner_alpha = double(settings.inner_alpha)
    step_size = lr * decay * double(settings.outer_alpha)
    if OUTSIDE:
        factor = step_size * bias
    else:
        step_size = step_size * bias
        factor = step_size * inner_alpha
    residual_factor = double(settings.residual_factor) * step_size / divisor
    if WARMING:
        residual_factor = residual_factor * tl.load(numbers_at + _SHARE)

    line = tl.program_id(0) * LINES
    line_offsets = tl.arange(0, LINES)
    entry_offsets = tl.arange(0, ENTRIES)
    line_inside = line + line_offsets < lines
    scale = tl.zeros((LINES,), dtype=tl.float32)
    if FULL_RANK:
        if ONE:
            one = (tl.load(origin(phi, matrix)) * residual_factor).to(tl.float32)
            scale += one
            if tl.program_id(0) == 0:
                tl.store(origin(scales, matrix), one)
        else:
            factors = tl.load(origin(phi, matrix) + line + line_offsets, mask=line_inside, other=0.0)
            scale = (factors * residual_factor).to(tl.float32)
            tl.store(origin(scales, matrix) + line + line_offsets, scale, mask=line_inside)
    # All three are stored alike.
    at = line_offsets[:, None] * low_rank.rows + entry_offsets[None, :] * low_rank.columns
    corner = line.to(tl.int64) * low_rank.rows
    low = origin(low_rank, matrix)
    normalized = origin(direction, matrix)
    out = origin(low_rank_update, matrix)
    for start in range(0, rank, ENTRIES):
        inside = line_inside[:, None] & (entry_offsets < rank - start)[None, :]
        value = tl.load(normalized + corner + at, mask=inside, other=0.0) * factor.to(tl.float32)
        if FULL_RANK:
            inner = inner_alpha.to(tl.float32) * scale[:, None]
            value -= inner * tl.load(low + corner + at, mask=inside, other=0.0)
        tl.store(out + corner + at, rounded(value, out.dtype.element_ty), mask=inside)
        corner += ENTRIES * low_rank.columns
