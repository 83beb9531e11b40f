"""What DeepSpeed's monitors are told of a training with Fira: loss, gradient norm, and how its steps go.

`docs/monitoring.md` says what each event is, and when it is written. Written against DeepSpeed 0.19.8. What it relies
on:

- `DeepSpeedEngine.backward` returns the micro-batch's share of the loss of the step.
- `DeepSpeedEngine._take_model_step` makes the optimizer step, and counts `global_steps` and `global_samples`. The
  engine writes its own events after it, at the same `global_samples`.
- `FP16_UnfusedOptimizer` (stage 0 in bf16 and fp16) gives the norm of the gradient as it came, loss scale included; its
  scale may grow in the step. At stage 0 in fp32 there is no wrapper, and nobody keeps the norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple
from typing import TypeVar

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

from ds_fira.engine.deepspeed.chosen import trains_ours
from ds_fira.engine.deepspeed.loss_scale import loss_scale
from ds_fira.engine.deepspeed.run_start import record_start
from ds_fira.observe.metrics import Totals
from ds_fira.optim.base import LowRankOptimizer

T = TypeVar("T")
# (name, value, x), as DeepSpeed's monitors take them; x is global samples.
Event = tuple[str, float, int]
# The page of DeepSpeed's monitors that its own `lr` and `loss_scale` are on; its documentation promises the loss there.
LOSS = "Train/Samples/train_loss"
PREFIX = "Train/Fira/"
_HOOK = "_fira_monitor_hook"


class MonitorHook:
    """Follows the steps of one engine and writes events to its monitors, every `interval` optimizer steps.

    Between two events nothing is sent, and nothing is read from a device.
    """

    def __init__(self, optimizer: LowRankOptimizer, write: Callable[[list[Event]], None], interval: int) -> None:
        """Start to follow.

        Args:
            optimizer: the engine's.
            write: takes events on every rank, such as `MonitorMaster.write_events`.
            interval: optimizer steps from one event to the next, at least 1.
        """
        self._optimizer = optimizer
        self._write = write
        self._interval = interval
        self._reported = optimizer.metrics.totals()
        self._loss: Tensor | None = None
        self._begin_interval()

    def add_loss(self, loss: Tensor | float) -> None:
        """Add a micro-batch's share of the loss of the step under way, 0-dim."""
        loss = torch.as_tensor(loss).detach().double()
        self._loss = loss if self._loss is None else self._loss + loss

    def after_step(self, applied: bool, grad_norm: float | Tensor | None, step: int, samples: int) -> None:
        """Count an optimizer step, and write the events of the interval that it ends; a collective call.

        Args:
            applied: whether the step was made; one that the loss scaler skipped counts for nothing.
            grad_norm: 2-norm of the whole gradient before clipping; None where it is not known.
            step: the engine's optimizer steps so far, skipped ones included.
            samples: samples seen so far, the x of the events.
        """
        loss, self._loss = self._loss, None
        if applied and loss is not None:
            self._loss_sum = self._loss_sum + loss
            self._losses += 1
        if applied and grad_norm is not None:
            norm = torch.as_tensor(grad_norm, dtype=torch.float64)
            finite = norm.isfinite()
            self._norm_square_sum = self._norm_square_sum + torch.where(finite, norm.square(), 0.0)
            self._norms = self._norms + finite.double()
        if step % self._interval == 0:
            self._write(self._events(samples))
            self._begin_interval()

    def _begin_interval(self) -> None:
        # Sums and what they are over stay where they are added up, on a device or not.
        self._loss_sum: Tensor | float = 0.0
        self._losses = 0
        self._norm_square_sum: Tensor | float = 0.0
        self._norms: Tensor | float = 0.0

    def _events(self, samples: int) -> list[Event]:
        """The events of the interval; all ranks together."""
        totals = self._optimizer.metrics.totals()
        own, self._reported = totals - self._reported, totals
        # One collective for all of it. The norm is known to every rank, the loss is each rank's own.
        rows = [[*astuple(own), float(self._loss_sum), float(self._losses)]]
        if self._optimizer.communicator is not None:
            rows = self._optimizer.communicator.gather_numbers(rows[0])
        done = Totals.over_ranks([Totals(*row[:-2]) for row in rows], self._optimizer.replicated)
        loss, losses = (sum(row[place] for row in rows) for place in (-2, -1))
        norms = float(self._norms)
        events: list[Event] = []
        if losses:
            events.append((LOSS, loss / losses, samples))
        if norms:
            events.append((PREFIX + "grad_norm", math.sqrt(float(self._norm_square_sum) / norms), samples))
        if done.matrix_steps:
            figures = done.figures().items()
            events += [(PREFIX + name, float(value), samples) for name, value in figures if name != "matrix_steps"]
        return events


def add_loss(backward: Callable[..., T], engine: DeepSpeedEngine, *args: object, **kwargs: object) -> T:
    """`backward`: the loss that it returns goes into the mean of the interval."""
    loss = backward(engine, *args, **kwargs)
    hook = _hook_of(engine)
    if hook is not None and not engine.pipeline_parallelism:  # of a pipeline DeepSpeed writes it
        hook.add_loss(loss)
    return loss


def report_step(take_model_step: Callable[..., T], engine: DeepSpeedEngine, *args: object, **kwargs: object) -> T:
    """`_take_model_step`: counts the step, and writes the events of an interval that ends with it."""
    hook = _hook_of(engine)
    if hook is None:
        return take_model_step(engine, *args, **kwargs)
    norm, scale = _own_norm(engine), _scale_of_norm(engine)
    result = take_model_step(engine, *args, **kwargs)
    if norm is None:
        norm = engine.get_global_grad_norm()
    hook.after_step(
        applied=engine.was_step_applied(),
        grad_norm=None if norm is None else norm / scale,
        step=engine.global_steps,
        samples=engine.global_samples,
    )
    return result


def forget_hook(engine: DeepSpeedEngine) -> None:
    """Begin a new interval of events at the next step, because the counters were set to those of a checkpoint."""
    vars(engine).pop(_HOOK, None)


def _hook_of(engine: DeepSpeedEngine) -> MonitorHook | None:
    """The engine's hook, None without a monitor or with another optimizer."""
    if not engine.monitor.enabled or not trains_ours(engine):
        return None
    if _HOOK not in vars(engine):
        interval = engine.steps_per_print()
        # accelerate sets infinity, to keep DeepSpeed from printing.
        interval = 1 if interval is None or math.isinf(interval) else int(interval)
        record_start(engine, interval)
        vars(engine)[_HOOK] = MonitorHook(engine.basic_optimizer, engine.monitor.write_events, interval)
    return vars(engine)[_HOOK]


def _own_norm(engine: DeepSpeedEngine) -> Tensor | None:
    """The gradient's norm before clipping where no wrapper keeps it: at stage 0 in fp32; None elsewhere.

    And None where this rank has the gradient of a pipeline's stage only.
    """
    if not isinstance(engine.optimizer, LowRankOptimizer) or engine.fira_holders.staged:
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def _scale_of_norm(engine: DeepSpeedEngine) -> float:
    """The loss scale that is still in the norm, before the step that may change it."""
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        config = getattr(engine.optimizer, "loss_scale_config", None)
        return loss_scale(engine.optimizer) if getattr(config, "use_grad_scaling", True) else 1.0
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    scaler = scaler or getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
