"""What the ranks of a test pool run at ZeRO-3: small trainings, and what lies where by DeepSpeed's own helpers."""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

import ds_fira
from ds_fira.engine.deepspeed.engine_memory import engine_bytes
from ds_fira.engine.deepspeed.flat_groups import flat_groups
from ds_fira.engine.deepspeed.holders import Holders
from ds_fira.optim.registry import fira_of
from ds_fira.optim.state_size import state_bytes
from tests.distributed.limits import limited
from tests.distributed.zero_jobs import ExpertNet, Net, batches, build, faulty

MODELS = {"net": Net, "experts": lambda shapes: ExpertNet()}


def model_of(kind: str, shapes: list[tuple[int, int]], ds_config: dict[str, Any], frozen: tuple[str, ...], init: bool):
    """A model, the same on every rank, its data already spread over them with `init`."""
    torch.manual_seed(0)
    if init:
        with deepspeed.zero.Init(config_dict_or_path=ds_config):
            model = MODELS[kind](shapes)
        # zero.Init broadcasts what rank 0 has made; every element is set again, so that a run can be repeated without.
        torch.manual_seed(0)
        values = dict(MODELS[kind](shapes).named_parameters())
        for name, param in model.named_parameters():
            with deepspeed.zero.GatheredParameters(param, modifier_rank=0):
                param.data.copy_(values[name])
    else:
        model = MODELS[kind](shapes)
    for name, param in model.named_parameters():
        param.requires_grad_(name not in frozen)
    return model


def train(limits: dict[str, int] | None = None, **kwargs: Any) -> dict[str, Any]:
    """`_train` with module attributes, by their full name, at other values."""
    with limited(limits or {}):
        return _train(**kwargs)


