"""`residual = "normalized"` against the float64 reference, and what its formula promises; `residual = "none"`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_fira import FiraAdam, FiraRMSProp
from ds_fira.core.normalized import residual_floor
from ds_fira.core.settings import GroupSettings
from tests.reference import tolerances
from tests.reference.fira_reference import FiraReference
from tests.reference.gradients import low_rank_gradient, make_gradients, make_weight
from tests.reference.harness import drive, relative_error, run_optimizer, run_reference, weight_change_error
from tests.unit.core.test_parity_reference import (
    BASE,
    FORMULATIONS,
    LR,
    PROJ_TYPES,
    SHAPES,
    STEPS,
    assert_parity,
    make_ours,
)

NORMALIZED = {"residual": "normalized"}


@pytest.mark.parametrize("residual", ["normalized", "none"])
@pytest.mark.parametrize("rank", [1, 4, 50])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 10, 14)], ids=str)
def test_every_side_and_rank(shape: tuple[int, ...], proj_type: str, rank: int, residual: str) -> None:
    state, reference = assert_parity(shape, proj_type=proj_type, rank=rank, residual=residual, alpha=0.25)
    assert ("residual_avg_sq" in state) == (residual == "normalized")
    if residual == "normalized" and len(shape) == 2:
        entries = shape[1] if reference.side == "left" else shape[0]
        assert state["residual_avg_sq"].shape == (entries,)
        assert state["residual_avg_sq"].dtype == torch.float32
        assert relative_error(state["residual_avg_sq"], reference.residual_avg_sq.view(-1)) <= tolerances.FLOAT32_STATE
    if residual == "normalized" and len(shape) == 3:
        averages = torch.stack([expert.residual_avg_sq.view(-1) for expert in reference.experts])
        assert relative_error(state["residual_avg_sq"], averages) <= tolerances.FLOAT32_STATE


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize(
    "changed",
    [
        {"scaling": "matrix"},
        {"limiter": "growth"},
        {"limiter": "growth", "scaling": "matrix", "gamma": 1.1},
        {"residual_beta": 0.0},
        {"residual_beta": 0.0, "scaling": "matrix", "residual_warmup": 4},
        {"residual_warmup": 7, "limiter": "growth"},
        {"residual_beta": 0.99, "alpha": 0.25, "weight_decay": 0.1},
        {"residual_scale": 0.5, "betas": (0.8, 0.95), "update_proj_gap": 1},
        {"residual_scale": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (130, 40), (2, 10, 14)], ids=str)
def test_settings(shape: tuple[int, ...], changed: dict[str, Any], formulation: str) -> None:
    state, reference = assert_parity(shape, formulation=formulation, **NORMALIZED, **changed)
    assert ("residual_avg_sq" in state) == (changed.get("residual_beta") != 0.0)
    if "residual_avg_sq" in state and changed.get("scaling") == "matrix":
        assert state["residual_avg_sq"].shape == (*shape[:-2], 1)
    if changed.get("limiter") == "growth" and len(shape) == 2:
        assert any(reference.limited)


@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    rank=st.integers(1, 24),
    residual=st.sampled_from(["normalized", "normalized", "none"]),
    proj_type=st.sampled_from(PROJ_TYPES),
    formulation=st.sampled_from(FORMULATIONS),
    scaling=st.sampled_from(["column", "matrix"]),
    limiter=st.sampled_from(["growth", "none", None]),
    alpha=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
def test_random_settings(m: int, n: int, seed: int, **group: Any) -> None:
    assume((group["residual"], group["limiter"]) != ("none", "growth"))
    # A residual that is rounding differs from the reference's, by about 1e-7 / sqrt(tau) of a real one.
    within = tolerances.FLOAT32_SMALL_RESIDUAL
    assert_parity((m, n), make_gradients((m, n), 9, seed=seed), seed=seed, within=within, **group)


@pytest.mark.parametrize(
    "wrong",
    [
        {"residual_beta": 0.89},
        {"residual_warmup": 2},
        {"residual_scale": 1.01},
        {"alpha": 0.26},
        {"scaling": "matrix"},
        {"limiter": "growth"},
    ],
    ids=str,
)
def test_these_comparisons_can_fail(wrong: dict[str, Any]) -> None:
    right = {**BASE, **NORMALIZED, "alpha": 0.25}
    weight, gradients = make_weight((12, 20)), make_gradients((12, 20), STEPS)
    ours, _ = run_optimizer(make_ours, weight, gradients, **right)
    theirs = run_reference(FiraReference(weight, lr=LR, **{**right, **wrong}), gradients)
    assert weight_change_error(weight, ours, theirs) > 20 * tolerances.FLOAT32_VS_REFERENCE


def test_float64_weights_are_computed_in_float64() -> None:
    weight, gradients = make_weight((12, 20)).double(), [g.double() for g in make_gradients((12, 20), STEPS)]
    group = {**BASE, **NORMALIZED, "alpha": 0.25}
    ours, state = run_optimizer(make_ours, weight, gradients, **group)
    theirs = run_reference(FiraReference(weight, lr=LR, **group), gradients)
    assert weight_change_error(weight, ours, theirs) <= tolerances.FLOAT64_VS_REFERENCE
    assert state["residual_avg_sq"].dtype == torch.float64


def lone(shape: tuple[int, ...], rank: int, **changed: Any) -> tuple[FiraAdam, nn.Parameter]:
    """A lone weight of zeros that is projected on the left, and steps of size 1 outside of the subspace."""
    param = nn.Parameter(torch.zeros(shape))
    group = {"params": [param], "rank": rank, "proj_type": "left", **NORMALIZED, **changed}
    return FiraAdam([group], lr=1.0, project_full_rank=True), param


def outside(optimizer: FiraAdam, param: nn.Parameter, before: Tensor) -> Tensor:
    """What a step has changed outside of the subspace, S with lr, alpha and residual_scale 1; in float64."""
    basis, change = optimizer.state[param]["basis"].double(), (before - param.detach()).double()
    return change - basis @ (basis.mT @ change)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shape", [(12, 20), (3, 12, 20)], ids=str)
def test_the_first_residual_has_entries_of_size_one(shape: tuple[int, ...], scale: float) -> None:
    """|S_j| = sqrt(m - r) exactly, whatever the gradient; of a whole matrix sqrt(n (m - r))."""
    grad = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for changed, wanted in (({}, math.sqrt(8)), ({"scaling": "matrix"}, math.sqrt(20 * 8))):
        optimizer, param = lone(shape, 4, **changed)
        drive(optimizer, param, [grad])
        found = outside(optimizer, param, torch.zeros(shape))
        norms = found.norm(dim=(-2, -1) if changed else -2)
        torch.testing.assert_close(norms, torch.full_like(norms, wanted), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3])
@pytest.mark.parametrize(
    ("changed", "most"),
    [
        ({"matmul_precision": "float32"}, 1e-3),
        ({"matmul_precision": "tf32"}, 1e-3),
        ({"matmul_precision": "bfloat16"}, 0.1),
        ({"state_dtype": "bfloat16"}, 0.1),
        ({"state_dtype": "int8"}, 0.1),
        ({"scaling": "matrix"}, 1e-3),
    ],
    ids=str,
)
def test_a_residual_that_is_rounding_stays_small(changed: dict[str, Any], most: float, scale: float) -> None:
    """Gradients of the basis' own rank have no residual: what is left of it is damped, not blown up to size one.

    A basis in bfloat16 leaves 2^-9 of the gradient outside, over sqrt(tau) = 0.1: a few per cent.
    """
    shape = (64, 96)
    optimizer, param = lone(shape, 4, **changed)
    for step in range(3):
        before = param.detach().clone()
        grad = low_rank_gradient(shape, true_rank=4, seed=1, scale=scale) * (1 + step)
        drive(optimizer, param, [grad])
        # By the exact projection: that of the stored basis has its own rounding.
        left = torch.linalg.svd(grad / scale)[0][:, :4].double()
        change = (before - param.detach()).double()
        off = change - left @ (left.T @ change)
        assert param.isfinite().all()
        assert (off.norm(dim=0) / math.sqrt(60)).max() <= most


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_the_floor_covers_what_rounding_does_to_the_difference_of_squares(precision: str) -> None:
    """Operands cut (tf32) or rounded (bfloat16), and a rounded basis: |G|^2 - |R|^2 is off by less than tau |G|^2."""
    grad = low_rank_gradient((64, 96), true_rank=4, seed=1)
    basis = torch.linalg.svd(grad.double())[0][:, :4].float()

    def cut(value: Tensor) -> Tensor:
        if precision == "tf32":
            return (value.view(torch.int32) & ~0x1FFF).view(torch.float32)
        return value.bfloat16().float() if precision == "bfloat16" else value

    for stored in ("float32", "bfloat16"):
        kept = basis if stored == "float32" else basis.bfloat16().float()
        low_rank = cut(kept).T @ cut(grad)
        squares = grad.double().square().sum(0)
        off = (squares - low_rank.double().square().sum(0)).abs() / squares
        tau = residual_floor(GroupSettings(matmul_precision=precision, state_dtype=stored))
        assert off.max() <= tau


def test_gradients_that_are_zero_in_places() -> None:
    """Columns, and whole steps, without a gradient: no step outside for want of one, then that of the formula."""
    gradients = make_gradients((12, 20), STEPS)
    for gradient in gradients[:3]:
        gradient[:, 5:9] = 0.0
    gradients[6] = torch.zeros(12, 20)
    for scaling in ("column", "matrix"):
        assert_parity((12, 20), gradients, **NORMALIZED, scaling=scaling)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("shape", [(6, 9), (2, 6, 9)], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(shape: tuple[int, ...], value: float) -> None:
    optimizer, param = lone(shape, 2, weight_decay=0.1)
    gradients = make_gradients(shape, 2)
    drive(optimizer, param, gradients[:1])
    before = [param.detach().clone(), *(tensor.clone() for tensor in optimizer.state[param].values())]
    spoiled = torch.full_like(gradients[1], value)
    drive(optimizer, param, [spoiled])
    after = [param.detach(), *optimizer.state[param].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_the_average_is_kept_in_float32(state_dtype: str) -> None:
    """Beside compressed states, and near that of a run without: their bases alone differ, in the last of 8 bits."""
    _, state = run_optimizer(make_ours, make_weight((12, 20)), make_gradients((12, 20), 5), **BASE, **NORMALIZED)
    _, coded = run_optimizer(
        make_ours, make_weight((12, 20)), make_gradients((12, 20), 5), **BASE, **NORMALIZED, state_dtype=state_dtype
    )
    assert coded["residual_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(coded["residual_avg_sq"], state["residual_avg_sq"], rtol=0.05, atol=0.0)


def test_a_refresh_keeps_the_average() -> None:
    """And rotates the moments beside it, as of any residual."""
    assert_parity((12, 20), update_proj_gap=2, **NORMALIZED)
    optimizer, param = lone((12, 20), 4, update_proj_gap=2, refresh_moments="reset")
    drive(optimizer, param, make_gradients((12, 20), 3))
    other, theirs = lone((12, 20), 4, update_proj_gap=2, refresh_moments="keep")
    drive(other, theirs, make_gradients((12, 20), 3))
    assert torch.equal(optimizer.state[param]["residual_avg_sq"], other.state[theirs]["residual_avg_sq"])


def test_another_rule() -> None:
    """Fira around RMSProp: alpha (P N + S), S the same as under Adam."""
    param = nn.Parameter(torch.zeros(12, 20))
    optimizer = FiraRMSProp([{"params": [param], "rank": 4, "proj_type": "left", **NORMALIZED}], lr=1.0)
    drive(optimizer, param, make_gradients((12, 20), 1))
    norms = outside(optimizer, param, torch.zeros(12, 20)).norm(dim=0)
    torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(8)), rtol=1e-5, atol=0.0)
