"""What ranks run for tests/distributed/test_param_states.py: states, weights and gradients of single parameters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from torch import Tensor

import ds_fira
from tests.distributed.zero_jobs import Net, batches, build, config

# Even numbers of elements: DeepSpeed cannot set a weight or a gradient of 35 on two ranks at stage 3.
SHAPES = [(8, 6), (6, 12), (8, 6), (5, 8)]
PROJECTED = tuple(f"layers.{number}.weight" for number in range(len(SHAPES)))
KEYS = ("exp_avg", "exp_avg_sq")
PARAMS = {"lr": 0.01, "rank": 2, "update_proj_gap": 2}


def make(kind: str, stage: int, dtype: str, params: dict[str, Any], **extra: Any) -> Any:
    """An engine around `Net`, of FiraAdam or of torch's AdamW; the parameters in one group."""
    torch.manual_seed(0)
    ds_config = config(stage, dtype, params, **extra)
    ds_config["optimizer"]["type"] = kind
    model = Net(SHAPES)
    model.norm.bias.requires_grad_(False)
    return build(ds_config, SHAPES, model=model)


def value_for(param: Tensor, number: int) -> Tensor:
    """Values to set, the same on every rank, at least 0 and exact in bfloat16."""
    shape = getattr(param, "ds_shape", param.shape)
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 64, tuple(shape), generator=generator).float() / 64


def backward(engine: Any, number: int) -> None:
    """Gradients of one batch."""
    engine.backward(engine(batches(number + 1, torch.distributed.get_rank())[number]))


def probe(kind: str, stage: int, dtype: str, **extra: Any) -> dict[str, Tensor]:
    """Ask for everything and set everything, around steps with a rate of 0, in which both optimizers see the same."""
    params = {"lr": 0.0, "weight_decay": 0.0, "betas": [0.9, 0.99]}
    params |= {"rank": 2, "update_proj_gap": 2} if kind == "FiraAdam" else {"torch_adam": True}
    engine = make(kind, stage, dtype, params, **extra)
    named = {name: param for name, param in engine.module.named_parameters() if param.requires_grad}
    plain = [name for name in named if name not in PROJECTED]
    found: dict[str, Tensor] = {}

    def see(what: str, name: str, value: Tensor) -> None:
        found[f"{what} {name}"] = value.detach().clone()

    backward(engine, 0)
    frozen = engine.module.norm.bias
    assert safe_get_full_fp32_param(frozen) is safe_get_full_grad(frozen) is None
    assert safe_get_full_optimizer_state(frozen, "exp_avg") is None
    for name, param in named.items():
        see("weight", name, safe_get_full_fp32_param(param))
        see("grad", name, safe_get_full_grad(param))
        if stage == 3:
            see("local weight", name, safe_get_local_fp32_param(param))
            see("local grad", name, safe_get_local_grad(param))
    engine.step()
    for key in KEYS:
        for name in plain:
            see(key, name, safe_get_full_optimizer_state(named[name], key))
            if stage == 3:
                see(f"local {key}", name, safe_get_local_optimizer_state(named[name], key))
    # What is set is there, and the next step goes on from it.
    backward(engine, 1)
    for number, (name, param) in enumerate(named.items()):
        safe_set_full_grad(param, value_for(param, number))
        see("set grad", name, safe_get_full_grad(param))
        safe_set_full_fp32_param(param, value_for(param, 100 + number))
        see("set weight", name, safe_get_full_fp32_param(param))
    for number, key in enumerate(KEYS):
        for name in plain:
            safe_set_full_optimizer_state(named[name], value_for(named[name], 200 + number), key)
            see(f"set {key}", name, safe_get_full_optimizer_state(named[name], key))
    engine.step()
    for name in plain:
        for key in KEYS:
            see(f"next {key}", name, safe_get_full_optimizer_state(named[name], key))
    with deepspeed.zero.GatheredParameters(list(named.values())):
        for name, param in named.items():
            see("next weight", name, param.float())
    if stage == 3:
        _probe_local(engine, named, plain, see)
    with contextlib.suppress(ImportError):  # from 0.18 on
        from deepspeed.utils import safe_update_full_grad_vectorized

        backward(engine, 3)
        safe_update_full_grad_vectorized(list(named.values()), lambda grad, _: torch.full_like(grad, 0.25))
        for name, param in named.items():
            see("vector grad", name, safe_get_full_grad(param))
        engine.step()
        for name in plain:
            see("vector exp_avg", name, safe_get_full_optimizer_state(named[name], "exp_avg"))
    engine.destroy()
    return found