def _train(
    ds_config: dict[str, Any],
    shapes: list[tuple[int, int]],
    steps: int,
    kind: str = "net",
    frozen: tuple[str, ...] = (),
    init: bool = False,
    as_object: dict[str, Any] | None = None,
    faults: dict[int, tuple[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train at stage 3, recording the gradients that FiraAdam sees.

    Args:
        ds_config: DeepSpeed config.
        shapes: of the linear layers.
        steps: optimizer steps.
        kind: key of `MODELS`.
        frozen: names of parameters without gradient.
        init: whether the model is built inside `deepspeed.zero.Init`.
        as_object: settings for an optimizer object over `ds_fira.param_groups`, instead of the JSON type.
        faults: as in `tests.distributed.zero_jobs.train`.

    Returns:
        `gradients`: by step and parameter name this rank's slice; `start`, `end`: full master weights by name;
        `module`: full weights of the module; `groups`: settings and names by param group, in the order in which they
        are stepped; `numel`: by name (elements, shape); `pieces` as ds_fira reads them; `states`, `layouts`, `metrics`,
        `memory`, `held` (bytes by group), `sent` (bytes up to every step), `collectives`, `losses`, `state_devices`.
    """
    model = model_of(kind, shapes, ds_config, frozen, init)
    kwargs: dict[str, Any] = {}
    if as_object is not None:
        kwargs["optimizer"] = ds_fira.FiraAdam(ds_fira.param_groups(model, **as_object))
    engine = build(ds_config, shapes, model=model, **kwargs)
    optimizer, wrapper = fira_of(engine), engine.optimizer
    names = {id(param): name for name, param in engine.module.named_parameters()}
    flats = list(wrapper.fp32_partitioned_groups_flat)
    record: list[dict[str, Tensor]] = []

    def see(stepped: Any, args: Any, kwargs: Any) -> None:
        if stepped.suspended:
            return
        (flat,) = [param for group in stepped.param_groups for param in group["params"]]
        offset = 0
        for param in wrapper.fp16_groups[next(i for i, other in enumerate(flats) if other is flat)]:
            record[-1][names[id(param)]] = flat.grad[offset : offset + param.ds_tensor.ds_numel].clone()
            offset += param.ds_tensor.ds_numel

    optimizer.register_step_pre_hook(see)
    trained = [(name, param) for name, param in engine.module.named_parameters() if param.requires_grad]
    start = {name: safe_get_full_fp32_param(param).clone() for name, param in trained}
    accumulation = ds_config.get("gradient_accumulation_steps", 1)
    losses, sent = [], [optimizer.communicator.bytes_sent]
    named = dict(engine.module.named_parameters())
    for index, tokens in enumerate(batches(steps * accumulation, torch.distributed.get_rank())):
        if index % accumulation == 0:
            record.append({})
        name, value = (faults or {}).get(index // accumulation, (None, 0.0))
        fault = named[name].register_hook(functools.partial(faulty, value=value)) if name else None
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        sent.append(optimizer.communicator.bytes_sent)
        if fault is not None:
            fault.remove()
    end = {name: safe_get_full_fp32_param(param).clone() for name, param in trained}
    module = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(param):
            module[name] = param.detach().clone()
    states = [dict(optimizer.state[flat]) for flat in flats]
    result = {
        "wrapper": type(wrapper).__name__,
        "gradients": record,
        "start": start,
        "end": end,
        "module": module,
        "shapes": {name: tuple(param.ds_shape) for name, param in trained},
        "groups": [
            (
                {k: v for k, v in optimizer.param_groups[wrapper.sub_group_to_group_id[i]].items() if k != "params"},
                [names[id(param)] for param in params],
            )
            for i, params in enumerate(wrapper.fp16_groups)
        ],
        "states": states,
        "layouts": optimizer.layouts,
        "turns": max((len(layout.gathered_turns) for layout in optimizer.layouts), default=0),
        "metrics": ds_fira.metrics(engine),
        "memory": ds_fira.memory_report(engine),
        "held": state_bytes(optimizer),
        "sent": sent,
        "collectives": optimizer.communicator.collectives,
        "losses": losses,
        "state_devices": {value.device.type for state in states for value in state.values()},
        "inventory": [(record.name, record.shape, record.rank) for record in optimizer.inventory],
    }
    del optimizer
    engine.destroy()
    return result


def look_at_slices(ds_config: dict[str, Any], shapes: list[tuple[int, int]]) -> dict[str, bool]:
    """Compare what `FlatGroup.slices` says with the values that lie there.

    Returns:
        `all`: whether the slices of all ranks are every element of every parameter once; `same`: whether this rank's
        partitions hold the parameters' values there.
    """
    torch.manual_seed(0)
    model = Net(shapes)
    with torch.no_grad():  # no two elements alike, not in bf16 either
        first = 0
        for param in model.parameters():
            param.copy_((torch.arange(param.numel()) + first).view_as(param) % 251 + 1)
            first += param.numel() % 97
    engine = build(ds_config, shapes, model=model)
    ranks, own = torch.distributed.get_world_size(), torch.distributed.get_rank()
    every, same = True, True
    for group in flat_groups(engine.optimizer, Holders(engine).of):
        values = []
        for param in group.lp_params:
            with deepspeed.zero.GatheredParameters(param):
                values.append(param.detach().float().flatten().clone())
        names = {id(param): str(index) for index, param in enumerate(group.lp_params)}
        seen = [torch.zeros_like(value) for value in values]
        for rank in range(ranks):
            for held in group.slices(rank, names):
                seen[int(held.name)][held.start : held.stop] += 1
        every &= all(bool(count.eq(1).all()) for count in seen)
        for held in group.slices(own, names):
            there = group.hp_partition[held.offset : held.offset + held.stop - held.start].detach().float()
            same &= torch.equal(there, values[int(held.name)][held.start : held.stop])
    engine.destroy()
    return {"all": every, "same": same}


def bytes_of_engine(ds_config: dict[str, Any], shapes: list[tuple[int, int]]) -> tuple[dict[str, int], int]:
    """`engine_bytes` after a step and another backward pass, and the bytes of this rank's state."""
    engine = build(ds_config, shapes)
    first, second = batches(2, torch.distributed.get_rank())
    engine.backward(engine(first))
    engine.step()
    engine.backward(engine(second))
    found = engine_bytes(engine), state_bytes(fira_of(engine))
    engine.destroy()
    return found
