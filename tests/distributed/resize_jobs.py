"""Trainings whose batches do not depend on the number of ranks, saved on some and taken up on others."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor

from ds_fira.checkpoint.atomic_save import CheckpointError
from ds_fira.optim.registry import fira_of
from tests.distributed.zero_jobs import Net, build

ROWS = 12  # divides by 1, 2, 3 and 4 ranks


def rows(step: int) -> Tensor:
    """The tokens of one step, of all ranks, (12, 5)."""
    return torch.randint(0, 11, (ROWS, 5), generator=torch.Generator().manual_seed(step))


def advance(engine: Any, first: int, last: int) -> list[float]:
    """Train from one step to another; returns the mean losses of all rows."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in range(first, last):
        loss = engine(rows(step).view(size, ROWS // size, 5)[rank])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / size)
    return losses


def run(
    ds_config: dict[str, Any],
    shapes: list[tuple[int, int]],
    first: int,
    last: int,
    load: str | None = None,
    save: str | None = None,
    save_at: int | None = None,
    seed: int = 0,
    scheduler: bool = False,
    groups: bool = False,
    frozen: str | None = None,
    load_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a part of a run.

    Args:
        ds_config: DeepSpeed config; the micro-batch size is set here.
        shapes: of the linear layers.
        first: the step to begin with.
        last: the step to end before.
        load: folder of the checkpoint to begin from.
        save: folder to save into.
        save_at: the step to do so before; by default at the end.
        seed: of the weights, which a load replaces.
        scheduler: whether a LambdaLR goes with it, whose lists are as long as the param groups.
        groups: whether the user makes two groups of their own.
        frozen: name of a parameter that is not trained.
        load_options: for `load_checkpoint`.

    Returns:
        `losses`, `weights` of the module, `lr` by parameter, `canonical` (see there), `error` of the load.
    """
    ds_config = {**ds_config, "train_micro_batch_size_per_gpu": ROWS // torch.distributed.get_world_size()}
    torch.manual_seed(seed)
    model = Net(shapes)
    model.register_buffer("counted", torch.full((3,), float(seed)))
    kwargs: dict[str, Any] = {"model": model}
    if frozen is not None:
        model.get_parameter(frozen).requires_grad_(False)
    if groups:
        chosen = [model.layers[0].weight, model.layers[1].weight, model.norm.weight]
        others = [p for p in model.parameters() if p.requires_grad and all(p is not other for other in chosen)]
        kwargs["model_parameters"] = [{"params": chosen, "lr": 0.02, "name": "first"}, {"params": others}]
    if scheduler:
        kwargs["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
    engine = build(ds_config, shapes, seed=seed, **kwargs)
    result: dict[str, Any] = {"error": ""}
    try:
        if load is not None:
            path, client_state = engine.load_checkpoint(load, **(load_options or {}))
            assert path is not None
            result["client_state"] = client_state
            result["steps"] = engine.global_steps
        save_at = last if save_at is None else save_at
        result["losses"] = advance(engine, first, save_at)
    except (ValueError, CheckpointError) as error:
        engine.destroy()
        return {"error": str(error)}
    if save is not None:
        engine.save_checkpoint(save, client_state={"note": "kept"})
    result["losses"] += advance(engine, save_at, last)
    result["weights"] = module_weights(engine)
    result["lr"] = lr_by_parameter(engine)
    params = ds_config["optimizer"]["params"]
    result["settings"] = {key: value for key, value in fira_of(engine).param_groups[0].items() if key in params}
    result["wrapper"] = type(engine.optimizer).__name__
    result["ways"] = [matrix.way for layout in fira_of(engine).layouts for matrix in layout.split]
    engine.destroy()
    return result


def module_weights(engine: Any) -> dict[str, Tensor]:
    """The module's parameters and buffers, whole, under any stage."""
    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params):
        return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


def lr_by_parameter(engine: Any) -> dict[str, float]:
    """The learning rate of every parameter."""
    optimizer = fira_of(engine)
    return {
        name: group["lr"]
        for group, members in zip(optimizer.param_groups, optimizer.members, strict=True)
        for name, _ in members
    }
