"""`ds_fira.step_in_backward` on one process: the weights of `step()`, one gradient at a time, and what it refuses."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

import ds_fira
from ds_fira import FiraAdam

RANK, STEPS = 2, 7


def data(steps: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 8, generator=generator) for _ in range(steps)]


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12, bias=False), nn.LayerNorm(12), nn.Linear(12, 4)]
    return nn.Sequential(*layers)


def fira(model: nn.Module, **settings: object) -> FiraAdam:
    return FiraAdam(model, **{"rank": RANK, "lr": 0.02, "update_proj_gap": 3, "weight_decay": 0.1, **settings})


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return model(rows).square().mean()


def weights_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def by_hand(model: nn.Module, optimizer: FiraAdam, rows: list[Tensor], factor_of=None) -> None:
    """`step()` after each backward pass, with gradients scaled by what `factor_of` says of them."""
    for each in rows:
        loss_of(model, each).backward()
        for param, factor in zip(model.parameters(), factor_of(model) if factor_of else (), strict=False):
            param.grad.mul_(factor)
        optimizer.step()
        optimizer.zero_grad()


def released(model: nn.Module, optimizer: FiraAdam, rows: list[Tensor]) -> None:
    for each in rows:
        loss_of(model, each).backward()
        assert all(param.grad is None for param in model.parameters())
        optimizer.step()


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(map(torch.equal, weights_of(left), weights_of(right)))


@pytest.mark.parametrize(
    "settings", [{}, {"residual": "normalized"}, {"state_dtype": "int8", "refresh_moments": "rotate"}]
)
def test_the_weights_of_step_to_the_bit_with_a_scheduler(settings):
    models = build(), build()
    for model, releases in zip(models, (False, True), strict=True):
        optimizer = fira(model, **settings)
        if releases:
            ds_fira.step_in_backward(model, optimizer)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for rows in data():
            (released if releases else by_hand)(model, optimizer, [rows])
            schedule.step()
    assert equal(*models)
    assert not equal(models[1], build())


def test_a_tied_weight_is_stepped_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, rows: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(rows)))

    models = Tied(), Tied()
    by_hand(models[0], fira(models[0]), data())
    optimizer = fira(models[1])
    ds_fira.step_in_backward(models[1], optimizer)
    released(models[1], optimizer, data())
    assert equal(*models)


def test_memory_is_weights_states_and_one_gradient():
    size, depth = 192, 12

    def peak(releases: bool) -> tuple[int, int]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(depth)))
        optimizer = FiraAdam(model, rank=8, lr=0.01, update_proj_gap=1000)
        if releases:
            ds_fira.step_in_backward(model, optimizer)
        rows = torch.randn(1, size)
        found = []
        for _ in range(2):  # the second without a refresh, whose solver has memory of its own
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                loss_of(model, rows).backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
        return found[1], ds_fira.state_bytes(optimizer)

    one = 4 * size * size
    (small, states), (large, same) = peak(True), peak(False)
    assert states == same < one * depth / 5
    # One gradient, and half of one in which its step is computed.
    assert one * depth + states < small < one * depth + states + 2 * one
    assert large > 2 * one * depth + states


def test_clipping_by_parameter_is_each_gradient_s_own_norm():
    def factors(model: nn.Module) -> list[float]:
        return [min(1.0, 0.05 / float(param.grad.norm())) for param in model.parameters()]

    models = build(), build()
    by_hand(models[0], fira(models[0]), data(), factors)
    optimizer = fira(models[1])
    ds_fira.step_in_backward(models[1], optimizer, max_norm=0.05, clip="parameter")
    released(models[1], optimizer, data())
    for one, other in zip(weights_of(models[0]), weights_of(models[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_clipping_by_the_norm_before_and_a_resume_of_it():
    before: list[float] = []

    def factors(model: nn.Module) -> list[float]:
        norms = [float(param.grad.norm()) for param in model.parameters()]
        found = [min(1.0, 0.05 / (before[-1] if before else norm)) for norm in norms]
        before.append(math.sqrt(sum(norm**2 for norm in norms)))
        return found

    models = build(), build()
    by_hand(models[0], fira(models[0]), data(), factors)
    optimizer = fira(models[1])
    steps = ds_fira.step_in_backward(models[1], optimizer, max_norm=0.05)
    released(models[1], optimizer, data()[:4])
    assert steps.grad_norm == pytest.approx(before[3], rel=1e-5)
    resumed = build(9)
    resumed.load_state_dict(models[1].state_dict())
    again = fira(resumed)
    ds_fira.step_in_backward(resumed, again, max_norm=0.05)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    released(models[1], optimizer, data()[4:])
    released(resumed, again, data()[4:])
    assert equal(models[1], resumed)
    for one, other in zip(weights_of(models[0]), weights_of(resumed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_not_finite_skips_its_matrix_alone():
    model = build()
    optimizer = fira(model, weight_decay=0.0)
    steps = ds_fira.step_in_backward(model, optimizer, max_norm=1.0)
    released(model, optimizer, data()[:2])
    before = weights_of(model)
    spoil = model[2].weight.register_hook(lambda grad: torch.full_like(grad, torch.inf))
    released(model, optimizer, data()[2:3])
    spoil.remove()
    same = [torch.equal(one, other) for one, other in zip(before, weights_of(model), strict=True)]
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, kept in zip(names, same, strict=True) if kept] == ["2.weight"]
    assert math.isfinite(steps.grad_norm)


def test_removed_it_leaves_the_gradients_to_step():
    model = build()
    optimizer = fira(model)
    ds_fira.step_in_backward(model, optimizer).remove()
    loss_of(model, data()[0]).backward()
    assert all(param.grad is not None for param in model.parameters())


def test_nothing_is_left_of_a_model_and_its_optimizer():
    model = build()
    optimizer = fira(model)
    ds_fira.step_in_backward(model, optimizer)
    released(model, optimizer, data()[:1])
    alive = [weakref.ref(item) for item in (optimizer, *model.parameters())]
    del model, optimizer
    gc.collect()
    assert [item() for item in alive] == [None] * len(alive)


def test_a_second_backward_pass_is_refused():
    model = build()
    optimizer = fira(model)
    ds_fira.step_in_backward(model, optimizer)
    loss_of(model, data()[0]).backward()
    with pytest.raises(RuntimeError, match="got a second gradient before"):
        loss_of(model, data()[1]).backward()


def test_a_loss_scale_is_refused():
    model = build()
    optimizer = fira(model)
    ds_fira.step_in_backward(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, data()[0])).backward()
    with pytest.raises(ValueError, match="GradScaler is not supported with step_in_backward"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_norm": 0}, "max_norm = 0 is not legal"),
        ({"max_norm": 1.0, "clip": "global"}, "clip = 'global' is not legal; choose 'previous' or 'parameter'"),
    ],
)
def test_values_that_are_not_legal(change, sentence):
    model = build()
    with pytest.raises(ValueError, match=sentence):
        ds_fira.step_in_backward(model, fira(model), **change)


def test_what_does_not_go_with_it():
    model = build()
    with pytest.raises(ValueError, match="got a model with 0 of the optimizer's 7 parameters"):
        ds_fira.step_in_backward(build(), fira(model))
    with pytest.raises(ValueError, match=r"does not train 0\.weight in float16"):
        ds_fira.step_in_backward(model.half(), fira(model))
    model = build()
    optimizer = fira(model)
    ds_fira.step_in_backward(model, optimizer)
    with pytest.raises(ValueError, match=r"step\(closure\) is not supported"):
        optimizer.step(lambda: loss_of(model, data()[0]))
