"""A random basis that nobody stores: every rank draws the rows of P that it works with, in every step anew.

APOLLO (arXiv 2412.05270, algorithm 1) projects with P whose entries are independent and normal, of variance 1 / r. Its
columns are not orthonormal: |R_j| is |G_j| on average, and no part of a gradient can be restored from R. Elements are a
function of the matrix's number in the model, of the step of its last refresh, and of their place in P. So ranks agree
on P without a word, a part of P equals that part of the whole to the bit, and a resumed run draws what it had.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fira.core.rounding import hash_, signed32

MASK = 2**64 - 1
# Elements drawn at once on a CPU: their words stay in cache. Parts begin at multiples of it, so that every element is
# computed by the same instructions, whatever rows are asked for.
AT_ONCE = 2**14


class DrawnBasis(NamedTuple):
    """Which basis it is, but for the refresh.

    Attributes:
        number: of the matrix in the model.
        rows: of P: m on the left, n on the right.
        rank: r.
    """

    number: int
    rows: int
    rank: int

    def draw(self, refresh_step: int, rows: range | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """P, or some rows of it, (rows, r), contiguous.

        Args:
            refresh_step: the step of the last refresh.
            rows: half-open; None for all.
            dtype: of the result; the values are those of float32.
            device: where to draw.
        """
        rows = range(self.rows) if rows is None else rows
        if not rows:
            return torch.empty(0, self.rank, dtype=dtype, device=device)
        first, last, total = rows.start * self.rank, rows.stop * self.rank, self.rows * self.rank
        at_once = AT_ONCE if device.type == "cpu" else max(total, 1)
        start = first // at_once * at_once
        words = _seed(self.number, refresh_step)
        drawn = torch.empty(min(total, -(-last // at_once) * at_once) - start, device=device)
        for part, place in zip(drawn.split(at_once), range(start, last, at_once), strict=True):
            part.copy_(_normals(place, len(part), words, device))
        drawn = drawn[first - start : last - start].mul_(math.sqrt(2.0 / self.rank))
        return drawn.to(dtype).view(len(rows), self.rank)


def _seed(number: int, refresh_step: int) -> tuple[int, int]:
    """Two words of 32 bits; the finisher of splitmix64 (Steele, Lea, Flood 2014) spreads what is nearly equal."""
    value = ((number + 1) * 0x9E3779B97F4A7C15 + (refresh_step + 1) * 0xD1342543DE82EF95) & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        value = ((value ^ (value >> shift)) * factor) & MASK
    return signed32(value >> 32), signed32(value)


def _normals(start: int, count: int, seed: tuple[int, int], device: torch.device) -> Tensor:
    """Numbers at places start to start + count of a seed's sequence, (count,), float32: normal, of variance 1 / 2.

    The words are counters, hashed twice with another half of the seed each, so that two seeds do not shift one
    sequence. Of each word 24 bits are a uniform number in (-1, 1), of which the inverse error function makes a normal.
    """
    counter = torch.arange(count, dtype=torch.int32, device=device).add_(signed32(start + seed[0]))
    words = hash_(hash_(counter).bitwise_xor_(seed[1])).bitwise_right_shift_(8)
    return words.to(torch.float32).add_(0.5).mul_(2.0**-23).erfinv_()
