"""The shape of a parameter whether or not ZeRO-3 has taken its data away.

Written against DeepSpeed 0.19.8, where a parameter that ZeRO-3 manages (by `deepspeed.zero.Init`, or once the engine is
built) has an empty tensor between uses, and says what it stands for in `ds_shape` and `ds_numel`.
"""

from __future__ import annotations

import math

from torch import Tensor


def shape_of(param: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(getattr(param, "ds_shape", param.shape))


def numel_of(param: Tensor) -> int:
    """The elements of the whole parameter."""
    return math.prod(shape_of(param))
