"""The training loop of the fine-tuning experiments, with or without DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from .choices import Row, collate, response_loss
from .tuning import Recipe, trained_parameters


def steps_of(rows: int, recipe: Recipe) -> int:
    """Optimizer steps of a training; the rows of an epoch that fill no batch are left out."""
    return rows // recipe.batch_size * recipe.epochs


def schedule(optimizer: Optimizer, recipe: Recipe, steps: int) -> LambdaLR:
    """Linear warm-up from 0 and linear decay to 0, the Trainer's `linear`."""
    return get_linear_schedule_with_warmup(optimizer, recipe.warmup_steps, steps)


def batches(rows: Sequence[Row], recipe: Recipe, seed: int) -> Iterator[list[Row]]:
    """The batches of all epochs, each epoch in an order of its own; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows) - recipe.batch_size + 1, recipe.batch_size):
            yield [rows[index] for index in order[start : start + recipe.batch_size]]


class PlainEngine:
    """The part of a DeepSpeed engine that the loop uses, for one process without DeepSpeed."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR, clipping: float) -> None:
        self.module, self.optimizer, self.scheduler, self.clipping = model, optimizer, scheduler, clipping
        self.device = next(model.parameters()).device

    def __call__(self, **inputs: Any) -> Any:
        """The model's output."""
        return self.module(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        loss.backward()

    def step(self) -> None:
        """Clip, step, and go on in the schedule."""
        torch.nn.utils.clip_grad_norm_(trained_parameters(self.module), self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()


def fine_tune(
    engine: Any,
    rows: Sequence[Row],
    recipe: Recipe,
    pad: int,
    seed: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
) -> Iterator[Tensor]:
    """Train, and give the loss of every step as it is made, on this rank's part of the batch.

    Args:
        engine: a `PlainEngine` or a DeepSpeed engine, with a schedule.
        rows: the training rows, all of them on every rank.
        recipe: batch size and epochs.
        pad: token that fills short rows.
        seed: of the order.
        rank: of this process.
        world_size: processes, which divide a batch.
        accumulation: passes in which a process takes its part of a batch.
    """
    part = recipe.batch_size // world_size
    size = part // accumulation
    for batch in batches(rows, recipe, seed):
        own = batch[rank * part : (rank + 1) * part]
        losses = []
        for start in range(0, part, size):
            loss = response_loss(engine, collate(own[start : start + size], pad, engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        yield torch.stack(losses).mean()
