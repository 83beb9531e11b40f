"""Whether the gradient of a matrix is finite: the device decides, from |G|^2 or from what the caller knows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ds_fira.core.kernels.views import View, origin

# Sums of squares that are added up at once.
_STRIPS = tl.constexpr(128)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


class Finite(NamedTuple):
    """How a kernel knows whether the gradient of a matrix is finite: by a number, or by |G|^2.

    Attributes:
        flag: zero where it is not; None to go by the sums.
        strip_sq: sums of |G_j|^2 over strips, float64; None to go by the flag.
        strips: how many there are.
    """

    flag: View | None
    strip_sq: View | None = None
    strips: int = 0


@triton.jit
def sum_of_strips(strip_sq, strips, matrix):
    """|G|^2 of a matrix, float64."""
    at = origin(strip_sq, matrix)
    offsets = tl.arange(0, _STRIPS)
    total = tl.zeros((_STRIPS,), dtype=tl.float64)
    for start in range(0, strips, _STRIPS):
        total += tl.load(at + start + offsets, mask=offsets < strips - start, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def is_finite(grad_finite, matrix):
    """Whether the gradient of a matrix is finite, 0 or 1."""
    if grad_finite.strip_sq is None:
        found = (tl.load(origin(grad_finite.flag, matrix)) != 0).to(tl.int32)
    else:
        found = (sum_of_strips(grad_finite.strip_sq, grad_finite.strips, matrix) < _LARGEST).to(tl.int32)
    return found
