"""Small trainings planned as on many ranks: limits of the planner are set so low that a few ranks are many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_fira.optim.registry import fira_of
from tests.distributed import resize_jobs, zero_jobs
from tests.distributed.limits import limited
from tests.distributed.sent_bytes import counted


def train(limits: Mapping[str, int], **job: Any) -> dict[str, Any]:
    """`zero_jobs.train` by such a plan."""
    with limited(limits):
        return zero_jobs.train(**job)


def run(limits: Mapping[str, int], **job: Any) -> dict[str, Any]:
    """`resize_jobs.run` by such a plan."""
    with limited(limits):
        return resize_jobs.run(**job)


def count(limits: Mapping[str, int], ds_config: dict[str, Any], shapes: list[tuple[int, int]], steps: int) -> Any:
    """What every step hands to other ranks, counted where torch sends it.

    Returns:
        The layouts; by step the bytes of this rank, and the collectives.
    """
    with limited(limits):
        engine = zero_jobs.build(ds_config, shapes)
    optimizer, calls = fira_of(engine), []
    with counted(optimizer, calls) as sent:
        for tokens in zero_jobs.batches(steps, optimizer.communicator.dp_rank):
            sent.append(0)
            calls.append(0)
            engine.backward(engine(tokens))
            engine.step()
    layouts = optimizer.layouts
    engine.destroy()
    return layouts, sent, calls
