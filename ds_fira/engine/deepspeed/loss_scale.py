"""Two faults of DeepSpeed's loss scaling, mended for fp16 engines that train with an optimizer of this package.

Written against DeepSpeed 0.17 to 0.19. What it relies on, and the reports of what it mends:

- `FP16_UnfusedOptimizer` (stage 0) divides the gradients by its loss scale, but from 0.18 on `DeepSpeedEngine.backward`
  and `scale` multiply the loss only for ZeRO (github.com/deepspeedai/DeepSpeed/pull/8393): the gradients come 65536
  times too small at the default scale.
- `step` of every wrapper calls `_update_scale` before it divides the gradients, so that in the step in which the scale
  grows they come out half as large (github.com/deepspeedai/DeepSpeed/pull/8588).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, get_args

import torch
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
        result = step(wrapper, *args, **kwargs)
    finally:
        del vars(wrapper)[_PUT_OFF]
    for update in put_off:
        update()
    return result


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
