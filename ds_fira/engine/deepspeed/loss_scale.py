"""Two faults of DeepSpeed's loss scaling, mended for engines that train with FiraAdam.

Written against DeepSpeed 0.17 to 0.19. What it relies on, and the reports of what it mends:

- `FP16_UnfusedOptimizer` (stage 0) divides the gradients by its loss scale, but from 0.18 on `DeepSpeedEngine.backward`
  and `scale` multiply the loss only for ZeRO (github.com/deepspeedai/DeepSpeed/pull/8393): the gradients come 65536
  times too small at the default scale.
- `step` of every wrapper calls `_update_scale` before it divides the gradients, so that in the step in which the scale
  grows they come out half as large (github.com/deepspeedai/DeepSpeed/pull/8588).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor


def mend_loss_scaling(engine: Any) -> None:
    """Let the gradients of an fp16 engine reach the optimizer as large as they are; other engines stay as they were."""
    if not engine.fp16_enabled():
        return
    _grow_after_step(engine.optimizer)
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        _scale_loss(engine)


def _grow_after_step(wrapper: Any) -> None:
    """Put off the growth of the loss scale until the gradients that were made with the old one are used."""
    update_scale, step = wrapper._update_scale, wrapper.step
    put_off: list[bool] = []

    @functools.wraps(update_scale)
    def _update_scale(overflow: bool) -> None:
        if overflow:
            update_scale(overflow)
        else:
            put_off.append(overflow)

    @functools.wraps(step)
    def step_then_update(*args: Any, **kwargs: Any) -> Any:
        put_off.clear()
        result = step(*args, **kwargs)
        for overflow in put_off:
            update_scale(overflow)
        return result

    wrapper._update_scale = _update_scale
    wrapper.step = step_then_update


def _scale_loss(engine: Any) -> None:
    """Let every backward pass begin with the wrapper's loss scale, whatever the engine multiplies by."""
    backward = engine.backward
    # 0.17 has the scale on the wrapper itself.
    config = getattr(engine.optimizer, "loss_scale_config", engine.optimizer)

    @functools.wraps(backward)
    def backward_scaled(loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        share = 1 / engine.gradient_accumulation_steps() if scale_wrt_gas else 1.0
        # Seen from the user's loss, so that it does not matter whether, and where, the engine scales.
        hook = loss.register_hook(lambda grad: torch.full_like(grad, share * config.cur_scale))
        try:
            return backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        finally:
            hook.remove()

    engine.backward = backward_scaled
    if not hasattr(engine, "scale"):  # before 0.18
        return
    scale = engine.scale

    @functools.wraps(scale)
    def scale_scaled(loss: Tensor) -> Tensor:
        scaled = scale(loss)
        return loss * config.cur_scale if scaled is loss else scaled

    engine.scale = scale_scaled
