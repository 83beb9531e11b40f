"""Moments as `ds_fira.core.quantization` stores them, read and written inside a kernel: the same codes and noise.

A kernel takes a moment as a `Moment`. In float32 or a half precision its elements are read and written one by one, in
bfloat16 rounded stochastically where there is a seed. In int8 they come in blocks of 256 consecutive elements, which
share a scale: a tile has one block in each of its lines.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core import quantization, rounding
from ds_fira.core.kernels.tiles import rounded
from ds_fira.core.kernels.views import View
from ds_fira.core.quantization import SCALE, VALUES, Stored

_MIN_SCALE = tl.constexpr(quantization.MIN_SCALE)
_BFLOAT16_MAX = tl.constexpr(rounding.BFLOAT16_MAX)
_SIGNED_ZERO = tl.constexpr(quantization.SIGNED_ZERO)
_SEED_STRIDE = tl.constexpr(rounding.SEED_STRIDE)
# What brings noise of 16 bits into the range of a share.
_NOISE_UNIT = tl.constexpr(2.0**-16 * (1.0 - 2.0 * quantization.SNAP))


class Moment(NamedTuple):
    """A stored moment as a kernel takes it.

    Attributes:
        elements: in row-major order from where each matrix begins.
        scale: of int8, those of its blocks; else None.
        tables: of int8, the map; else None.
    """

    elements: View
    scale: View | None = None
    tables: quantization.Tables | None = None

    def form(self, noisy: bool) -> str:
        """How it is stored: "plain", "noisy" where bfloat16 is to be rounded stochastically, or "blocks"."""
        if self.tables is not None:
            return "blocks"
        return "noisy" if self.elements.data.dtype == torch.bfloat16 and noisy else "plain"


def moment(stored: Stored, views: list[View]) -> Moment:
    """The tensors of a stored moment with the views of them, in the order of `parts`."""
    values = stored[VALUES]
    if SCALE not in stored:
        return Moment(views[0])
    return Moment(*views, tables=quantization.tables_of(values))


def parts(stored: Stored) -> list[Tensor]:
    """The tensors of a stored moment: values, then scales."""
    return [stored[key] for key in (VALUES, SCALE) if key in stored]


@triton.jit
def noise_at(place, seed):
    """Noise of the elements at some places of a matrix, from -2^15 to 2^15 - 1, as `rounding.noise_of` has it."""
    bits = (seed * _SEED_STRIDE).to(tl.uint32) + (place // 2).to(tl.uint32)
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    half = tl.where(place % 2 == 0, bits << 16, bits).to(tl.int32, bitcast=True)
    return half >> 16


@triton.jit
def encoded(value, place, seed, dtype: tl.constexpr, NOISY: tl.constexpr):
    """Float32 values in the dtype of a moment: to the nearest, or bfloat16 stochastically."""
    if NOISY:
        bits = tl.clamp(value, -_BFLOAT16_MAX, _BFLOAT16_MAX).to(tl.int32, bitcast=True)
        bits = (bits + noise_at(place, seed) + 0x8000) & -0x10000
        value = bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        value = rounded(value, dtype)
    return value


@triton.jit
def store_rounded(at, value, place, seed, mask, NOISY: tl.constexpr):
    """Store float32 values as `encoded` makes them."""
    tl.store(at, encoded(value, place, seed, at.dtype.element_ty, NOISY), mask=mask)


@triton.jit
def load_blocks(values_at, scale_at, tables, inside, block_inside):
    """Decoded blocks, (blocks, 256) float32, zero outside.

    Args:
        values_at: pointers to the codes, (blocks, 256).
        scale_at: pointers to the scales, (blocks,).
        tables: of the map.
        inside: which codes there are.
        block_inside: which blocks.
    """
    codes = tl.load(values_at, mask=inside, other=0).to(tl.uint8, bitcast=True).to(tl.int32)
    scale = tl.load(scale_at, mask=block_inside, other=0.0)
    return tl.load(tables.stored_order + codes, mask=inside, other=0.0) * scale[:, None]


@triton.jit
def store_blocks(values_at, scale_at, tables, value, place, seed, inside, block_inside):
    """Encode blocks, (blocks, 256) float32, zero outside, as `quantization._encode_` does; see `load_blocks`."""
    low = tl.min(value, axis=1)
    high = tl.max(value, axis=1)
    largest = tl.where(high >= -low, high, low)
    scale = tl.where(tl.abs(largest) < _MIN_SCALE, _MIN_SCALE, largest)
    scaled = tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
    # The code of the largest point that is not above the element: by the element's leading bits, then one comparison.
    codes = tl.load(tables.by_bits + ((scaled.to(tl.int32, bitcast=True) >> 16) & 0xFFFF), mask=inside, other=0)
    codes += (scaled >= tl.load(tables.above + codes, mask=inside, other=0.0)).to(tl.int32)
    share = scaled - tl.load(tables.points + codes, mask=inside, other=0.0)
    share *= tl.load(tables.density + codes, mask=inside, other=0.0)
    codes += (share > noise_at(place, seed).to(tl.float32) * _NOISE_UNIT + 0.5).to(tl.int32)
    if values_at.dtype.element_ty == tl.int8:
        codes -= _SIGNED_ZERO
    else:
        # What is positive stays positive.
        codes = tl.maximum(codes, (value > 0.0).to(tl.int32))
    codes = tl.where(inside, codes, 0)
    tl.store(values_at, codes.to(values_at.dtype.element_ty), mask=inside)
    # A block of zeros, given or rounded to, has no scale: it is read as zeros, and written back as it is.
    any_code = tl.max((codes != 0).to(tl.int32), axis=1)
    tl.store(scale_at, tl.where(any_code != 0, scale, 0.0), mask=block_inside)
