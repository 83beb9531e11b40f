"""The numbers of a matrix that one kernel of a step leaves to the next, float64, and what metrics add up of them."""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.tiles import launch
from ds_fira.core.kernels.views import View, origin

# Their places, in every matrix's row of so many.
NUMBERS = 16
GRAD_SQ = 0  # |G|^2
LOW_RANK_SQ = 1  # |R|^2
DIFFERENCE = 2  # |S|^2 before the limiter, as a difference of squares
SCALED_GRAD_SQ = 3  # |phi * G|^2
FINITE = 4  # 1 where the gradient is finite, else 0
NEEDED = 5  # 1 where |S|^2 has to be summed from the residual itself, else 0
PREVIOUS = 6  # |S| of the step before
BIAS_CORRECTION = 7  # Adam's, or a rule's factor of the step size
SHARE = 8  # of its size that the residual has in a warm-up
RESIDUAL_SQ = 9  # |S|^2 before the limiter, however it was found
DIVISOR = 10  # the limiter's; 1 without one
COUNT = 11  # steps made, this one too
AVERAGE = 12  # p of a normalized residual with one factor
DECAY = 13  # the share of a weight that weight decay leaves

# The same inside a kernel.
_GRAD_SQ, _LOW_RANK_SQ, _FINITE = (tl.constexpr(place) for place in (GRAD_SQ, LOW_RANK_SQ, FINITE))
_RESIDUAL_SQ, _DIVISOR = (tl.constexpr(place) for place in (RESIDUAL_SQ, DIVISOR))


# A float64 as a kernel takes it, whose arguments are float32: the nearest one, and what is left; 48 bits together.
Pair = tuple[float, float]


def pair(value: float) -> Pair:
    """A number cut in two for a kernel, which puts it together by `double`."""
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


@triton.jit
def double(two):
    """The float64 that `pair` has cut."""
    # The interpreter leaves them the numbers of Python that they were.
    return tl.full((), 0.0, dtype=tl.float64) + two[0] + two[1]


def launch_tally(sums: Tensor, numbers: View, count: int, residual_scale: float) -> None:
    """Add a step of k matrices to what metrics keep, in one fixed order.

    Args:
        sums: float64, (4,): matrix steps, captured energy, steps with a residual that was shrunk, squares of residuals.
        numbers: of the k matrices.
        count: k.
        residual_scale: multiplies S in the update.
    """
    width = triton.next_power_of_2(count)
    launch(_tally, (1,), sums, sums, numbers, count, pair(residual_scale), COUNT=width, num_warps=1)


@triton.jit
def _tally(sums, numbers, count, residual_scale, COUNT: tl.constexpr):
    matrix = tl.arange(0, COUNT)
    inside = matrix < count
    at = origin(numbers, matrix.to(tl.int64))
    grad_sq = tl.load(at + _GRAD_SQ, mask=inside, other=0.0)
    counted = inside & (tl.load(at + _FINITE, mask=inside, other=0.0) != 0.0) & (grad_sq > 0.0)
    energy = tl.load(at + _LOW_RANK_SQ, mask=counted, other=0.0) / tl.where(counted, grad_sq, 1.0)
    divisor = tl.load(at + _DIVISOR, mask=counted, other=1.0)
    factor = double(residual_scale) / divisor
    residual = tl.maximum(tl.load(at + _RESIDUAL_SQ, mask=counted, other=0.0), 0.0) * factor * factor
    _add(sums, counted.to(tl.float64))
    _add(sums + 1, energy)
    _add(sums + 2, (counted & (divisor > 1.0)).to(tl.float64))
    _add(sums + 3, residual)


@triton.jit
def _add(at, values):
    tl.store(at, tl.load(at) + tl.sum(values, axis=0))
