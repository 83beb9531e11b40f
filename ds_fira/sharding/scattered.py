"""Flat tensors without memory of their own, whose elements lie in other tensors one after the other.

Under FSDP2 every parameter has its own memory. Matrices that are stepped together are planned as parts of one flat
tensor; where the step looks at them one by one, it finds them here, and nothing is copied.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_PARTS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def scatter(flat: Tensor, parts: Sequence[Tensor]) -> None:
    """Say where the elements of a flat tensor lie.

    Args:
        flat: without memory.
        parts: 1-D, contiguous, of its dtype, in its order.
    """
    starts = list(accumulate((part.numel() for part in parts), initial=0))[:-1]
    _PARTS[flat] = starts, list(parts)


def forget(flat: Tensor) -> None:
    """Let the parts go."""
    _PARTS.pop(flat, None)


def place_of(flat: Tensor, offset: int) -> tuple[Tensor, int]:
    """The tensor in which an element of a flat tensor lies, and its offset there; the flat tensor, if it has memory."""
    found = _PARTS.get(flat)
    if found is None:
        return flat, offset
    starts, parts = found
    # Of parts that begin at one element all but the last are empty.
    number = bisect_right(starts, offset) - 1
    return parts[number], offset - starts[number]
