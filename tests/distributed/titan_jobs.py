"""What ranks run with torchtitan's own containers of optimizers and schedulers: the lines of docs/fsdp.md."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from tests.distributed.fsdp_jobs import model_of, shard, whole
from tests.distributed.zero_jobs import batches

STEPS, SAVED = 5, 3


def _containers(library: str, page: str) -> dict[str, Any]:
    """What the page's block defines, with torchtitan from a folder of its own."""
    if library not in sys.path:
        sys.path.insert(0, library)
    names: dict[str, Any] = {}
    exec(page, names)
    return names


def _whole(states: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {
        (part, name): whole(value) if isinstance(value, torch.Tensor) else value
        for part, values in states.items()
        for name, value in values.items()
    }


def train(
    library: str, page: str, shapes: list[tuple[int, int]], save: str | None = None, load: str | None = None
) -> dict[str, Any]:
    """Train a sharded model; returns weights, losses, what was saved or loaded, and learning rates."""
    names = _containers(library, page)
    from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

    model = shard(model_of("net", shapes))
    settings = {"lr": 0.01, "update_proj_gap": 2, "weight_decay": 0.1}
    groups = [
        ParamGroupConfig(pattern=pattern, optimizer_name="FiraAdam", optimizer_kwargs={**settings, **rank})
        for pattern, rank in ((r"layers\..*weight$", {"rank": 3}), (".*", {}))
    ]
    config = names["FiraOptimizers"].Config(param_groups=groups, implementation="for-loop")
    optimizers = config.build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=STEPS)
    first, losses, carried = 0, [], {}
    if load is not None:
        first = SAVED
        states = {"model": model.state_dict(), "optim": optimizers.state_dict(), "schedule": schedulers.state_dict()}
        dcp.load(states, checkpoint_id=load)
        model.load_state_dict(states["model"])
        optimizers.load_state_dict(states["optim"])
        schedulers.load_state_dict(states["schedule"])
        carried = _whole({"model": model.state_dict(), "optim": optimizers.state_dict()})
    data = batches(STEPS, torch.distributed.get_rank())
    for step in range(first, STEPS):
        if save is not None and step == SAVED:
            states = {"model": model.state_dict(), "optim": optimizers.state_dict()}
            carried = _whole(states)
            dcp.save({**states, "schedule": schedulers.state_dict()}, checkpoint_id=save)
        loss = model(data[step])
        loss.backward()
        losses.append(loss.item())
        optimizers.step()
        schedulers.step()
        optimizers.zero_grad()
    weights = {name: whole(param) for name, param in model.named_parameters()}
    (fira,) = optimizers
    return {
        "weights": weights,
        "carried": carried,
        "losses": losses,
        "kind": type(fira).__name__,
        "metrics": schedulers.get_metrics(),
    }
