"""Steps of parameters that are not projected: AdamW as the released code has it, on torch's fused kernel, or a rule."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ds_fira.core import functional as F
from ds_fira.core import kernels, quantization
from ds_fira.core.base_optimizer import advance, store
from ds_fira.core.quantization import Stored
from ds_fira.core.rounding import store_weight_
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import EXP_AVG, EXP_AVG_SQ

# Elements of a parameter stepped at once: they stay in cache between the finite test and the update.
ADAMW_BLOCK = 2**18
# The same where both moments have to be decoded first.
DECODED_BLOCK = 2**16
# torch's fused kernel rounds what is left over of its vectors (64 bytes) differently from the rest, so nothing is left.
FUSED_BYTES = 64


class Unprojected(NamedTuple):
    """A parameter that is not projected, of any shape and strides, in one step.

    Attributes:
        param: updated.
        grad: of the same shape.
        moments: its states by name, of its shape, as `ds_fira.core.quantization` stores them.
        step: this step's count, from 1, on the CPU; rounds bfloat16 and 8-bit moments too. Of a capturable group, which
            the kernels must take, the count before, on the device, where it is advanced.
        dtype: in which the step is computed.
        scale: multiplies its step; see `GroupSettings.unprojected_scale`.
    """

    param: Tensor
    grad: Tensor
    moments: dict[str, Stored]
    step: Tensor
    dtype: torch.dtype
    scale: float


def step_unprojected_(tensors: Sequence[Unprojected], settings: GroupSettings) -> None:
    """Step parameters that are not projected by AdamW or by the group's rule; those alike by one kernel on a GPU.

    Args:
        tensors: of one param group.
        settings: of the param group.
    """
    together: dict[Hashable, list[Unprojected]] = {}
    for each in tensors:
        if settings.rule is None and kernels.supports(each.param):
            dtypes = [part.dtype for stored in each.moments.values() for part in stored.values()]
            # Of a 0-dim tensor on the CPU its only element, without a call of torch's; those on a device are not read.
            count = None if settings.capturable else each.step.tolist()
            alike = (each.param.device, each.param.dtype, each.grad.dtype, *dtypes, each.scale, count)
            together.setdefault(alike, []).append(each)
        else:
            _step_alone_(each, settings)
    for (*_, scale, count), alike in together.items():
        arguments = _arguments([each.step for each in alike] if count is None else count, settings, scale)
        # A kernel reads every element once, and decodes and encodes what it reads.
        pairs = [
            tuple(tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in each[:2]) for each in alike
        ]
        moments = [(each.moments[EXP_AVG], each.moments[EXP_AVG_SQ]) for each in alike]
        kernels.adamw_together_(
            [(*pair, *stored) for pair, stored in zip(pairs, moments, strict=True)],
            **arguments,
            stochastic=settings.rounds_stochastically,
        )
        for each, (value, _) in zip(alike, pairs, strict=True):
            if value is not each.param:
                each.param.copy_(value)


def _arguments(step: int | Sequence[Tensor], settings: GroupSettings, scale: float) -> dict[str, object]:
    """What a step of AdamW takes beside parameters, gradients and moments."""
    lr = settings.lr_tensor if settings.capturable else settings.lr
    arguments = {"step": step, "lr": lr, "betas": settings.betas, "eps": settings.eps}
    return arguments | {"weight_decay": settings.weight_decay, "alpha": scale}


def _step_alone_(stepped: Unprojected, settings: GroupSettings) -> None:
    """Step one by torch's functions, in blocks that stay in cache."""
    param, grad, moments, step, dtype, scale = stepped
    rule = settings.rule
    compressed = any(stored[quantization.VALUES].dtype != dtype for stored in moments.values())
    # A rule whose elements see each other is given the parameter as it is; all else goes by blocks of elements.
    at_once, count = rule is not None and not rule.elementwise, int(step)
    arguments = _arguments(count, settings, scale)
    flat = param if at_once else param.reshape(-1)
    size = DECODED_BLOCK if compressed else ADAMW_BLOCK
    for start, weight, slope, stored in [(0, param, grad, moments)] if at_once else _blocks(flat, grad, moments, size):
        values = {name: quantization.read(moment, dtype) for name, moment in stored.items()}
        if rule is None:
            noise = settings.weight_seed(count), start
            adamw_(weight, slope, values[EXP_AVG], values[EXP_AVG_SQ], **arguments, noise=noise)
        else:
            _advance_by_rule_(weight, slope.to(dtype), values, step, settings, scale, start)
        store(stored, values, arguments["step"], start)
    if not at_once and not param.is_contiguous():
        param.copy_(flat.view(param.shape))


