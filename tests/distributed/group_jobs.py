"""What ranks run for tests/distributed/test_user_groups.py: two param groups of the user's, beside torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiplicativeLR, OneCycleLR, SequentialLR

import ds_fira
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.registry import fira_of
from tests.distributed.zero_jobs import Net, batches, build, config

# Of three shapes, some in both groups, so that each group has more than one part at every stage.
SHAPES = [(8, 6), (6, 12), (8, 6), (6, 12), (3, 40), (8, 6)]
FIRA = {"rank": 2, "update_proj_gap": 2}
SETTINGS = {"lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}
STEPS = 5

# By name, what `deepspeed.initialize` is given: a block of the config, or a function that makes a scheduler.
JSON: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_min_lr": [0.0, 0.001], "warmup_max_lr": [0.01, 0.02], "warmup_num_steps": 3},
    "WarmupLR of the groups' own": {"warmup_num_steps": 3, "warmup_type": "linear"},
    "WarmupDecayLR": {"warmup_max_lr": [0.01, 0.02], "warmup_num_steps": 2, "total_num_steps": 6},
    "WarmupCosineLR": {"total_num_steps": 6, "warmup_num_steps": 2},
    "LRRangeTest": {"lr_range_test_min_lr": [0.001, 0.01], "lr_range_test_step_size": 2},
    "OneCycle": {
        "cycle_min_lr": [0.001, 0.002],
        "cycle_max_lr": [0.01, 0.03],
        "cycle_first_step_size": 2,
        "cycle_min_mom": [0.8, 0.7],
        "cycle_max_mom": [0.9, 0.95],
        "decay_step_size": 1,
        "decay_lr_rate": 0.1,
    },
}
TORCH: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, [lambda step: 0.9, lambda step: 0.5]),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 8, eta_min=1e-4),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=[0.01, 0.03], total_steps=12, base_momentum=[0.8, 0.7]),
    "SequentialLR": lambda o: SequentialLR(o, [TORCH["LambdaLR"](o), CosineAnnealingLR(o, 5)], milestones=[2]),
}


def two_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Half of the layers and the norm; the rest, with settings of their own."""
    named = list(model.named_parameters())
    first = [param for name, param in named if name.startswith(("layers.0", "layers.1", "layers.2", "norm"))]
    rest = [param for _, param in named if all(param is not other for other in first)]
    return [{"params": first}, {"params": rest, "lr": 0.002, "weight_decay": 0.0, "name": "rest"}]


def make(kind: str, stage: int, dtype: str, scheduler: str, seed: int = 0, **kwargs: Any) -> Any:
    """An engine with two groups, of FiraAdam or of torch's AdamW."""
    torch.manual_seed(seed)
    model = Net(SHAPES)
    params = SETTINGS | (FIRA if kind == "FiraAdam" else {"torch_adam": True})
    ds_config = config(stage, dtype, params)
    ds_config["optimizer"]["type"] = kind
    block = JSON.get(scheduler)
    if block is not None:
        ds_config["scheduler"] = {"type": scheduler.partition(" ")[0], "params": block}
    elif scheduler in TORCH:
        kwargs["lr_scheduler"] = TORCH[scheduler]
    return build(ds_config, SHAPES, model=model, model_parameters=two_groups(model), **kwargs)


def used(engine: Any) -> dict[str, tuple[Any, ...]]:
    """By parameter, the settings with which the optimizer of the engine will step it."""
    optimizer = engine.basic_optimizer
    names = {id(param): name for name, param in engine.module.named_parameters()}
    if isinstance(optimizer, LowRankOptimizer):
        members = [[name for name, _ in listed] for listed in optimizer.members]
    else:
        members = [[names[id(param)] for param in group["params"]] for group in two_groups(engine.module)]
    keys = ("lr", "betas", "weight_decay")
    return {
        name: tuple(tuple(group[key]) if key == "betas" else float(group[key]) for key in keys)
        for group, listed in zip(optimizer.param_groups, members, strict=True)
        for name in listed
    }


def shown(engine: Any) -> dict[str, Any]:
    """What a user is told of the rates."""
    scheduler = engine.lr_scheduler
    last = getattr(scheduler, "_last_lr", None)
    return {
        "get_lr": [float(lr) for lr in engine.get_lr()],
        "get_mom": [tuple(betas) for betas in engine.get_mom()],
        "groups": [(float(group["lr"]), group.get("name")) for group in engine.optimizer.param_groups],
        "last_lr": None if last is None else [float(lr) for lr in last],
        "elements": sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"]),
    }


