"""A step of a user's rule: on the low-rank gradient of a matrix, and on a parameter that is not projected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_fira.core import quantization
from ds_fira.core.algorithms import algorithm_of
from ds_fira.core.quantization import Stored
from ds_fira.core.rules import Rule
from ds_fira.core.unprojected import ADAMW_BLOCK, DECODED_BLOCK


def rule_of(group: Mapping[str, Any]) -> Rule | None:
    """The rule of a param group with the group's hyper-parameters; None for Adam."""
    kind = algorithm_of(group).rule
    # The values were checked when they were given.
    return None if kind is None else kind.model_construct(**{name: group[name] for name in kind.model_fields})


def step_factor(rule: Rule, step: Tensor) -> Tensor:
    """The rule's factor of the learning rate: float64, of `step`'s shape and device."""
    return torch.as_tensor(rule.step_size(step), dtype=torch.float64, device=step.device).expand(step.shape)


def advance(rule: Rule, grad: Tensor, states: dict[str, Tensor], step: Tensor) -> Tensor:
    """What `Rule.direction` gives, in memory of its own; the states are changed in place.

    Raises:
        ValueError: the rule breaks its contract, in one sentence.
    """
    given, version, name = dict(states), grad._version, type(rule).__name__
    direction = rule.direction(grad, states, step)
    if grad._version != version:
        raise ValueError(f"{name}.direction changes its gradient in place; let it change a copy, grad.clone().")
    if not isinstance(direction, Tensor) or direction.shape != grad.shape:
        found = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise ValueError(
            f"{name}.direction returned {found} for a gradient of shape {tuple(grad.shape)}; return a tensor of that "
            "shape."
        )
    for key, value in states.items():
        if key not in given or value.shape != grad.shape:
            raise ValueError(
                f"{name}.direction left a state {key!r} of shape {tuple(value.shape)}; keep the states that "
                "Rule.states names, in the gradient's shape."
            )
        if value is not given[key]:
            states[key] = given[key].copy_(value)
    held = {tensor.untyped_storage().data_ptr() for tensor in (grad, *given.values())}
    # The caller goes on in the memory of N.
    own = direction.untyped_storage().data_ptr() not in held
    return direction.to(grad.dtype) if own else direction.to(grad.dtype, copy=True)


def rule_direction(
    rule: Rule, low_rank: Tensor, moments: dict[str, Stored], step: Tensor, usable: Tensor, decided: bool
) -> Tensor:
    """N of one matrix's R, its stored states updated where the gradient is usable.

    Args:
        rule: with the group's hyper-parameters.
        low_rank: R.
        moments: the stored states.
        step: this step's count.
        usable: whether R comes from a finite gradient.
        decided: whether the host has asked, so that it is; else nothing is changed where it is not.
    """
    states = {name: quantization.read(stored, low_rank.dtype) for name, stored in moments.items()}
    if decided:
        direction = advance(rule, low_rank, states, step)
    else:
        before = {name: value.clone() for name, value in states.items()}
        direction = advance(rule, torch.where(usable, low_rank, 0.0), states, step)
        for name, value in states.items():
            value.copy_(torch.where(usable, value, before[name]))
    store(moments, states, step)
    return direction


def store(moments: dict[str, Stored], values: Mapping[str, Tensor], step: Tensor | int, start: int = 0) -> None:
    """Store states that were read and updated; the noise of their rounding goes by the step count."""
    for place, (name, stored) in enumerate(moments.items()):
        if stored[quantization.VALUES] is not values[name]:
            quantization.write_(stored, values[name], seed=len(moments) * step + place, start=start)


def step_plain_(
    rule: Rule,
    param: Tensor,
    grad: Tensor,
    moments: dict[str, Stored],
    step: Tensor,
    *,
    lr: float,
    weight_decay: float,
    dtype: torch.dtype,
    alpha: float = 1.0,
) -> None:
    """W <- (1 - lr * weight_decay) (W - lr * alpha * step_size * N) for a parameter that is not projected.

    What is not finite in the gradient, or has a square that overflows, changes nothing: element by element where the
    rule is elementwise, so that it is the same on any fragment, else for the whole parameter.

    Args:
        rule: with the group's hyper-parameters.
        param: updated, of any shape and strides.
        grad: the same shape.
        moments: the stored states.
        step: this step's count, on the CPU.
        lr: learning rate.
        weight_decay: decoupled.
        dtype: in which the step is computed.
        alpha: of the step alone, not of the decay.
    """
    size = lr * alpha * float(rule.step_size(step))
    if not rule.elementwise:
        slope = grad.to(dtype)
        if bool(slope.square().isfinite().all()):
            states = {name: quantization.read(stored, dtype) for name, stored in moments.items()}
            value = param.to(dtype).sub_(advance(rule, slope, states, step).mul_(size)) * (1.0 - lr * weight_decay)
            param.copy_(value)
            store(moments, states, int(step))
        return
    flat, slopes = param.view(-1) if param.is_contiguous() else param.reshape(-1), grad.reshape(-1)
    compressed = any(stored[quantization.VALUES].dtype != dtype for stored in moments.values())
    block = DECODED_BLOCK if compressed else ADAMW_BLOCK
    for start in range(0, flat.numel(), block):
        stop = min(start + block, flat.numel())
        stored = {name: quantization.part(moment, start, stop) for name, moment in moments.items()}
        states = {name: quantization.read(part, dtype) for name, part in stored.items()}
        slope = slopes[start:stop].to(dtype)
        usable = slope.square().isfinite()
        all_usable = bool(usable.all())
        before = {} if all_usable else {name: value.clone() for name, value in states.items()}
        moved = advance(rule, slope if all_usable else torch.where(usable, slope, 0.0), states, step).mul_(size)
        value = flat[start:stop].to(dtype).sub(moved).mul_(1.0 - lr * weight_decay)
        if not all_usable:
            value = torch.where(usable, value, flat[start:stop].to(dtype))
            for name, old in before.items():
                states[name].copy_(torch.where(usable, states[name], old))
        flat[start:stop] = value
        store(stored, states, int(step), start)
    if not param.is_contiguous():
        param.copy_(flat.view(param.shape))
