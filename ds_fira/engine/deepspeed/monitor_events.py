"""What DeepSpeed's monitors are told of a training with FiraAdam: loss, gradient norm, and Fira at work.

`docs/monitoring.md` says what each event is, and when it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ds_fira.observe.metrics import Totals
from ds_fira.optim.base import LowRankOptimizer

# (name, value, x), as DeepSpeed's monitors take them; x is global samples.
Event = tuple[str, float, int]
# The page of DeepSpeed's monitors that its own `lr` and `loss_scale` are on; its documentation promises the loss there.
LOSS = "Train/Samples/train_loss"
PREFIX = "Train/Fira/"


def over_ranks(optimizer: LowRankOptimizer, own: Totals) -> Totals:
    """What all ranks did together; a collective call.

    Args:
        optimizer: inside an engine, or alone.
        own: what this rank did.
    """
    parts = [own]
    if optimizer.communicator is not None:
        parts = [Totals(*part) for part in optimizer.communicator.gather_numbers(astuple(own))]
    return Totals.over_ranks(parts, optimizer.replicated)


@dataclass(slots=True)
class Mean:
    """Sum and number of scalars, kept where they are: nothing is read from a device before `parts` is called."""

    total: float | Tensor = 0.0
    count: float | Tensor = 0.0

    def add(self, value: Tensor, counted: Tensor | float = 1.0) -> None:
        """Add a scalar, 0-dim."""
        self.total = self.total + value
        self.count = self.count + counted

    def parts(self) -> tuple[float, float]:
        """Sum and number as plain numbers; waits for a GPU."""
        return float(self.total), float(self.count)


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

    def add_loss(self, loss: Any) -> None:
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
            self._losses.add(loss)
        if applied and grad_norm is not None:
            norm = torch.as_tensor(grad_norm, dtype=torch.float64)
            finite = norm.isfinite()
            self._norm_squares.add(torch.where(finite, norm.square(), 0.0), finite.double())
        if step % self._interval == 0:
            self._write(self._events(samples))
            self._begin_interval()

    def _begin_interval(self) -> None:
        self._losses, self._norm_squares = Mean(), Mean()

    def _events(self, samples: int) -> list[Event]:
        """The events of the interval; all ranks together."""
        totals = self._optimizer.metrics.totals()
        own = totals - self._reported
        self._reported = totals
        # One collective for all of it. The norm is known to every rank, the loss is each rank's own.
        numbers = (*astuple(own), *self._losses.parts())
        communicator = self._optimizer.communicator
        rows = [list(numbers)] if communicator is None else communicator.gather_numbers(numbers)
        width = len(fields(Totals))
        done = Totals.over_ranks([Totals(*row[:width]) for row in rows], self._optimizer.replicated)
        loss, losses = (sum(row[place] for row in rows) for place in (width, width + 1))
        norm_square, norms = self._norm_squares.parts()
        events: list[Event] = []
        if losses:
            events.append((LOSS, loss / losses, samples))
        if norms:
            events.append((PREFIX + "grad_norm", math.sqrt(norm_square / norms), samples))
        if done.matrix_steps:
            found = done.figures()
            del found["matrix_steps"]
            events += [(PREFIX + name, float(value), samples) for name, value in found.items()]
        return events
