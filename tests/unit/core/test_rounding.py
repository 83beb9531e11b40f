"""Weights in bfloat16, rounded stochastically: on average what was computed, by noise of step and place alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_fira import FiraAdam
from ds_fira.core.rounding import AT_ONCE, store_weight_
from ds_fira.optim import settings


def test_the_mean_over_steps_is_the_value():
    value = torch.linspace(0.5, 2.0, 1000)
    found = []
    for step in range(1, 2001):
        weight = torch.empty(1000, dtype=torch.bfloat16)
        store_weight_(weight, value.clone(), -step)
        found.append(weight)
    found = torch.stack(found).double()
    spacing = torch.where(value < 1.0, 2.0**-8, 2.0**-7).double()
    # Either neighbour, and of 2,000 draws the mean is within five standard errors of at most half a spacing each.
    assert bool(((found - value).abs() < spacing).all())
    assert bool(((found.mean(0) - value).abs() < 5 * 0.5 * spacing / 2000**0.5).all())


@pytest.mark.parametrize("start", [0, 1, 7])
def test_parts_are_rounded_as_the_whole(start):
    value = torch.randn(2 * AT_ONCE + 13, generator=torch.Generator().manual_seed(0))
    whole, parts = (torch.empty(len(value), dtype=torch.bfloat16) for _ in range(2))
    store_weight_(whole, value.clone(), -3)
    store_weight_(parts[:start], value[:start].clone(), -3)
    store_weight_(parts[start:], value[start:].clone(), -3, start)
    assert torch.equal(whole, parts)
    other = torch.empty_like(whole)
    store_weight_(other, value.clone(), -4)
    assert not torch.equal(whole, other)


def test_other_dtypes_and_values_that_need_no_rounding_stay():
    exact = torch.randn(100).bfloat16()
    weight = torch.empty_like(exact)
    store_weight_(weight, exact.float(), -1)
    assert torch.equal(weight, exact)
    half = torch.empty(100, dtype=torch.float16)
    value = torch.randn(100)
    store_weight_(half, value.clone(), -1)
    assert torch.equal(half, value.half())


def train(rounding: str, dtype: torch.dtype, steps: int = 300) -> nn.Module:
    """Steps of 1e-4, of which bfloat16 weights about 1 lose each one that is rounded to the nearest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8, bias=False)).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    optimizer = FiraAdam(
        model, rank=2, lr=1e-4, residual_scale=0.0, alpha=1.0, weight_rounding=rounding, weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(param.shape, generator=generator) for param in model.parameters()]
    for _ in range(steps):
        for param, own in zip(model.parameters(), noise, strict=True):
            param.grad = own.to(dtype)
        optimizer.step()
    return model


def test_small_steps_arrive():
    moved = {}
    for rounding, dtype in (("nearest", torch.float32), ("nearest", torch.bfloat16), ("stochastic", torch.bfloat16)):
        model = train(rounding, dtype)
        moved[rounding, dtype] = torch.cat([(param.detach().float() - 1.0).flatten() for param in model.parameters()])
    true, lost, found = moved.values()
    assert float(lost.abs().max()) == 0.0
    assert float(true.abs().min()) > 0.0
    # Rounding noise of 300 steps, a walk, beside what 300 steps of one direction make.
    assert float((found - true).mean().abs()) < 0.1 * float(true.abs().mean())
    assert float(torch.corrcoef(torch.stack([found, true]))[0, 1]) > 0.9
    assert all(
        map(
            torch.equal,
            train("stochastic", torch.bfloat16).parameters(),
            train("stochastic", torch.bfloat16).parameters(),
        )
    )


def test_where_it_has_no_effect_a_warning_says_so(monkeypatch):
    monkeypatch.setattr(settings, "_said", set())
    with pytest.warns(
        UserWarning, match=r"weight_rounding = 'stochastic' does nothing to weights stepped in torch.float32"
    ):
        train("stochastic", torch.float32, steps=1)