def advance(engine: Any, first: int, last: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Train, and say before every step what is used and shown."""
    seen = []
    for batch in batches(last, torch.distributed.get_rank())[first:]:
        engine.backward(engine(batch))
        seen.append((used(engine), shown(engine)))
        engine.step()
    return [*seen, (used(engine), shown(engine))]


def compare_with_adamw(stage: int, dtype: str, schedulers: list[str]) -> dict[str, Any]:
    """By scheduler, what both optimizers used and showed at every step."""
    found = {}
    for scheduler in schedulers:
        both = {}
        for kind in ("FiraAdam", "AdamW"):
            engine = make(kind, stage, dtype, scheduler)
            both[kind] = advance(engine, 0, STEPS)
            if kind == "FiraAdam":
                both["parts"] = len(fira_of(engine).param_groups)
            engine.destroy()
        found[scheduler] = both
    return found


@contextmanager
def as_of_0_1_0(engine: Any) -> Iterator[None]:
    """Let a save write what 0.1.0 wrote: of every list of a scheduler a value for each param group, and no more."""
    optimizer, scheduler = fira_of(engine), engine.lr_scheduler
    state_dict, origins = LowRankOptimizer.state_dict, optimizer.origins
    per_group = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "base_momentums")

    def parts(state: dict[str, Any]) -> dict[str, Any]:
        """The state with every list by the parts."""
        return {
            key: [value[number] for number in origins] if key in per_group else value for key, value in state.items()
        }

    def scheduler_state() -> dict[str, Any]:
        state = parts(type(scheduler).state_dict(scheduler))
        state.pop("state_dict", None)
        if "_schedulers" in state:
            state["_schedulers"] = [parts(inner) for inner in state["_schedulers"]]
        return state

    def optimizer_state(own: LowRankOptimizer) -> Any:
        state = state_dict(own)
        del state["fira"]["user_groups"]
        return state

    with ExitStack() as stack:
        stack.enter_context(patch.object(LowRankOptimizer, "state_dict", optimizer_state))
        stack.enter_context(patch.object(scheduler, "state_dict", scheduler_state))
        yield


def resume(saved: int, resumed: int, scheduler: str, folder: str, old: bool) -> dict[str, Any]:
    """Save after two steps at one stage, load at another; what both runs use from there on."""
    whole = make("FiraAdam", saved, "fp32", scheduler)
    advance(whole, 0, 2)
    with as_of_0_1_0(whole) if old else ExitStack():
        whole.save_checkpoint(folder)
    expected = advance(whole, 2, STEPS)
    parts = len(fira_of(whole).param_groups)
    whole.destroy()
    engine = make("FiraAdam", resumed, "fp32", scheduler, seed=3)
    engine.load_checkpoint(folder)
    found = advance(engine, 2, STEPS)
    state = engine.lr_scheduler.state_dict()
    engine.destroy()
    return {"expected": expected, "found": found, "parts": parts, "base_lrs": state.get("base_lrs")}


def by_hand(stage: int, dtype: str) -> dict[str, Any]:
    """Change the rates and decays of a group in the course of a run, as one does with AdamW."""
    from deepspeed.runtime.lr_schedules import WarmupLR

    engine = make("FiraAdam", stage, dtype, "none")
    advance(engine, 0, 1)
    before = {name: param.detach().clone() for name, param in _whole(engine).items()}
    group = engine.optimizer.param_groups[1]
    group["lr"] = 0.0
    group.update(weight_decay=0.5)
    rates = used(engine)
    advance(engine, 1, 2)
    after = _whole(engine)
    moved = sorted(name for name in before if not torch.equal(before[name], after[name]))
    frozen = sorted(name for name, (lr, _, _) in rates.items() if lr == 0.0)
    # A scheduler of DeepSpeed's that the user makes of what `deepspeed.initialize` has returned.
    later = WarmupLR(engine.optimizer, warmup_min_lr=[0.1, 0.2], warmup_max_lr=[0.3, 0.4])
    torchs = LambdaLR(engine.basic_optimizer.user_groups, [lambda step: 1.0, lambda step: 2.0])
    assert torchs.get_last_lr() == engine.get_lr() == [group["lr"] for group in engine.optimizer.param_groups]
    errors = []
    try:
        group["params"] = []
    except ValueError as error:
        errors.append(str(error))
    result = {"moved": moved, "frozen": frozen, "later": (later.get_last_lr(), torchs.base_lrs), "errors": errors}
    engine.destroy()
    return result


def _whole(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    params = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())):
        return {name: param.detach().clone() for name, param in params.items()}


def an_object(stage: int, given: str) -> dict[str, Any]:
    """An optimizer object of two groups: with a scheduler of its `user_groups`, or with a function that makes one."""
    torch.manual_seed(0)
    model = Net(SHAPES)
    named = {id(param): name for name, param in model.named_parameters()}
    groups = two_groups(model)
    groups = [{**group, "params": [(named[id(p)], p) for p in group["params"]]} for group in groups]
    optimizer = ds_fira.FiraAdam(groups, **SETTINGS, **FIRA)
    scheduler: Any = TORCH["LambdaLR"]
    if given == "object":
        scheduler = scheduler(optimizer.user_groups)
    ds_config = config(stage, "fp32", {})
    del ds_config["optimizer"]
    engine = build(ds_config, SHAPES, model=model, optimizer=optimizer, lr_scheduler=scheduler)
    result = {"found": advance(engine, 0, STEPS), "parts": len(optimizer.param_groups)}
    engine.destroy()
    adamw = make("AdamW", stage, "fp32", "LambdaLR")
    result["expected"] = advance(adamw, 0, STEPS)
    adamw.destroy()
    return result


def idle_group(stage: int) -> dict[str, Any]:
    """A group of which nothing is trained counts for a scheduler, as it does for AdamW."""
    rates = {}
    for kind in ("FiraAdam", "AdamW"):
        torch.manual_seed(0)
        model = Net(SHAPES)
        model.embedding.weight.requires_grad_(False)
        groups = [{"params": [model.embedding.weight], "lr": 0.5}, {"params": list(model.layers.parameters())}]
        ds_config = config(stage, "fp32", SETTINGS | (FIRA if kind == "FiraAdam" else {"torch_adam": True}))
        ds_config["optimizer"]["type"] = kind
        ds_config["scheduler"] = {"type": "WarmupLR", "params": JSON["WarmupLR"]}
        engine = build(ds_config, SHAPES, model=model, model_parameters=groups)
        seen = []
        for batch in batches(2, torch.distributed.get_rank()):
            engine.backward(engine(batch))
            engine.step()
            seen.append([float(lr) for lr in engine.get_lr()])
        rates[kind] = seen
        engine.destroy()
    return rates
