"""The learning rate as a kernel takes it, a number or where one lies, and the sizes of a step of AdamW from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.measuring import power
from ds_fira.core.kernels.numbers import double, pair
from ds_fira.core.kernels.tiles import launch
from ds_fira.core.kernels.views import origin, origins
from ds_fira.core.settings import GroupSettings

# A float64 as a kernel takes it, to the last bit.
Exact = tuple[float, float, float]


class Rate(NamedTuple):
    """A learning rate.

    Attributes:
        value: it, where it is an argument.
        at: where it lies on the device, in any floating dtype; None for an argument.
    """

    value: Exact
    at: Tensor | None = None


class Sizes(NamedTuple):
    """What sizes a step of AdamW beside the learning rate."""

    betas: tuple[Exact, Exact]
    weight_decay: Exact
    alpha: Exact


def exact(value: float) -> Exact:
    """A number cut in three for a kernel, which puts it together by `joined`: `pair` keeps 48 bits of 53."""
    high, rest = pair(value)
    middle, low = pair(rest)
    return high, middle, low


def rate(lr: float, lr_tensor: Tensor | None = None) -> Rate:
    """A learning rate from where it lies, else from its value."""
    return Rate(exact(lr)) if lr_tensor is None else Rate(exact(0.0), lr_tensor)


def rate_of(settings: GroupSettings) -> Rate:
    """The learning rate of a param group."""
    return rate(settings.lr, settings.lr_tensor)


@triton.jit
def joined(three):
    """The float64 that `exact` has cut."""
    return double(three) + three[2]


@triton.jit
def learning_rate(given):
    """The learning rate, float64."""
    return joined(given.value) if given.at is None else tl.load(given.at).to(tl.float64)


def adamw_sizes(
    step: int, lr: float, betas: tuple[float, float], weight_decay: float, alpha: float
) -> tuple[float, float]:
    """The size of a step of AdamW and the share of a weight that decay leaves, as `_adamw_sizes` computes them.

    Args:
        step: this step's count, from 1.
        lr: learning rate.
        betas: decay rates of the moments.
        weight_decay: decoupled, times lr.
        alpha: multiplies the step, not the decay.
    """
    factor = math.sqrt(1.0 - _power(betas[1], step)) / (1.0 - _power(betas[0], step))
    return lr * alpha * factor, 1.0 - lr * weight_decay


def _power(base: float, exponent: int) -> float:
    """`power` of a kernel on the host, rounded alike."""
    result = 1.0
    while exponent > 0:
        result = result * base if exponent % 2 == 1 else result
        base, exponent = base * base, exponent // 2
    return result


def launch_adamw_sizes(
    steps: Sequence[Tensor], given: Rate, betas: tuple[float, float], weight_decay: float, alpha: float
) -> Tensor:
    """`adamw_sizes` on the device, where the steps are counted first.

    Args:
        steps: of k tensors, those made before this one, int64, 0-dim; they count this one afterwards.
        given: learning rate.
        betas: as in `adamw_sizes`.
        weight_decay: likewise.
        alpha: likewise.

    Returns:
        Size, share, and the count of every tensor, float64, (k, 3).
    """
    sizes = torch.empty(len(steps), 3, dtype=torch.float64, device=steps[0].device)
    settings = Sizes((exact(betas[0]), exact(betas[1])), exact(weight_decay), exact(alpha))
    # One warp: its threads all read the count before one of them writes it.
    (counts,) = origins([[(step, 0) for step in steps]])
    launch(_adamw_sizes, (len(steps),), sizes, sizes, counts, given, settings, num_warps=1)
    return sizes


@triton.jit
def _adamw_sizes(sizes, counts, given, settings):
    place = tl.program_id(0).to(tl.int64)
    step = origin(counts, place)
    sizes += 3 * place
    count = tl.load(step) + 1
    lr = learning_rate(given)
    upper = tl.sqrt(1.0 - power(joined(settings.betas[1]), count))
    factor = upper / (1.0 - power(joined(settings.betas[0]), count))
    tl.store(sizes, lr * joined(settings.alpha) * factor)
    tl.store(sizes + 1, 1.0 - lr * joined(settings.weight_decay))
    tl.store(sizes + 2, count.to(tl.float64))
    tl.store(step, count)
