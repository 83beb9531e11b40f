"""Schedulers and settings follow the parameters to other param groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from ds_fira.checkpoint.reconcile import SavedGroup, carry_schedule, carry_values

SHAPE = (2, 3)
# Parameters a to d in three groups, and in two others.
BEFORE, AFTER = [["a"], ["b", "c"], ["d"]], [["d", "a"], ["c", "b"]]
RATES = {"a": 0.1, "b": 0.2, "c": 0.2, "d": 0.1}

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 0.9**step),
    "StepLR": lambda o: StepLR(o, 2),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 9),
    "OneCycleLR": lambda o: OneCycleLR(o, [group["lr"] for group in o.param_groups], total_steps=12),
    "SequentialLR": lambda o: SequentialLR(o, [StepLR(o, 2), LambdaLR(o, lambda step: 0.8**step)], milestones=[5]),
    # As many parts as groups: their list is not one of values a group.
    "SequentialLR of two": lambda o: SequentialLR(o, [StepLR(o, 1), StepLR(o, 3)], milestones=[3]),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=0, min_lr=[0.01] * len(o.param_groups)),
}


def build(groups: list[list[str]], make: Callable[[Optimizer], Any]) -> tuple[Optimizer, Any]:
    params = [{"params": [nn.Parameter(torch.zeros(SHAPE)) for _ in names], "lr": RATES[names[0]]} for names in groups]
    optimizer = SGD(params, lr=1.0)
    return optimizer, make(optimizer)


def advance(optimizer: Optimizer, scheduler: Any, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.step()
        scheduler.step(*([1.0 + step] if isinstance(scheduler, ReduceLROnPlateau) else []))


def rates(optimizer: Optimizer, groups: list[list[str]]) -> dict[str, float]:
    pairs = zip(optimizer.param_groups, groups, strict=True)
    return {name: group["lr"] for group, names in pairs for name in names}


@pytest.mark.parametrize("by_user", [True, False], ids=["by the user's groups", "by their parts"])
def test_a_schedule_of_groups_in_parts_goes_on_over_other_groups(by_user: bool) -> None:
    """The parts of the run that saved are a, b with c, d, of two groups: a with b and c, and d. Now they are others."""
    parts, origins, now = [["a"], ["b", "c"], ["d"]], [0, 0, 1], [["d"], ["a"], ["b", "c"]]
    saved = [SavedGroup(dict.fromkeys(names, SHAPE), {}, {}, n) for names, n in zip(parts, origins, strict=True)]
    state = {"base_lrs": [0.1, 0.2] if by_user else [0.1, 0.1, 0.2], "last_epoch": 4, "milestones": [1, 2]}
    own = {"base_lrs": [1.0, 1.0, 1.0], "last_epoch": 0, "milestones": [1, 2]}
    members = [[(name, SHAPE) for name in names] for names in now]
    carried = carry_schedule(state, own, saved, members)
    assert carried == {"base_lrs": [0.2, 0.1, 0.1], "last_epoch": 4, "milestones": [1, 2]}


@pytest.mark.parametrize("after", [AFTER, BEFORE, [["b", "c"], ["a"], ["d"]]], ids=["fewer", "same", "moved"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_schedule_goes_on_over_other_groups(kind: str, after: list[list[str]]) -> None:
    whole, schedule = build(BEFORE, SCHEDULERS[kind])
    advance(whole, schedule, 4)
    saved = [
        SavedGroup(dict.fromkeys(names, SHAPE), {}, {"lr": g["lr"]})
        for names, g in zip(BEFORE, whole.param_groups, strict=True)
    ]
    for group, old in zip(saved, whole.param_groups, strict=True):
        group.values.update({key: value for key, value in old.items() if key != "params"})
    state = schedule.state_dict()
    resumed, other = build(after, SCHEDULERS[kind])
    members = [[(name, SHAPE) for name in names] for names in after]
    assert carry_values(saved, resumed.param_groups, members, [{} for _ in after]) == []
    other.load_state_dict(carry_schedule(state, other.state_dict(), saved, members))
    assert rates(resumed, after) == pytest.approx(rates(whole, BEFORE))
    for optimizer, scheduler in ((whole, schedule), (resumed, other)):
        advance(optimizer, scheduler, 5, first=4)
    assert rates(resumed, after) == pytest.approx(rates(whole, BEFORE))


def test_what_was_given_otherwise_is_taken_over_and_said() -> None:
    saved = [
        SavedGroup({"a": SHAPE}, {"gamma": 1.01, "lr": 0.1, "alpha": 1.0}, {"gamma": 1.01, "lr": 0.05, "alpha": 0.7}),
        SavedGroup({"b": SHAPE}, {"gamma": 1.01, "lr": 0.1, "alpha": 1.0}, {"gamma": 1.01, "lr": 0.02, "alpha": 0.7}),
    ]
    group = {"gamma": 1.5, "lr": 0.3, "alpha": 1.0}
    notes = carry_values(saved, [group], [[("a", SHAPE), ("b", SHAPE)]], [{"gamma": 1.5, "lr": 0.3, "alpha": 1.0}])
    # alpha was given alike and changed by someone in the course of the run; lr differs between the old groups.
    assert group == {"gamma": 1.5, "lr": 0.3, "alpha": 0.7}
    assert notes == [
        "gamma = 1.5 where the checkpoint had 1.01",
        "lr = 0.3, since its parameters were in groups with different values",
    ]
