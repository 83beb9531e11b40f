"""What the ranks of a test pool run where states leave the device of their parameters between two steps."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.runtime.zero.offload_states import get_state_devices
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, distributed

from ds_fira.optim.moving import move_states
from ds_fira.optim.registry import fira_of
from tests.distributed.probes import stepped_and_states
from tests.distributed.zero_jobs import batches, build

STATES = OffloadStateTypeEnum.optim_states
STEPS = 5


def _train(engine: Any, between: Any = lambda _: None) -> tuple[list[Tensor], list[float]]:
    losses = []
    for tokens in batches(STEPS, distributed.get_rank()):
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        between(engine)
    return [tensor.clone() for tensor in stepped_and_states(engine)], losses


def offload_and_reload(
    ds_config: dict[str, Any], shapes: list[tuple[int, int]], include: list[str] | None, **how: bool
) -> dict[str, Any]:
    """A training whose states are offloaded and reloaded behind every step, beside one where they stay.

    Returns:
        `same`: whether weights, states and losses are the same to the bit; `devices` of the states as DeepSpeed says
        them; `offloaded`: what it noted to be away; `weights`, `moments`: whether DeepSpeed's functions give them.
    """
    whole = build(ds_config, shapes)
    expected = _train(whole)
    whole.destroy()
    found: dict[str, Any] = {"devices": set()}
    named = None if include is None else [OffloadStateTypeEnum(name) for name in include]

    def away_and_back(engine: Any) -> None:
        engine.offload_states(include=named, **how)
        found["offloaded"] = sorted(state.value for state in engine.optimizer.offloaded_states)
        if engine.zero_optimization_stage() == 3 and STATES in engine.optimizer.offloaded_states:
            found["devices"] |= {str(device) for device in get_state_devices(engine, STATES)}
        engine.reload_states(non_blocking=how.get("non_blocking", False))
        assert not engine.optimizer.offloaded_states

    engine = build(ds_config, shapes)
    states, losses = _train(engine, away_and_back)
    found["same"] = losses == expected[1] and all(map(torch.equal, states, expected[0])) and len(states) > 0
    params = dict(engine.module.named_parameters())
    found["weights"] = all(bool(safe_get_full_fp32_param(param).any()) for param in params.values())
    found["moments"] = bool(safe_get_full_optimizer_state(params["lm_head.weight"], "exp_avg").any())
    engine.destroy()
    return found


def other_memory(ds_config: dict[str, Any], shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """A training whose states get other memory behind every step, as on another device; what was there is spoiled.

    Returns:
        `same`: as above; `alive`: how many of the tensors that were replaced somebody still has; `replaced`: how many.
    """
    whole = build(ds_config, shapes)
    expected = _train(whole)
    whole.destroy()
    counts = {"alive": 0, "replaced": 0}

    def move(engine: Any) -> None:
        before = move_states(fira_of(engine), torch.clone)
        for value in before:
            value.fill_(math.nan if value.is_floating_point() else torch.iinfo(value.dtype).max)
        counts["replaced"] += len(before)
        tensors = [weakref.ref(value) for value in before]
        del before, value
        gc.collect()
        counts["alive"] += sum(each() is not None for each in tensors)

    engine = build(ds_config, shapes)
    states, losses = _train(engine, move)
    same = losses == expected[1] and all(map(torch.equal, states, expected[0])) and len(states) > 0
    engine.destroy()
    return {"same": same, **counts}