def _probe_local(engine: Any, named: dict[str, Tensor], plain: Iterable[str], see: Any) -> None:
    backward(engine, 2)
    for name, param in named.items():
        for get, put in (
            (safe_get_local_fp32_param, safe_set_local_fp32_param),
            (safe_get_local_grad, safe_set_local_grad),
        ):
            put(param, torch.full_like(get(param), 0.5))
            see(f"set {get.__name__}", name, get(param))
    for name in plain:
        for key in KEYS:
            local = safe_get_local_optimizer_state(named[name], key)
            safe_set_local_optimizer_state(named[name], torch.full_like(local, 0.5), key)
            see(f"set local {key}", name, safe_get_local_optimizer_state(named[name], key))
    engine.step()
    for name in plain:
        see("then exp_avg", name, safe_get_full_optimizer_state(named[name], "exp_avg"))


def beside_adamw(stage: int, dtype: str, **extra: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """By what was asked, what FiraAdam's engine and AdamW's answered."""
    ours, theirs = (probe(kind, stage, dtype, **extra) for kind in ("FiraAdam", "AdamW"))
    assert ours.keys() == theirs.keys()
    return {what: (ours[what], theirs[what]) for what in ours}


def refusals(stage: int) -> dict[str, str]:
    """What is said of parameters and states that there are not; every rank goes on, and the next step works."""
    engine = make("FiraAdam", stage, "fp32", PARAMS)
    backward(engine, 0)
    engine.step()
    named, norm = dict(engine.module.named_parameters()), engine.module.norm.weight
    projected, said = named[PROJECTED[0]], {}
    state = ds_fira.low_rank_state(engine, projected)
    stranger = torch.nn.Parameter(torch.zeros(3, 4))
    calls = {
        "norm": lambda: ds_fira.low_rank_state(engine, norm),
        "stranger": lambda: ds_fira.low_rank_state(engine, stranger),
        "name": lambda: ds_fira.low_rank_state(engine, "layers.9.weight"),
        "other shape": lambda: ds_fira.set_low_rank_state(engine, PROJECTED[1], state),
        "no moment": lambda: ds_fira.set_low_rank_state(engine, projected, dataclasses.replace(state, moments={})),
    }
    if stage > 0:
        value = torch.zeros(SHAPES[0])
        calls |= {
            "get": lambda: safe_get_full_optimizer_state(projected, "exp_avg"),
            "set": lambda: safe_set_full_optimizer_state(projected, value, "exp_avg"),
            "key": lambda: safe_get_full_optimizer_state(norm, "momentum"),
            "size": lambda: safe_set_full_optimizer_state(norm, value, "exp_avg"),
        }
    if stage == 3:
        calls |= {
            "get local": lambda: safe_get_local_optimizer_state(projected, "exp_avg"),
            "set local": lambda: safe_set_local_optimizer_state(projected, value, "exp_avg"),
            "size local": lambda: safe_set_local_optimizer_state(norm, value, "exp_avg"),
        }
    for name, call in calls.items():
        try:
            call()
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    backward(engine, 1)
    engine.step()
    engine.destroy()
    return said


def before_the_first_step(stage: int) -> bool:
    """States are there to be read, and to be set, before there was a step."""
    engine = make("FiraAdam", stage, "fp32", PARAMS)
    norm, projected = engine.module.norm.weight, PROJECTED[0]
    state = ds_fira.low_rank_state(engine, projected)
    fine = int(state.refresh_step) == -1 and not state.exp_avg.any()
    if stage > 0:
        fine = fine and not safe_get_full_optimizer_state(norm, "exp_avg").any()
        safe_set_full_optimizer_state(norm, value_for(norm, 1), "exp_avg")
        fine = fine and torch.equal(safe_get_full_optimizer_state(norm, "exp_avg"), value_for(norm, 1))
    ds_fira.set_low_rank_state(engine, projected, dataclasses.replace(state, step=state.step + 4))
    fine = fine and int(ds_fira.low_rank_state(engine, projected).step) == 4
    engine.destroy()
    return bool(fine)


def odd_places(stage: int, **extra: Any) -> bool:
    """Moments are set and read where DeepSpeed's functions for weights and gradients fail, with AdamW too."""
    engine = build(config(stage, "fp32", PARAMS, **extra), SHAPES, model=Net(SHAPES, width=5))
    names = ("norm.weight", "norm.bias", "embedding.weight", "lm_head.weight")
    params = [dict(engine.module.named_parameters())[name] for name in names]
    backward(engine, 0)
    engine.step()
    for number, param in enumerate(params):
        safe_set_full_optimizer_state(param, value_for(param, number), "exp_avg")
    found = [safe_get_full_optimizer_state(param, "exp_avg") for param in params]
    engine.destroy()
    return all(
        torch.equal(value, value_for(param, n)) for n, (value, param) in enumerate(zip(found, params, strict=True))
    )
