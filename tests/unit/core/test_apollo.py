"""ApolloAdam makes the steps of algorithm 1 of its paper, and stores no basis."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_fira
from ds_fira.core import functional as F
from ds_fira.core.drawn_basis import DrawnBasis
from tests.grids import half
from tests.reference import tolerances
from tests.reference.apollo_reference import apollo
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import relative_error, run_optimizer, weight_change_error

STEPS, GAP, LR = 22, 7, 0.01  # refreshes at 0, 7, 14 and 21
CPU = torch.device("cpu")
SHAPES = [(12, 20), (20, 12), (16, 16)]
MINI = {"rank": 1, "scaling": "matrix", "alpha": math.sqrt(128.0)}


def ours(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return ds_fira.ApolloAdam(groups, lr=LR)


@pytest.mark.parametrize(
    ("shape", "proj_type", "kind"), half(SHAPES, ["std", "reverse_std", "left", "right"], [{"rank": 4}, MINI])
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_algorithm_of_the_paper_on_every_side(
    shape: tuple[int, int], proj_type: str, kind: dict[str, Any], dtype: torch.dtype
) -> None:
    """apollo-torch fails on sides other than "std"; the limiter acts in some steps and not in others."""
    weight, gradients = make_weight(shape).to(dtype), [each.to(dtype) for each in make_gradients(shape, STEPS)]
    left = {"std": shape[0] < shape[1], "reverse_std": shape[0] >= shape[1]}.get(proj_type, proj_type == "left")
    basis = DrawnBasis(0, shape[0 if left else 1], kind["rank"])
    projections = [basis.draw(step, None, torch.float32, CPU) for step in range(0, STEPS, GAP)]
    expected, first, second, acted = apollo(
        weight,
        gradients,
        projections,
        left=left,
        update_proj_gap=GAP,
        alpha=kind.get("alpha", 1.0),
        lr=LR,
        per_channel="scaling" not in kind,
        weight_decay=0.1,
    )
    assert 0 < int(acted.sum()) < STEPS
    group = {**kind, "update_proj_gap": GAP, "proj_type": proj_type, "weight_decay": 0.1}
    found, state = run_optimizer(ours, weight, gradients, **group)
    exact = dtype == torch.float64
    limit = tolerances.FLOAT64_VS_REFERENCE if exact else tolerances.FLOAT32_VS_REFERENCE
    assert weight_change_error(weight, found, expected) < limit
    for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
        assert relative_error(state[name], moment) < (limit if exact else tolerances.FLOAT32_STATE)


def test_every_expert_and_every_matrix_has_a_basis_of_its_own() -> None:
    """By their numbers, in the order of the groups: also where another parameter has a gradient first."""
    torch.manual_seed(0)
    experts, late = torch.nn.Parameter(torch.randn(2, 6, 9)), torch.nn.Parameter(torch.randn(6, 9))
    grad, start = torch.randn(6, 9), [param.detach().clone() for param in (late, *experts)]

    def stepped(order: list[torch.nn.Parameter]) -> list[Tensor]:
        with torch.no_grad():
            for param, value in zip((late, *experts), start, strict=True):
                param.copy_(value)
        optimizer = ds_fira.ApolloAdam([{"params": [late, experts], "rank": 2}], lr=LR)
        for param in order:
            late.grad = experts.grad = None
            param.grad = grad.expand(param.shape).clone()
            optimizer.step()
        return [param.detach() - value for param, value in zip((late, *experts), start, strict=True)]

    changes = stepped([late, experts])
    assert all(torch.equal(*pair) for pair in zip(changes, stepped([experts, late]), strict=True))
    assert not torch.allclose(changes[0], changes[1], rtol=1e-3)
    assert not torch.allclose(changes[1], changes[2], rtol=1e-3)


def test_nothing_is_decomposed_and_nothing_projected_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_fira.core import basis

    for module, name in ((basis, "compute_basis"), (F, "residual_square")):
        monkeypatch.delattr(module, name)
    inner: list[int] = []
    apply = F.apply_update_

    def counting(*args: Any, **named: Any) -> None:
        inner.append(args[2].shape[1])
        apply(*args, **named)

    monkeypatch.setattr(F, "apply_update_", counting)
    run_optimizer(ours, make_weight((8, 6)), make_gradients((8, 6), 5), rank=2, update_proj_gap=2)
    assert inner == [0] * 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_first_gradient_without_a_direction_leaves_the_matrix_as_it_was(value: float) -> None:
    param = torch.nn.Parameter(make_weight((6, 9)))
    optimizer, before = ours([{"params": [param], "rank": 2}]), param.detach().clone()
    param.grad = torch.full((6, 9), value)
    optimizer.step()
    assert torch.equal(param.detach(), before)
    assert int(optimizer.state[param]["step"]) == 0
    gradient = make_gradients((6, 9), 1)[0]
    param.grad = gradient.clone()
    optimizer.step()
    other, _ = run_optimizer(ours, before, [gradient], rank=2)
    assert torch.equal(param.detach(), other)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_to_the_bit(state_dtype: str) -> None:
    """In the middle of a gap, by a new optimizer that has the moments and draws the basis."""
    gradients = make_gradients((12, 20), 12)

    def go(optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, part: list[Tensor]) -> None:
        for gradient in part:
            param.grad = gradient.clone()
            optimizer.step()

    def new(weight: Tensor) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
        param = torch.nn.Parameter(weight.clone())
        group = {"params": [param], "rank": 4, "update_proj_gap": 5, "state_dtype": state_dtype}
        return ours([group]), param

    optimizer, param = new(make_weight((12, 20)))
    go(optimizer, param, gradients[:8])
    saved, weight = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    go(optimizer, param, gradients[8:])
    resumed, other = new(weight)
    resumed.load_state_dict(saved)
    go(resumed, other, gradients[8:])
    assert torch.equal(other, param)


REFUSED = [
    ({"subspace": "svd"}, "subspace = 'svd' is a setting of FiraAdam that ApolloAdam has no use for; remove it"),
    ({"refresh_moments": "rotate"}, "refresh_moments = 'rotate' is a setting of FiraAdam"),
    ({"residual": "scaled"}, "residual = 'scaled' is a setting of FiraAdam"),
    ({"residual_scale": 2.0}, "residual_scale = 2.0 is a setting of FiraAdam"),
    ({"capturable": True}, "capturable = True is a setting of FiraAdam"),
    ({"preset": "recommended"}, "preset = 'recommended' (is a setting of FiraAdam|in a param group)"),
    ({"scale": 128}, "unknown setting 'scale' = 128; did you mean 'alpha'"),
    ({"scaling": "none"}, "scaling = 'none' leaves the gradient without a factor; choose 'column' or 'matrix'"),
    ({"limiter": "off"}, "limiter = 'off' is not legal; choose 'growth' or 'none'"),
]


@pytest.mark.parametrize(("setting", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_settings_it_does_not_have_are_refused(setting: dict[str, Any], message: str) -> None:
    param = torch.nn.Parameter(make_weight((6, 9)))
    with pytest.raises(ValueError, match=f"ApolloAdam( param group)?: {message}"):
        ds_fira.ApolloAdam([param], rank=2, **setting)
    if "scale" not in setting:  # torch lets groups have any key
        with pytest.raises(ValueError, match=f"ApolloAdam( param group)?: {message}"):
            ds_fira.ApolloAdam([{"params": [param], "rank": 2, **setting}])


def test_what_fira_cannot_have_is_refused_too() -> None:
    """A residual or a basis of ApolloAdam's: a random basis restores no part of a gradient."""
    param = torch.nn.Parameter(make_weight((6, 9)))
    for setting in ({"subspace": "drawn"}, {"residual": "gradient"}):
        with pytest.raises(ValueError, match="is not legal; choose"):
            ds_fira.FiraAdam([param], rank=2, **setting)


