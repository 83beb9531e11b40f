"""A run of the released code, and its continuation through a DeepSpeed engine with FiraAdam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ds_fira
from tests.distributed.resize_jobs import ROWS, advance, module_weights, rows
from tests.distributed.zero_jobs import Net, build


def released_groups(model: Net, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of the released scripts: the rest first, then the projected weights."""
    chosen = [layer.weight for layer in model.layers]
    rest = [param for param in model.parameters() if all(param is not other for other in chosen)]
    return [{"params": rest}, {"params": chosen, **settings}]


def released_run(kind: str, shapes: list[tuple[int, int]], steps: int, stop: int, settings: dict[str, Any]) -> Any:
    """Train with `fira` or `galore_torch`; its state dict and the weights at `stop`, and its losses."""
    if kind == "fira":
        from fira import FiraAdamW as AdamW
    else:
        from galore_torch import GaLoreAdamW as AdamW
    torch.manual_seed(0)
    model = Net(shapes)
    optimizer = AdamW(released_groups(model, settings), lr=0.01, weight_decay=0.1)
    losses, state, weights = [], None, None
    for step in range(steps):
        if step == stop:
            weights = {name: param.detach().clone() for name, param in model.named_parameters()}
            state = optimizer.state_dict()
            state = {**state, "state": {k: {n: _copied(v) for n, v in s.items()} for k, s in state["state"].items()}}
        loss = model(rows(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return state, weights, losses, {name: param.detach() for name, param in model.named_parameters()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if hasattr(value, "ortho_matrix"):
        other = type(value)(value.rank, update_proj_gap=value.update_proj_gap, proj_type=value.proj_type)
        other.ortho_matrix = value.ortho_matrix.clone()
        return other
    return value


def continued(
    kind: str,
    ds_config: dict[str, Any],
    shapes: list[tuple[int, int]],
    steps: int,
    stop: int,
    settings: dict[str, Any],
    by_name: bool = False,
    drop: int = 0,
) -> dict[str, Any]:
    """Stop the released code and go on under DeepSpeed; returns both ends, or the `error`."""
    state, weights, losses, expected = released_run(kind, shapes, steps, stop, settings)
    size = torch.distributed.get_world_size()
    model = Net(shapes)
    model.load_state_dict(weights)
    groups: list[Any] = released_groups(model, {})
    if by_name:
        names = {id(param): name for name, param in model.named_parameters()}
        groups = [[names[id(param)] for param in group["params"]] for group in groups]
    ds_config = {**ds_config, "train_micro_batch_size_per_gpu": ROWS // size}
    engine = build(ds_config, shapes, model=model)
    try:
        ds_fira.load_released_state(engine, state, groups[drop:])
    except ValueError as error:
        engine.destroy()
        return {"error": str(error)}
    found = advance(engine, stop, steps)
    result = {"error": "", "losses": found, "expected_losses": losses[stop:], "expected": expected}
    result["weights"] = module_weights(engine)
    engine.destroy()
    return result


def bad_on_one_rank(
    ds_config: dict[str, Any], shapes: list[tuple[int, int]], settings: dict[str, Any], kind: str
) -> str:
    """What a load says where rank 1 alone has a damaged state."""
    state, weights, _, _ = released_run("fira", shapes, 3, 2, settings)
    model = Net(shapes)
    model.load_state_dict(weights)
    groups = released_groups(model, {})
    engine = build({**ds_config, "train_micro_batch_size_per_gpu": 6}, shapes, model=model)
    if torch.distributed.get_rank() == 1:
        first = state["state"][state["param_groups"][0]["params"][0]]
        if kind == "nan":
            first["exp_avg"].fill_(float("nan"))
        else:
            state["state"][state["param_groups"][0]["params"][0]] = [3]
    try:
        ds_fira.load_released_state(engine, state, groups)
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""
