"""What ranks run for tests/distributed/test_param_states.py: low-rank states read as whole, and carried by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

import ds_fira
from ds_fira.engine.deepspeed.save_load.load import write_back
from ds_fira.optim.registry import fira_of
from tests.distributed.state_jobs import KEYS, PARAMS, PROJECTED, SHAPES, backward, make, value_for
from tests.distributed.zero_jobs import ExpertNet, Net, batches, build, config


def plain(state: ds_fira.LowRankState) -> dict[str, Any]:
    """A state as values that ranks can send."""
    return dataclasses.asdict(state)


def gathered(stage: int, experts: bool = False, **params: Any) -> dict[str, dict[str, Any]]:
    """The low-rank states of every projected parameter after three steps, at a rate of 0, where all stages agree."""
    # An expert sees one or two tokens, so that of its gradient only one direction is sure to be there.
    ds_config = config(stage, "fp32", PARAMS | {"lr": 0.0} | ({"rank": 1} if experts else {}) | params)
    torch.manual_seed(0)
    engine = build(ds_config, SHAPES, model=ExpertNet() if experts else Net(SHAPES))
    for number in range(3):
        backward(engine, number)
        engine.step()
    names = [record.name for record in fira_of(engine).inventory if record.rank is not None]
    named = dict(engine.module.named_parameters())
    found = {name: plain(ds_fira.low_rank_state(engine, named[name])) for name in names}
    if stage == 0 and not experts:
        # Whole and in its plain form there: what is read is what is kept.
        for name in names:
            kept = fira_of(engine).state[named[name]]
            for key in ("basis", "step", "refresh_step", "residual_norm"):
                assert torch.equal(kept[key].to(found[name][key].dtype), found[name][key])
            for key in KEYS:
                assert torch.equal(kept[key], found[name]["moments"][key])
    engine.destroy()
    return found


def transplant(
    stages: tuple[int, int],
    params: tuple[dict[str, Any], dict[str, Any]],
    second_extra: dict[str, Any] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Carry weights and low-rank states from one engine to another by hand; what both have after a step."""
    extras = {}, second_extra or {}
    first, second = (
        make("FiraAdam", stage, "fp32", PARAMS | own, **extra)
        for stage, own, extra in zip(stages, params, extras, strict=True)
    )
    for number in range(3):
        backward(first, number)
        first.step()
    other = dict(second.module.named_parameters())
    # A step, so that its flat weights are not the first engine's.
    backward(second, 7)
    second.step()
    for name, param in first.module.named_parameters():
        if not param.requires_grad:
            continue
        whole = _weight(first, param)
        _set_weight(second, other[name], whole)
        if name in PROJECTED:
            state = ds_fira.low_rank_state(first, param)
            ds_fira.set_low_rank_state(second, other[name], state)
            again = ds_fira.low_rank_state(second, name)
            assert torch.equal(again.basis, state.basis)
            assert all(torch.equal(again.moments[key], state.moments[key]) for key in KEYS)
    write_back(second)
    losses = []
    for engine in (first, second):
        losses.append(engine(batches(4, torch.distributed.get_rank())[3]))
        engine.backward(losses[-1])
        engine.step()
    pairs = {
        name: [_weight(first, param), _weight(second, other[name])]
        for name, param in first.module.named_parameters()
        if name in PROJECTED
    }
    # What a difference of weights comes from: the batch's loss, R by its moments, or the rest of the step.
    before = {"loss": [loss.detach() for loss in losses]}
    for name in PROJECTED:
        states = [ds_fira.low_rank_state(engine, name) for engine in (first, second)]
        before |= {f"{key} of {name}": [state.moments[key] for state in states] for key in KEYS}
        before[f"residual norm of {name}"] = [state.residual_norm for state in states]
    pairs = before | pairs
    first.destroy()
    second.destroy()
    return pairs


def _weight(engine: Any, param: Tensor) -> Tensor:
    return param.detach().clone() if engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param(param)


def _set_weight(engine: Any, param: Tensor, value: Tensor) -> None:
    if engine.zero_optimization_stage() == 0:
        param.data.copy_(value)
    else:
        safe_set_full_fp32_param(param, value)


def round_trip(stage: int, dtype: str, experts: bool, **extra: Any) -> bool:
    """Every state is set to another one, and read again; the engine steps on from it."""
    torch.manual_seed(0)
    model = ExpertNet() if experts else Net(SHAPES)
    engine = build(config(stage, dtype, PARAMS, **extra), SHAPES, model=model)
    for number in range(2):
        backward(engine, number)
        engine.step()
    for record in [record for record in fira_of(engine).inventory if record.rank is not None]:
        state = ds_fira.low_rank_state(engine, record.name)
        moments = {key: value * 2 for key, value in state.moments.items()}
        other = dataclasses.replace(state, moments=moments, basis=-state.basis, step=state.step + 1)
        ds_fira.set_low_rank_state(engine, record.name, other)
        again = ds_fira.low_rank_state(engine, record.name)
        pairs = [(again.basis, other.basis), (again.step, other.step), (again.residual_norm, other.residual_norm)]
        pairs += [(again.moments[key], moments[key]) for key in KEYS]
        if not all(torch.equal(*pair) and pair[0].any() for pair in pairs):
            return False
    backward(engine, 2)
    engine.step()
    counted = int(ds_fira.low_rank_state(engine, record.name).step.max())
    engine.destroy()
    return counted == 4


def rounded(state_dtype: str) -> dict[str, float]:
    """What is set comes back within the rounding of the stored form, and what lies beside it is as it was."""
    # Enough elements for the moments of what is not projected to be coded too.
    ds_config = config(2, "fp32", PARAMS | {"state_dtype": state_dtype})
    torch.manual_seed(0)
    engine = build(ds_config, SHAPES, model=Net(SHAPES, vocabulary=1500))
    for number in range(2):
        backward(engine, number)
        engine.step()
    first, second = (ds_fira.low_rank_state(engine, name) for name in PROJECTED[:2])
    moments = {key: value * 3 for key, value in first.moments.items()}
    ds_fira.set_low_rank_state(engine, PROJECTED[0], dataclasses.replace(first, moments=moments))
    now, beside = (ds_fira.low_rank_state(engine, name) for name in PROJECTED[:2])
    assert all(torch.equal(beside.moments[key], second.moments[key]) for key in KEYS)
    assert now.basis.dtype == now.exp_avg.dtype == torch.float32
    off = {key: float((now.moments[key] - moments[key]).abs().max() / moments[key].abs().max()) for key in KEYS}
    head = engine.module.lm_head.weight
    value = value_for(head, 5)
    safe_set_full_optimizer_state(head, value, "exp_avg")
    held = {state["exp_avg"].dtype for state in fira_of(engine).state.values() if "exp_avg" in state}
    assert torch.float32 not in held
    off["head"] = float((safe_get_full_optimizer_state(head, "exp_avg") - value).abs().max())
    engine.destroy()
    return off
