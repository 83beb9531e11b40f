"""Stochastic rounding: float32 to bfloat16, up or down by chance, so that sums of small steps arrive on average.

The noise is a function of a seed and of an element's place. So a run that is repeated repeats it, processes agree on
it, and what is rounded in parts is the same as what is rounded whole. Moments take seeds from 0 on, weights negative
ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
# The increment of Weyl's sequence, 2^32 / golden ratio.
SEED_STRIDE = 0x9E3779B9
# Weights rounded at once, an even number: their noise stays in cache.
AT_ONCE = 2**14


def rounded(values: Tensor, noise: Tensor | None) -> Tensor:
    """Float32 as bfloat16 can hold it: add noise to the 16 bits that go, then cut them off; the largest stay finite.

    Args:
        values: float32.
        noise: one for each; None leaves the rounding to a cast to the nearest.
    """
    values = values.clamp(-BFLOAT16_MAX, BFLOAT16_MAX)
    if noise is not None:
        values.view(torch.int32).add_(noise).add_(2**15).bitwise_and_(-(2**16))
    return values


def store_weight_(weight: Tensor, value: Tensor, seed: int | Tensor | None, start: int = 0) -> None:
    """Write the weights that a step has computed: rounded to the nearest, or bfloat16 stochastically by a seed.

    Args:
        weight: any shape and strides; changed.
        value: of its shape, contiguous; used up.
        seed: of the noise, of this step alone: an int, or an int64 tensor of 0 dimensions; None for the nearest.
        start: the place of the first element in the matrix, in row-major order.
    """
    if seed is not None and weight.dtype == torch.bfloat16:
        flat = value.view(-1)
        for first in range(0, flat.numel(), AT_ONCE):
            chunk = flat[first : first + AT_ONCE]
            # Two elements share a word of noise, so it begins at an even place.
            odd = (start + first) % 2
            noise = noise_of(chunk.numel() + odd, start + first - odd, seed, chunk.device)[odd:]
            chunk.copy_(rounded(chunk, noise))
    weight.copy_(value)


def noise_of(count: int, start: int, seed: int | Tensor, device: torch.device) -> Tensor:
    """Noise for elements start, an even number, to start + count: uniform over int16, (count,).

    A counter is hashed, one 32-bit word for two elements. Seeds move the counter far apart.
    """
    counter = torch.arange((count + 1) // 2, dtype=torch.int32, device=device)
    if isinstance(seed, Tensor):
        counter += (seed.to(device) * SEED_STRIDE + start // 2).to(torch.int32)
    else:
        counter += signed32(seed * SEED_STRIDE + start // 2)
    hash_(counter)
    return counter.view(torch.int16)[:count]


def hash_(words: Tensor) -> Tensor:
    """Hash 32-bit words in place: lowbias32 of Chris Wellons' hash prospector (github.com/skeeto/hash-prospector).

    Args:
        words: int32, changed, and returned; different words stay different.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        # The shift of a signed integer copies the sign bit; the mask takes the copies away.
        words ^= (words >> shift).bitwise_and_(2 ** (32 - shift) - 1)
        if factor is not None:
            words *= signed32(factor)
    return words


def signed32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31
