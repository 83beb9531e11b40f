"""A run of torch's AdamW in DeepSpeed, saved on some ranks, for FiraAdam to go on from, and the way back."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tests.distributed.resize_jobs import ROWS, advance, module_weights
from tests.distributed.zero_jobs import Net, build


def adam_config(ds_config: dict[str, Any], **params: Any) -> dict[str, Any]:
    """The same config with torch's AdamW."""
    values = {"lr": ds_config["optimizer"]["params"]["lr"], "torch_adam": True, **params}
    return {**ds_config, "optimizer": {"type": "AdamW", "params": values}}


def groups_of(model: Net) -> list[dict[str, Any]]:
    """Two groups, as they decay and do not, for a run whose groups are the user's."""
    decayed = [param for param in model.parameters() if param.ndim > 1]
    return [{"params": decayed}, {"params": [param for param in model.parameters() if param.ndim < 2]}]


def adam(
    ds_config: dict[str, Any],
    shapes: list[tuple[int, int]],
    first: int,
    last: int,
    load: str | None = None,
    save: str | None = None,
    seed: int = 0,
    groups: bool = False,
    load_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train with AdamW from one step to another; returns losses, weights, rates, counts, and the loss after these."""
    ds_config = {**ds_config, "train_micro_batch_size_per_gpu": ROWS // torch.distributed.get_world_size()}
    torch.manual_seed(seed)
    model = Net(shapes)
    model.register_buffer("counted", torch.full((3,), float(seed)))
    kwargs: dict[str, Any] = {"model_parameters": groups_of(model)} if groups else {}
    kwargs["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
    engine = build(ds_config, shapes, model=model, **kwargs)
    try:
        client_state = engine.load_checkpoint(load, **(load_options or {}))[1] if load else {}
        losses = advance(engine, first, last)
    except Exception as error:
        engine.destroy()
        return {"error": f"{type(error).__name__}: {error}"}
    if save is not None:
        engine.save_checkpoint(save, client_state={"note": "kept"})
    optimizer = engine.basic_optimizer
    result = {
        "error": "",
        "losses": losses,
        "weights": module_weights(engine),
        "lr": [group["lr"] for group in optimizer.param_groups],
        "counts": sorted({int(state["step"]) for state in optimizer.state.values() if "step" in state}),
        "steps": engine.global_steps,
        "client_state": client_state,
        "type": type(optimizer).__name__,
    }
    result["next_loss"] = advance(engine, last, last + 1)[0]
    engine.destroy()
    return result


def said_of_load(ds_config: dict[str, Any], shapes: list[tuple[int, int]], load: str) -> list[str]:
    """The warnings of a load."""
    model = Net(shapes)
    model.register_buffer("counted", torch.zeros(3))
    engine = build(ds_config, shapes, model=model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.load_checkpoint(load)
    engine.destroy()
    return [str(warning.message) for warning in caught]