def test_groups_and_states_of_another_optimizer_are_refused() -> None:
    param = torch.nn.Parameter(make_weight((6, 9)))
    group = {"params": [param], "rank": 2}
    fira, plain = ds_fira.FiraAdam([dict(group)]), ds_fira.ApolloAdam([dict(group)])
    with pytest.raises(ValueError, match="FiraAdam param group: method = 'ApolloAdam' belongs to another"):
        ds_fira.FiraAdam(plain.param_groups)
    with pytest.raises(ValueError, match="ApolloAdam: the checkpoint was made by FiraAdam; set optimizer"):
        plain.load_state_dict(fira.state_dict())
    with pytest.raises(ValueError, match="FiraAdam: the checkpoint was made by ApolloAdam; set optimizer"):
        fira.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("shape", "kind", "precision"),
    [
        ((12, 20), {"rank": 4}, "float32"),
        pytest.param((20, 12), {**MINI, "limiter": "none"}, "float32", marks=pytest.mark.full),
        pytest.param((12, 20), {**MINI}, "float32", marks=pytest.mark.full),
        pytest.param((20, 12), {"rank": 4}, "bfloat16", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_kernels_make_the_steps_of_the_torch_functions(
    kernels_allowed: None, shape: tuple[int, int], kind: dict[str, Any], precision: str
) -> None:
    """Of two matrices together, one of which has a gradient that is not finite in the last step."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from ds_fira.core import kernels

    def run() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        params = [torch.nn.Parameter(make_weight(shape, seed=seed)) for seed in range(2)]
        gradients = [make_gradients(shape, 3, seed=seed) for seed in range(2)]
        group = {**kind, "params": params, "update_proj_gap": 2, "weight_decay": 0.1, "matmul_precision": precision}
        optimizer = ds_fira.ApolloAdam([group], lr=LR)
        for step in range(3):
            for seed, param in enumerate(params):
                param.grad = gradients[seed][step].clone()
            if step == 2:
                params[1].grad[2, 3] = torch.nan
            optimizer.step()
        return [param.detach() for param in params], [optimizer.state[param] for param in params]

    with kernels.switched("off"):
        expected, their_states = run()
    assert kernels.supports(expected[0])
    found, states = run()
    limit = 2e-2 if precision == "bfloat16" else 2e-6
    for seed, weight in enumerate(found):
        start = make_weight(shape, seed=seed)
        assert weight_change_error(start, weight, expected[seed]) < limit
        assert int(states[seed]["step"]) == int(their_states[seed]["step"]) == 3 - (seed == 1)
        for name in ("exp_avg", "exp_avg_sq"):
            assert relative_error(states[seed][name], their_states[seed][name]) < limit
        assert float(states[seed]["residual_norm"]) == pytest.approx(
            float(their_states[seed]["residual_norm"]), rel=limit
        )
