"""How a watch follows DeepSpeed's engine, through its private attributes like the other files `zero*.py`.

Written against DeepSpeed 0.19.8. What it relies on:

- `DeepSpeedEngine.backward` returns the micro-batch's share of the loss of the step.
- `DeepSpeedEngine._take_model_step` makes the optimizer step, and counts `global_steps` and `global_samples`. The
  engine writes its own events after it, at the same `global_samples`.
- `FP16_UnfusedOptimizer` (stage 0 in bf16 and fp16) gives the norm of the gradient as it came, loss scale included; its
  scale may grow in the step. At stage 0 in fp32 there is no wrapper, and nobody keeps the norm.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

from ds_fira.engine.deepspeed.monitor_events import MonitorHook
from ds_fira.optim.base import LowRankOptimizer

_WATCH = "_fira_watch"


def register_monitor_hook() -> None:
    """Let every engine that trains with FiraAdam and has a monitor switched on write Fira's events to it.

    Called by `import ds_fira`, and again without effect. Other engines go on as before.
    """
    if hasattr(DeepSpeedEngine._take_model_step, _WATCH):
        return
    backward = DeepSpeedEngine.backward
    take_model_step = DeepSpeedEngine._take_model_step

    @functools.wraps(backward)
    def backward_watched(engine: Any, *args: Any, **kwargs: Any) -> Any:
        loss = backward(engine, *args, **kwargs)
        watch = _hook_of(engine)
        if watch is not None:
            watch.add_loss(loss)
        return loss

    @functools.wraps(take_model_step)
    def take_model_step_watched(engine: Any, *args: Any, **kwargs: Any) -> Any:
        watch = _hook_of(engine)
        if watch is None:
            return take_model_step(engine, *args, **kwargs)
        norm, scale = _own_norm(engine), _scale_of_norm(engine)
        result = take_model_step(engine, *args, **kwargs)
        if norm is None:
            norm = engine.get_global_grad_norm()
        watch.after_step(
            applied=engine.was_step_applied(),
            grad_norm=None if norm is None else norm / scale,
            step=engine.global_steps,
            samples=engine.global_samples,
        )
        return result

    setattr(take_model_step_watched, _WATCH, True)
    DeepSpeedEngine.backward = backward_watched
    DeepSpeedEngine._take_model_step = take_model_step_watched


def _hook_of(engine: Any) -> MonitorHook | None:
    """The engine's watch, None without a monitor or without FiraAdam."""
    if not engine.monitor.enabled or not isinstance(engine.basic_optimizer, LowRankOptimizer):
        return None
    if _WATCH not in vars(engine):
        interval = engine.steps_per_print()
        # accelerate sets infinity, to keep DeepSpeed from printing.
        interval = 1 if interval is None or math.isinf(interval) else int(interval)
        vars(engine)[_WATCH] = MonitorHook(engine.basic_optimizer, engine.monitor.write_events, interval)
    return vars(engine)[_WATCH]


def forget_hook(engine: Any) -> None:
    """Begin a new interval of events at the next step, because the counters were set to those of a checkpoint."""
    vars(engine).pop(_WATCH, None)


def _own_norm(engine: Any) -> Tensor | None:
    """The gradient's norm before clipping where no wrapper keeps it: at stage 0 in fp32; None elsewhere."""
    if engine.optimizer is not engine.basic_optimizer:
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def _scale_of_norm(engine: Any) -> float:
    """The loss scale that is still in the norm, before the step that may change it."""
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        # Before 0.19 the scale is on the wrapper itself.
        config = getattr(engine.optimizer, "loss_scale_config", engine.optimizer)
        return float(config.cur_scale) if getattr(config, "use_grad_scaling", True) else 1.0
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    scaler = scaler or getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
