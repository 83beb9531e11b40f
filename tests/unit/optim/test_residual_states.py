"""`residual` in param groups and checkpoints: what is refused, what stands in a group, what goes on from what."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from ds_fira import FiraAdam, GaLoreAdam
from ds_fira.core.settings import GroupSettings
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import drive
from tests.unit.core.test_normalized_residual import NORMALIZED, outside
from tests.unit.core.test_parity_reference import BASE, LR

REFUSED = [
    ({"residual": "gone"}, "residual = 'gone' is not legal; choose 'scaled', 'normalized' or 'none'"),
    ({"residual_beta": 1.0}, "residual_beta = 1.0 is not legal; give a number from 0 up to but not including 1"),
    (
        {"residual": "normalized", "scaling": "none"},
        "scaling = 'none' leaves residual = 'normalized' without a factor; choose 'column' or 'matrix'",
    ),
    ({"residual": "none", "limiter": "growth"}, "limiter = 'growth' has nothing to limit with residual = 'none'"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_is_refused(wrong: dict[str, Any], message: str) -> None:
    """From the constructor, from a group, and where the one half stands here and the other there."""
    param = nn.Parameter(make_weight((6, 9)))
    with pytest.raises(ValueError, match=f"^FiraAdam: {message}"):
        FiraAdam([param], rank=2, **wrong)
    with pytest.raises(ValueError, match=f"^FiraAdam param group: {message}"):
        FiraAdam([{"params": [param], "rank": 2, **wrong}])
    if len(wrong) == 2:
        (first, second) = ({key: value} for key, value in wrong.items())
        for given, own in ((first, second), (second, first)):
            with pytest.raises(ValueError, match=f"^FiraAdam param group: {message}"):
                FiraAdam([{"params": [param], "rank": 2, **own}], **given)
    with pytest.raises(ValueError, match="is a setting of FiraAdam that GaLoreAdam has no use for"):
        GaLoreAdam([param], rank=2, **wrong)


def test_the_limiter_that_goes_with_a_residual_stands_in_the_group() -> None:
    params = [nn.Parameter(make_weight((6, 9))) for _ in range(5)]
    given: list[dict[str, Any]] = [{}, NORMALIZED, {"residual": "none"}, {**NORMALIZED, "limiter": "growth"}]
    given.append({"limiter": "none"})
    groups = [{"params": [param], "rank": 2, **own} for param, own in zip(params, given, strict=True)]
    found = [group["limiter"] for group in FiraAdam(groups).param_groups]
    assert found == ["growth", "none", "none", "growth", "none"]
    assert FiraAdam(params, rank=2, **NORMALIZED).param_groups[0]["limiter"] == "none"
    assert GaLoreAdam(params, rank=2).param_groups[0]["limiter"] == "none"


def saved(kind: type[FiraAdam], steps: int = 4, **group: Any) -> tuple[dict[str, Any], nn.Parameter]:
    param = nn.Parameter(make_weight((12, 20)))
    optimizer = kind([{"params": [param], **BASE, **group}], lr=LR)
    drive(optimizer, param, make_gradients((12, 20), steps))
    return copy.deepcopy(optimizer.state_dict()), param


@pytest.mark.parametrize("scaling", ["column", "matrix"])
@pytest.mark.parametrize("before", [{"scaling": "column"}, {"residual": "none"}, NORMALIZED], ids=str)
def test_a_run_goes_on_with_another_residual(before: dict[str, Any], scaling: str) -> None:
    """Without averages, or with those of another `scaling`, they begin with p = (1 - beta^t) q; the rest goes on."""
    if before is NORMALIZED:
        before = {**NORMALIZED, "scaling": {"column": "matrix", "matrix": "column"}[scaling]}
    state, weight = saved(FiraAdam, **before)
    param = nn.Parameter(weight.detach().clone())
    optimizer = FiraAdam([{"params": [param], **BASE, **NORMALIZED, "scaling": scaling}], lr=LR)
    with pytest.warns(UserWarning, match="residual = 'normalized'|scaling = "):
        optimizer.load_state_dict(state)
    found = optimizer.state[param]
    for key, value in state["state"][0].items():
        assert key == "residual_avg_sq" or torch.equal(found[key], value), key
    assert found["residual_avg_sq"].max() < 0.0
    assert (optimizer.param_groups[0]["residual"], optimizer.param_groups[0]["limiter"]) == ("normalized", "none")
    grad = make_gradients((12, 20), 8, seed=3)[3]
    begun = param.detach().clone()
    drive(optimizer, param, [grad])
    s = outside(optimizer, param, begun) / LR
    norms = s.norm(dim=0) if scaling == "column" else s.norm().view(1)
    wanted = math.sqrt(8 if scaling == "column" else 8 * 20)
    torch.testing.assert_close(norms, torch.full_like(norms, wanted), rtol=1e-3, atol=0.0)
    # And back: the averages go, nothing else.
    again = nn.Parameter(param.detach().clone())
    scaled = FiraAdam([{"params": [again], **BASE}], lr=LR)
    with pytest.warns(UserWarning, match="residual = 'scaled' where the checkpoint had 'normalized'"):
        scaled.load_state_dict(optimizer.state_dict())
    assert "residual_avg_sq" not in scaled.state[again]


@pytest.mark.parametrize("changed", [{}, {"scaling": "matrix"}, {"state_dtype": "int8"}], ids=str)
def test_a_resumed_run_is_the_same_to_the_bit(changed: dict[str, Any]) -> None:
    group = {**NORMALIZED, **changed}
    state, weight = saved(FiraAdam, **group)
    param = nn.Parameter(weight.detach().clone())
    optimizer = FiraAdam([{"params": [param], **BASE, **group}], lr=LR)
    optimizer.load_state_dict(state)
    drive(optimizer, param, make_gradients((12, 20), 9)[4:])
    whole, uninterrupted = saved(FiraAdam, 9, **group)
    assert torch.equal(param, uninterrupted)
    assert torch.equal(optimizer.state[param]["residual_avg_sq"], whole["state"][0]["residual_avg_sq"])


def as_of_0_1_0(state: dict[str, Any], kind: type[FiraAdam]) -> dict[str, Any]:
    """A state dict as the first version wrote it: without the settings that came later, GaLore with those it had."""
    old: dict[str, Any] = {"residual_scale": 0.0, "scaling": "none", "limiter": "none"} if kind is GaLoreAdam else {}
    for group in (*state["param_groups"], *state["fira"]["settings"]):
        for key in ("residual", "residual_beta"):
            group.pop(key, None)
    for group in state["param_groups"]:
        group |= old
    return state


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("kind", [FiraAdam, GaLoreAdam])
def test_groups_of_the_first_version_keep_their_meaning(kind: type[FiraAdam], described: bool) -> None:
    state, weight = saved(kind)
    state = as_of_0_1_0(state, kind)
    if not described:
        del state["fira"]
    param = nn.Parameter(weight.detach().clone())
    optimizer = kind([{"params": [param], **BASE}], lr=LR)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["residual"] == ("none" if kind is GaLoreAdam else "scaled")
    assert "scaling" in optimizer.param_groups[0] or kind is GaLoreAdam
    drive(optimizer, param, make_gradients((12, 20), 9)[4:])
    _, uninterrupted = saved(kind, 9)
    assert torch.equal(param, uninterrupted)
    # What a pickle or a copy of that version holds.
    assert GroupSettings.of(state["param_groups"][0]).residual == optimizer.param_groups[0]["residual"]


def test_an_average_that_the_run_began_without_is_asked_for() -> None:
    """By a change of a live param group; with 0 in place of a number the average there is goes unused."""
    param = nn.Parameter(make_weight((12, 20)))
    optimizer = FiraAdam([{"params": [param], **BASE, **NORMALIZED, "residual_beta": 0.0}], lr=LR)
    first, second = make_gradients((12, 20), 2)
    drive(optimizer, param, [first])
    optimizer.param_groups[0]["residual_beta"] = 0.5
    with pytest.raises(ValueError, match=r"^residual_beta = 0\.5 needs an average that this run began without"):
        drive(optimizer, param, [second])


def test_a_residual_that_grows_goes_on_growing_after_a_resume() -> None:
    """By the matrix's count of steps, which the checkpoint holds."""
    gradients, given = make_gradients((12, 20), 8), {**BASE, **NORMALIZED, "residual_beta": 0.0, "residual_warmup": 7}
    whole = nn.Parameter(make_weight((12, 20)))
    drive(FiraAdam([{"params": [whole], **given}], lr=LR), whole, gradients)
    state, weight = saved(FiraAdam, 4, **{**NORMALIZED, "residual_beta": 0.0, "residual_warmup": 7})
    resumed = nn.Parameter(weight.detach().clone())
    optimizer = FiraAdam([{"params": [resumed], **given}], lr=LR)
    optimizer.load_state_dict(state)
    assert "residual_avg_sq" not in optimizer.state[resumed]
    drive(optimizer, resumed, gradients[4:])
    assert torch.equal(resumed, whole)
