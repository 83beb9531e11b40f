"""Faults of DeepSpeed's loss scaling, mended for engines that train with an optimizer of this package.

Written against DeepSpeed 0.17 to 0.19. What it relies on, and the reports of what it mends:

- `FP16_UnfusedOptimizer` (stage 0) divides the gradients by its loss scale, but from 0.18 on `DeepSpeedEngine.backward`
  and `scale` multiply the loss only for ZeRO (github.com/deepspeedai/DeepSpeed/pull/8393): the gradients come 65536
  times too small at the default scale.
- `step` of every wrapper calls `_update_scale` before it divides the gradients, so that in the step in which the scale
  grows they come out half as large (github.com/deepspeedai/DeepSpeed/pull/8588).
- Under float16 autocast a ZeRO wrapper has torch's scaler in `torch_autocast_gradscaler`. `_optimizer_step` updates it
  after every param group, so that the scale may change between two groups of a step; the norm for clipping is that of
  scaled gradients; and a step that overflows tells it nothing, so that the scale stays too large for ever. Without that
  scaler a wrapper divides by its `loss_scale`, and clips by the true norm.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar, get_args

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from ds_fira.engine.deepspeed.chosen import trains_ours
from ds_fira.optim.base import LowRankOptimizer

T = TypeVar("T")
Wrapper = FP16_UnfusedOptimizer | DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3
# Of the stages 0, 1 and 2, 3.
WRAPPERS = get_args(Wrapper)
# On a wrapper during its step: what it would have told the loss scaler.
_PUT_OFF = "_fira_put_off"


def grow_after_step(step: Callable[..., T], wrapper: Wrapper, *args: object, **kwargs: object) -> T:
    """`step` of a wrapper: the loss scale grows once the gradients that were made with the old one are used."""
    if not isinstance(wrapper.optimizer, LowRankOptimizer):
        return step(wrapper, *args, **kwargs)
    put_off: list[Callable[[], None]] = []
    vars(wrapper)[_PUT_OFF] = put_off
    try:
        with _autocast_scale(wrapper):
            result = step(wrapper, *args, **kwargs)
    finally:
        del vars(wrapper)[_PUT_OFF]
    for update in put_off:
        update()
    return result


@contextlib.contextmanager
def _autocast_scale(wrapper: Wrapper) -> Iterator[None]:
    """Let a wrapper divide by the scale of float16 autocast as by its own, and tell torch's scaler of the step once."""
    scaler: torch.amp.GradScaler | None = getattr(wrapper, "torch_autocast_gradscaler", None)
    if scaler is None:
        yield
        return
    own, checks = wrapper.loss_scaler.cur_scale, getattr(wrapper, "check_grad_overflow", None)
    wrapper.loss_scaler.cur_scale, wrapper.torch_autocast_gradscaler = scaler.get_scale(), None
    if checks is not None and not wrapper.compute_grad_norm:
        wrapper.check_grad_overflow = True  # else the norm tells it
    try:
        yield
    finally:
        wrapper.loss_scaler.cur_scale, wrapper.torch_autocast_gradscaler = own, scaler
        if checks is not None:
            wrapper.check_grad_overflow = checks
    _tell(scaler, wrapper.overflow)


def autocast_scaler(engine: DeepSpeedEngine) -> torch.amp.GradScaler | None:
    """Torch's scaler of an engine under float16 autocast, whose scale DeepSpeed does not save; else None."""
    own = getattr(engine, "torch_autocast_z0_gradscaler", None)
    return getattr(engine.optimizer, "torch_autocast_gradscaler", None) if own is None else own


def _tell(scaler: torch.amp.GradScaler, overflow: bool) -> None:
    """Tell torch's scaler of a step; it goes by an optimizer's gradients, for which a single number stands."""
    number = torch.nn.Parameter(torch.zeros((), device=get_accelerator().current_device_name()))
    number.grad = torch.full_like(number, torch.inf if overflow else 0.0)
    scaler.unscale_(torch.optim.SGD([number], lr=0.0))
    scaler.update()


def put_off_growth(update_scale: Callable[..., None], wrapper: Wrapper, *overflow: bool, **kwargs: bool) -> None:
    """`_update_scale` of a wrapper: waits for the end of the step, unless there was an overflow, which ends it."""
    update = functools.partial(update_scale, wrapper, *overflow, **kwargs)
    put_off = vars(wrapper).get(_PUT_OFF)
    if put_off is None or any((*overflow, *kwargs.values())):
        update()
    else:
        put_off.append(update)


def scale_backward(backward: Callable[..., T], engine: DeepSpeedEngine, *args: object, **kwargs: object) -> T:
    """`backward` of an engine at stage 0: begins with the wrapper's loss scale, whatever the engine multiplies by."""
    if not _lacks_scale(engine):
        return backward(engine, *args, **kwargs)
    loss, divided = _loss_and_divided(*args, **kwargs)
    scale = loss_scale(engine.optimizer) * (1 / engine.gradient_accumulation_steps() if divided else 1.0)
    # Seen from the user's loss, so that it does not matter whether, and where, the engine scales.
    hook = loss.register_hook(lambda grad: torch.full_like(grad, scale))
    try:
        return backward(engine, *args, **kwargs)
    finally:
        hook.remove()


def _loss_and_divided(
    loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, *_: object, **__: object
) -> tuple[Tensor, bool]:
    """From the arguments of `backward`: the loss, and whether it is divided by the accumulation steps."""
    return loss, scale_wrt_gas


def scale_loss(scale: Callable[..., Tensor], engine: DeepSpeedEngine, loss: Tensor) -> Tensor:
    """`scale` of an engine at stage 0, for a backward pass that the user makes."""
    scaled = scale(engine, loss)
    return loss * loss_scale(engine.optimizer) if scaled is loss and _lacks_scale(engine) else scaled


def loss_scale(wrapper: FP16_UnfusedOptimizer) -> float:
    """The factor that the wrapper of stage 0 divides gradients by."""
    # 0.17 has it on the wrapper itself.
    return float(getattr(wrapper, "loss_scale_config", wrapper).cur_scale)


def _lacks_scale(engine: DeepSpeedEngine) -> bool:
    return trains_ours(engine) and engine.fp16_enabled() and isinstance(engine.optimizer, FP16_UnfusedOptimizer)