def _blocks(
    flat: Tensor, grad: Tensor, moments: dict[str, Stored], size: int
) -> Iterator[tuple[int, Tensor, Tensor, dict[str, Stored]]]:
    """First element, weights, gradient and moments of blocks of `size` elements."""
    slopes = grad.reshape(-1)
    for start in range(0, flat.numel(), size):
        stop = min(start + size, flat.numel())
        stored = {name: quantization.part(moment, start, stop) for name, moment in moments.items()}
        yield start, flat[start:stop], slopes[start:stop], stored


def _advance_by_rule_(
    param: Tensor,
    grad: Tensor,
    states: dict[str, Tensor],
    step: Tensor,
    settings: GroupSettings,
    scale: float,
    start: int,
) -> None:
    """W <- (1 - lr * weight_decay) (W - lr * scale * step_size * N), computed in the gradient's dtype.

    An element of the gradient that is not finite, or whose square overflows, changes nothing of its own, and nothing at
    all where the rule's elements see each other.
    """
    finite = grad.square().isfinite()
    all_finite = bool(finite.all())
    if not all_finite and not settings.rule.elementwise:
        return
    before = {} if all_finite else {name: value.clone() for name, value in states.items()}
    moved = advance(settings.rule, grad if all_finite else torch.where(finite, grad, 0.0), states, step)
    size = settings.learning_rate * scale * float(settings.rule.step_size(step))
    value = param.to(grad.dtype).sub(moved.mul_(size)).mul_(settings.decay_factor)
    if not all_finite:
        value = torch.where(finite, value, param.to(grad.dtype))
        for name, old in before.items():
            states[name].copy_(torch.where(finite, states[name], old))
    store_weight_(param, value, settings.weight_seed(step), start)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    alpha: float = 1.0,
    noise: tuple[int | None, int] = (None, 0),
) -> None:
    """One AdamW step as the released code makes it: bias correction on the step size, decay after the update.

    Elements whose gradient is not finite, or has a square that overflows, are left as they are, moments included: one
    bad batch must not stay in the moments for good. Elementwise and rounded alike wherever a fragment begins and ends,
    so it is the same to the bit on any fragment of a parameter.

    Args:
        param: 1-D, of any floating dtype; computed in the moments' dtype and rounded once.
        grad: the same shape.
        exp_avg: first moment, same shape.
        exp_avg_sq: second moment, same shape.
        step: this step's count, from 1.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to sqrt(V); where the sum is zero the element makes no step.
        weight_decay: decoupled, times lr.
        alpha: multiplies the step, not the decay.
        noise: with which param in bfloat16 is rounded: its seed, None for the nearest, and the first element's place.
    """
    value, slope = param.to(exp_avg.dtype), grad.to(exp_avg.dtype)
    moments = (exp_avg, exp_avg_sq)
    # The norm is the quick test; it can also overflow where every single square is finite.
    grad_finite = None if bool(torch.isfinite(torch.linalg.vector_norm(slope))) else slope.square().isfinite()
    tensors = (value, slope, *moments)
    if grad_finite is not None:
        tensors = tuple(tensor[grad_finite] for tensor in tensors)
    _fused_adamw_(tensors, step=step, lr=lr * alpha, betas=betas, eps=eps, decay_factor=1.0 - lr * weight_decay)
    if grad_finite is not None:
        for tensor, part in zip((value, *moments), (tensors[0], *tensors[2:]), strict=True):
            tensor[grad_finite] = part
    if value is not param:
        store_weight_(param, value, *noise)


def _fused_adamw_(
    tensors: tuple[Tensor, ...], *, step: int, lr: float, betas: tuple[float, float], eps: float, decay_factor: float
) -> None:
    """Torch's fused Adam, then decay, on (param, grad, M, V), 1-D; all but the gradient are updated.

    torch divides by sqrt(V) / sqrt(1 - beta2^t) + eps where the released code has (sqrt(V) + eps) / sqrt(1 - beta2^t):
    so its own correction is left out.
    """
    # With eps = 0 it would divide zero by zero where no gradient has been.
    before = tensors[0].clone() if eps < F.NO_EPS else None
    size = tensors[0].numel()
    lanes = FUSED_BYTES // tensors[0].element_size()
    even, step_size = size - size % lanes, lr * F.bias_correction(step, betas)
    if even:
        F.fused_adam_(*(tensor[:even] for tensor in tensors), step_size=step_size, betas=betas, eps=eps)
    if even < size:
        padded = tuple(pad(tensor[even:], (0, even + lanes - size)) for tensor in tensors)
        F.fused_adam_(*padded, step_size=step_size, betas=betas, eps=eps)
        for padded_part, tensor in zip(padded, tensors, strict=True):
            tensor[even:] = padded_part[: size - even]
    if before is not None:
        tensors[0].copy_(torch.where(tensors[3] == 0.0, before, tensors[0]))
    if decay_factor != 1.0:
        tensors[0].mul_(decay_factor)
