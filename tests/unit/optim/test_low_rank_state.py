"""The low-rank state of a parameter without an engine: read as it is kept, set, refused where it does not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import ds_fira
from ds_fira import FiraAdam, GaLoreAdam, low_rank_state, set_low_rank_state
from ds_fira.optim.base import LowRankOptimizer

LEFT, RIGHT, EXPERTS = (6, 9), (9, 6), (3, 5, 7)


def stepped(kind: type[LowRankOptimizer] = FiraAdam, steps: int = 3, **settings: object) -> LowRankOptimizer:
    """An optimizer of a matrix of each side, three experts and a bias, after some steps."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=settings.pop("dtype", None))) for shape in (LEFT, RIGHT, EXPERTS)]
    groups = [{"params": params, "rank": 2}, {"params": [nn.Parameter(torch.zeros(4))]}]
    optimizer = kind(groups, lr=0.01, update_proj_gap=2, **settings)
    for _ in range(steps):
        for param in (*params, *groups[1]["params"]):
            param.grad = torch.randn_like(param)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_what_is_read_is_what_is_kept(state_dtype: str) -> None:
    optimizer = stepped(state_dtype=state_dtype)
    for param in optimizer.param_groups[0]["params"]:
        found, kept = low_rank_state(optimizer, param), optimizer.state[param]
        assert (found.shape, found.rank) == (tuple(param.shape), 2)
        assert found.side == ("left" if param.shape[-2] <= param.shape[-1] else "right")
        assert found.basis.dtype == found.exp_avg.dtype == torch.float32
        for key in ("step", "refresh_step", "basis", "residual_norm"):
            assert torch.equal(getattr(found, key), kept[key].to(getattr(found, key).dtype))
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found.moments[key], kept[key].float())
        assert found.basis is not kept["basis"]


def test_a_run_goes_on_from_what_is_set() -> None:
    """An optimizer that was given all states of another one steps as that does."""
    first, second = stepped(), stepped(steps=1)
    for mine, theirs in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
        theirs.data.copy_(mine.data)
        set_low_rank_state(second, theirs, low_rank_state(first, mine))
        theirs.grad = mine.grad.clone()
    for optimizer in (first, second):
        optimizer.step()
    for mine, theirs in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
        assert torch.equal(mine, theirs)
        assert all(torch.equal(value, second.state[theirs][key]) for key, value in first.state[mine].items())


def test_before_the_first_step() -> None:
    optimizer = stepped(steps=0)
    state = low_rank_state(optimizer, "2")
    assert not optimizer.state
    assert state.refresh_step.tolist() == [-1] * 3
    assert not state.basis.any()
    set_low_rank_state(optimizer, "2", dataclasses.replace(state, residual_norm=torch.full((3,), 0.5)))
    assert low_rank_state(optimizer, "2").residual_norm.tolist() == [0.5] * 3


def test_other_optimizers_and_dtypes() -> None:
    galore = low_rank_state(stepped(GaLoreAdam), "0")
    assert galore.residual_norm is None
    assert galore.exp_avg.any()
    apollo = stepped(ds_fira.ApolloAdam)
    drawn = low_rank_state(apollo, "0")
    assert drawn.basis.shape == (0, 2)
    set_low_rank_state(apollo, "0", dataclasses.replace(drawn, moments={**drawn.moments, "exp_avg": drawn.exp_avg + 1}))
    assert torch.equal(low_rank_state(apollo, "0").exp_avg, drawn.exp_avg + 1)
    moments = low_rank_state(stepped(ds_fira.FiraRMSProp), "0").moments
    assert "exp_avg" not in moments
    assert moments
    assert low_rank_state(stepped(dtype=torch.float64), "0").basis.dtype == torch.float64
    averages = low_rank_state(stepped(residual="normalized"), "2").residual_avg_sq
    assert averages.shape[0] == 3


def test_what_does_not_fit_changes_nothing() -> None:
    optimizer = stepped()
    matrix, bias = optimizer.param_groups[0]["params"][0], optimizer.param_groups[1]["params"][0]
    state = low_rank_state(optimizer, matrix)
    before = {key: value.clone() for key, value in optimizer.state[matrix].items()}
    for other, reason in {
        ("rank", 3): "rank of the state for 0 is 3, and has to be 2",
        ("side", "right"): "side of the state for 0 is right",
        ("basis", torch.zeros(6, 3)): r"shape of basis of the state for 0 is \(6, 3\), and has to be \(6, 2\)",
        ("residual_norm", None): r"shape of residual_norm of the state for 0 is None, and has to be \(\)",
    }.items():
        with pytest.raises(ValueError, match=reason):
            set_low_rank_state(optimizer, matrix, dataclasses.replace(state, **dict([other])))
    with pytest.raises(ValueError, match="3 is not projected, and has no low-rank state"):
        low_rank_state(optimizer, bias)
    with pytest.raises(ValueError, match=r"a parameter of shape \(2, 2\) is not trained by this FiraAdam"):
        low_rank_state(optimizer, nn.Parameter(torch.zeros(2, 2)))
    assert all(torch.equal(value, optimizer.state[matrix][key]) for key, value in before.items())
