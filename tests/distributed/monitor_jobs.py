"""What the ranks of a test pool run to see how FiraAdam speaks to DeepSpeed's monitors."""

from __future__ import annotations

from typing import Any

import torch

from ds_fira.observe.metrics import StepMetrics
from ds_fira.sharding.comm import Communicator
from tests.distributed.zero_jobs import batches, build


def count_reports(
    ds_config: dict[str, Any], shapes: list[tuple[int, int]], steps: int
) -> tuple[list[tuple[int, int]], int]:
    """How often, after each step, the sums were read and sent since the engine was built; collectives of the steps."""
    reads, sends = [], []
    totals, gather_numbers = StepMetrics.totals, Communicator.gather_numbers
    engine = build(ds_config, shapes)

    def counted_totals(metrics: StepMetrics) -> Any:
        reads.append(1)
        return totals(metrics)

    def counted_gather(communicator: Communicator, numbers: Any) -> Any:
        sends.append(1)
        return gather_numbers(communicator, numbers)

    StepMetrics.totals, Communicator.gather_numbers = counted_totals, counted_gather
    try:
        found = []
        for tokens in batches(steps, torch.distributed.get_rank()):
            engine.backward(engine(tokens))
            engine.step()
            found.append((len(reads), len(sends)))
    finally:
        StepMetrics.totals, Communicator.gather_numbers = totals, gather_numbers
    collectives = engine.basic_optimizer.communicator.collectives
    engine.destroy()
    return found, collectives


def train_beside_adamw(
    ds_config: dict[str, Any], shapes: list[tuple[int, int]], adamw_folder: str, steps: int
) -> list[list[float]]:
    """Train with FiraAdam and then with AdamW in the same process; the losses of both on this rank."""
    adamw = {
        **ds_config,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "csv_monitor": {**ds_config["csv_monitor"], "output_path": adamw_folder},
    }
    losses = []
    for chosen in (ds_config, adamw):
        engine = build(chosen, shapes)
        losses.append([])
        for tokens in batches(steps, torch.distributed.get_rank()):
            loss = engine(tokens)
            engine.backward(loss)
            engine.step()
            losses[-1].append(float(loss.detach()))
        engine.destroy()
    return losses
