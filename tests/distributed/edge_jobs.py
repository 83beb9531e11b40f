"""What ranks run for tests/distributed/test_edges.py."""

from __future__ import annotations

import torch
from torch import nn

import ds_fira
from tests.distributed.zero_jobs import Net, batches, build, config

SHAPES = [(6, 8)]


def train_with_an_empty_weight(stages: list[int]) -> list[list[float]]:
    """Losses of a model with a 0 x 6 weight, FiraAdam from the JSON and, at stage 0, as an object."""
    found = []
    for stage, as_object in [(stage, False) for stage in stages] + [(0, True)]:
        torch.manual_seed(0)
        model = Net(SHAPES)
        model.unused = nn.Linear(6, 0, bias=False)
        ds_config, kwargs = config(stage, "fp32", {"lr": 0.01, "rank": 2, "update_proj_gap": 2}), {}
        if as_object:
            del ds_config["optimizer"]
            kwargs["optimizer"] = ds_fira.FiraAdam(model, rank=2)
        engine, losses = build(ds_config, SHAPES, model=model, **kwargs), []
        for batch in batches(3, torch.distributed.get_rank()):
            loss = engine(batch) + engine.module.unused(torch.ones(6)).sum()
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        engine.destroy()
        found.append(losses)
    return found
