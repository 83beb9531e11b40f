"""What ranks run for tests/distributed/test_full_rank_engine.py: engines with matrices whose rank saves nothing."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

import ds_fira
from ds_fira.optim.registry import fira_of
from tests.distributed import rule_jobs
from tests.distributed.probes import states_of, stepped_and_states
from tests.distributed.zero_jobs import Net, batches, build, config

# At rank 8 all but the last are at full rank.
SHAPES = [(8, 6), (6, 12), (6, 6), (3, 40), (20, 16)]
PARAMS = {"lr": 0.01, "rank": 8, "update_proj_gap": 2, "alpha": 0.5, "weight_decay": 0.1, "exact_cuts": True}


def advance(engine: Any, first: int, last: int) -> None:
    """Steps `first` to `last` of a run."""
    for batch in batches(last, torch.distributed.get_rank())[first:]:
        engine.backward(engine(batch))
        engine.step()


def held(engine: Any) -> list[Tensor]:
    """Copies of what the engine's optimizer steps, and of its states."""
    return [tensor.clone() for tensor in stepped_and_states(engine)]


def copied_states(engine: Any) -> list[dict[str, Tensor]]:
    """Copies of the states, in the order of the stepped tensors."""
    return [{key: value.clone() for key, value in state.items()} for state in states_of(engine)]


def by_name(engine: Any) -> dict[str, Tensor]:
    """The module's weights, whole."""
    import deepspeed

    params = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())):
        return {name: param.detach().clone() for name, param in params.items()}


def projected(engine: Any) -> list[tuple[int, ...]]:
    """Shapes of the parameters that are projected."""
    return sorted(record.shape for record in fira_of(engine).inventory if record.rank is not None)


def resume_default(saved: dict[str, Any], resumed: dict[str, Any], folder: str) -> dict[str, Any]:
    """Save a run with one config, resume it with another; both go on for two steps, over a refresh."""
    whole = build(saved, SHAPES)
    advance(whole, 0, 3)
    whole.save_checkpoint(folder)
    advance(whole, 3, 5)
    expected, weights, before = held(whole), by_name(whole), projected(whole)
    whole.destroy()
    engine = build(resumed, SHAPES, seed=7)
    at_first = projected(engine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.load_checkpoint(folder)
    advance(engine, 3, 5)
    found, ours, after = held(engine), by_name(engine), projected(engine)
    engine.destroy()
    same = len(found) == len(expected) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )
    alike = all(torch.equal(ours[name], weights[name]) for name in weights)
    return {
        "same": same,
        "weights": alike,
        "projected": (before, at_first, after),
        "warned": [str(one.message) for one in caught if "project_full_rank" in str(one.message)],
    }


def resume_elsewhere(saved: dict[str, Any], resumed: dict[str, Any], folder: str) -> dict[str, Any]:
    """Save a run at one stage, load it at another, save that, and load it at the first again."""
    whole = build(saved, SHAPES)
    advance(whole, 0, 3)
    whole.save_checkpoint(folder + "/first")
    expected = by_name(whole)
    before = copied_states(whole)
    whole.destroy()
    between = build(resumed, SHAPES, seed=7)
    between.load_checkpoint(folder + "/first")
    there = projected(between)
    between.save_checkpoint(folder + "/second")
    between.destroy()
    back = build(saved, SHAPES, seed=8)
    back.load_checkpoint(folder + "/second")
    found = by_name(back)
    after = copied_states(back)
    back.destroy()
    return {
        "projected": there,
        "weights": all(torch.equal(found[name], expected[name]) for name in expected),
        "states": len(after) == len(before)
        and all(
            a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
            for a, b in zip(after, before, strict=True)
        ),
    }


def train_object(
    stage: int, scheduled: str | None = None, rule: str | None = None, about: str = "save nothing", **more: Any
) -> dict[str, Any]:
    """Train with an optimizer object whose one group has matrices of both kinds.

    Args:
        stage: of ZeRO.
        scheduled: what a scheduler is made of before the engine, "parts" or "user_groups".
        rule: the name of a plugged rule in FiraAdam's place.
        about: of what the warnings are that `warned` has.
        **more: settings.
    """
    torch.manual_seed(0)
    model = Net(SHAPES)
    matrices = [layer.weight for layer in model.layers]
    if rule is not None:
        for param in model.parameters():
            param.requires_grad_(any(param is matrix for matrix in matrices))
    kind = ds_fira.FiraAdam if rule is None else getattr(rule_jobs, rule)
    settings = {"rank": 8, "update_proj_gap": 2, "alpha": 0.5, **more}
    if rule is None:
        # A gathered matrix makes the step of stage 0. At a rank that gradients hardly have, roundings turn the basis.
        settings["exact_cuts"] = True
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = kind(model, lr=0.01, **settings)
    groups = len(optimizer.param_groups)
    kwargs: dict[str, Any] = {"model": model, "optimizer": optimizer, "model_parameters": trained}
    if scheduled is not None:
        target = optimizer if scheduled == "parts" else optimizer.user_groups
        kwargs["lr_scheduler"] = torch.optim.lr_scheduler.LambdaLR(target, [lambda _: 1.0] * len(target.param_groups))
    ds_config = config(stage, "fp32", {})
    del ds_config["optimizer"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = build(ds_config, SHAPES, **kwargs)
    advance(engine, 0, 3)
    result = {
        "projected": projected(engine),
        "groups": (groups, len(fira_of(engine).param_groups)),
        "weights": by_name(engine),
        "memory": ds_fira.memory_report(engine),
        "warned": [str(one.message) for one in caught if about in str(one.message)],
    }
    engine.destroy()
    return result
