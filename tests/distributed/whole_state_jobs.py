"""What the ranks of a test pool run to bring a training from ZeRO to FSDP2 and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import ds_fira
from ds_fira.optim.registry import fira_of
from tests.distributed.fsdp_jobs import groups_of, model_of, shard, states_of, whole
from tests.distributed.zero_jobs import batches, build, config


def _engine(stage: int, params: dict[str, Any], shapes: list[tuple[int, int]]) -> Any:
    return build(config(stage, "fp32", params), shapes, model=model_of("net", shapes))


def zero_to_fsdp_and_back(shapes: list[tuple[int, int]], params: dict[str, Any], folder: str) -> dict[str, Any]:
    """Three steps at ZeRO-2, three under FSDP2, three at ZeRO-1, by checkpoints and whole state dicts.

    Returns:
        `zero`, `fsdp`: states by name as each of the first two had them at its end, `taken`, `back`: as the next had
        them at its start; `weights`: at these four times; `gradients`: of the steps under FSDP2; `settings`: of its
        groups, with names.
    """
    rank, found = torch.distributed.get_rank(), dict[str, Any](weights=[])

    def note(model: torch.nn.Module) -> None:
        found["weights"].append({name: whole(param) for name, param in model.named_parameters()})

    engine = _engine(2, params, shapes)
    for tokens in batches(3, rank):
        engine.backward(engine(tokens))
        engine.step()
    found["zero"] = low_rank_of(engine, engine.module)
    note(engine.module)
    engine.save_checkpoint(folder, tag="zero")

    # By way of stage 0, whose ranks have all of it.
    engine = _engine(0, params, shapes)
    engine.load_checkpoint(folder, tag="zero")
    weights, state = engine.module.state_dict(), ds_fira.whole_state_dict(engine)
    if rank == 0:
        torch.save({"weights": weights, "state": state}, Path(folder) / "whole.pt")
    torch.distributed.barrier()
    saved = torch.load(Path(folder) / "whole.pt", weights_only=True)
    model = model_of("net", shapes)
    model.load_state_dict(saved["weights"])
    fira = ds_fira.FiraAdam(shard(model), **params)
    fira.load_state_dict(saved["state"])
    note(model)
    owners = {id(param): name for name, param in model.named_parameters()}
    found["taken"] = states_of(fira, owners)
    found["gradients"] = []
    for tokens in batches(6, rank)[3:]:
        model(tokens).backward()
        found["gradients"].append({name: whole(param.grad) for name, param in model.named_parameters()})
        fira.step()
        fira.zero_grad()
    found["fsdp"] = states_of(fira, owners)
    found["groups"] = groups_of(fira, owners)
    note(model)

    state, weights = ds_fira.whole_state_dict(fira), found["weights"][-1]
    engine = _engine(0, params, shapes)
    engine.module.load_state_dict(weights)
    fira_of(engine).load_state_dict(state)
    engine.save_checkpoint(folder, tag="back")
    engine = _engine(1, params, shapes)
    engine.load_checkpoint(folder, tag="back")
    found["back"] = low_rank_of(engine, engine.module)
    note(engine.module)
    return found


def low_rank_of(engine: Any, module: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The states of an engine's projected parameters by name."""
    found = {}
    for name, param in module.named_parameters():
        if name.startswith("layers"):
            state = ds_fira.low_rank_state(engine, param)
            found[name] = {
                "step": state.step,
                "refresh_step": state.refresh_step,
                "basis": state.basis,
                "residual_norm": state.residual_norm,
                **state.moments,
            }
    return found
