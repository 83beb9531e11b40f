"""Numbers of one matrix: plain on a CPU, where that is quickest, and tensors where the device decides.

The formulas of `ds_fira.core.functional` take either, so that each is written once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A number of one matrix: plain, or a 0-dim tensor; of a batch of k matrices a tensor (k,).
Scalar = Tensor | float
# Of the dtypes in which a step is computed; looked up for every matrix.
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


def scalar(value: Tensor, host: bool) -> Scalar:
    """A number of each matrix in float64: for one matrix on the host, else a tensor on its device."""
    return float(value) if host else value.double()


def scalars(values: Tensor, host: bool) -> Sequence[Scalar]:
    """Several numbers of each matrix, float64, along the first dimension: read at once on the host."""
    return values.tolist() if host else values.unbind(0)


def weighted_sums(values: Sequence[Tensor], weights: Tensor, host: bool) -> Sequence[Scalar]:
    """The sums of numbers of each entry, (..., n), each times its weight, (..., n) or (..., 1) for all; float64."""
    if host and weights.shape == values[0].shape:
        return [torch.dot(value, weights).item() for value in values]
    return scalars((torch.stack(tuple(values)) * weights).sum(-1), host)


def is_finite(sum_of_squares: Scalar, dtype: torch.dtype) -> Tensor | bool:
    """Whether a sum of squares is finite in `dtype`, and with it every element that went into it."""
    return sum_of_squares < LARGEST[dtype]


def where(condition: Tensor | bool, first: Scalar, second: Scalar) -> Scalar:
    """`first` where the condition holds, else `second`."""
    if isinstance(condition, Tensor):
        return torch.where(condition, first, second)
    return first if condition else second


def over_entries(value: Scalar) -> Scalar:
    """A number of each matrix, shaped to go with one number per column or row."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


def over_matrix(value: Scalar, dtype: torch.dtype) -> Scalar:
    """A number of each matrix, shaped to go with its elements."""
    return value[..., None, None].to(dtype) if isinstance(value, Tensor) else value


def store_scalar_(target: Tensor, value: Scalar, stored: Tensor | bool) -> None:
    """Write a number of each matrix into the state where `stored` holds."""
    if isinstance(stored, Tensor):
        target.copy_(torch.where(stored, value, target))
    elif stored:
        target.copy_(value) if isinstance(value, Tensor) else target.fill_(value)


def sqrt(value: Scalar) -> Scalar:
    """Its square root."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def at_least(value: Scalar, least: float) -> Scalar:
    """The larger of the two."""
    return value.clamp(min=least) if isinstance(value, Tensor) else max(value, least)
