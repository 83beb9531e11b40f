"""FiraAdam against the float64 reference: the paper's formulation, and all that fira 1.0.2 cannot run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_fira import FiraAdam
from tests.grids import half
from tests.reference import tolerances
from tests.reference.fira_reference import AdamWReference, FiraReference, FiraStackReference
from tests.reference.gradients import low_rank_gradient, make_gradients, make_weight
from tests.reference.harness import (
    drive,
    relative_error,
    run_optimizer,
    run_reference,
    weight_change_error,
    with_a_rank,
)

LR = 1e-2
STEPS, GAP = 13, 4
FORMULATIONS = ["released", "paper"]
PROJ_TYPES = ["std", "reverse_std", "left", "right"]
SHAPES = [(12, 20), (20, 12), (16, 16), (7, 13), (13, 7)]
BASE = {"rank": 4, "update_proj_gap": GAP}


def make_ours(groups):
    return FiraAdam(groups, lr=LR, project_full_rank=True)


def run_both(weight, gradients, **group):
    reference = (FiraStackReference if weight.dim() == 3 else FiraReference)(weight, lr=LR, **group)
    theirs = run_reference(reference, gradients)
    ours, state = run_optimizer(make_ours, weight, gradients, **group)
    return weight_change_error(weight, ours, theirs), state, reference


def assert_parity(shape, gradients=None, *, seed=0, within=tolerances.FLOAT32_VS_REFERENCE, **group):
    group = {**BASE, **group}
    gradients = make_gradients(shape, STEPS, seed=seed) if gradients is None else gradients
    error, state, reference = run_both(make_weight(shape, seed=seed), gradients, **group)
    assert error <= within, f"{shape} {group}: {error:.2e}"
    return state, reference


@pytest.mark.parametrize(
    ("formulation", "shape", "proj_type", "rank", "alpha"),
    half(FORMULATIONS, SHAPES, PROJ_TYPES, [1, 4, 50], [1.0, 0.25]),
    ids=str,
)
def test_every_side_and_rank(formulation, shape, proj_type, rank, alpha):
    _, reference = assert_parity(shape, formulation=formulation, proj_type=proj_type, rank=rank, alpha=alpha)
    assert len(reference.refreshes) == 4
    if rank == 4:
        assert any(reference.limited)
        assert not all(reference.limited[1:])


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_side_and_the_state_shapes(shape, proj_type, formulation):
    state, reference = assert_parity(shape, formulation=formulation, proj_type=proj_type)
    m, n = shape
    low_rank_shape, basis_shape = ((4, n), (m, 4)) if reference.side == "left" else ((m, 4), (n, 4))
    assert state["basis"].shape == basis_shape
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == low_rank_shape
    assert state["step"].item() == STEPS
    assert state["refresh_step"].item() == 12
    identity = torch.eye(4)
    assert (state["basis"].T @ state["basis"] - identity).abs().max() <= tolerances.FLOAT32_ORTHONORMAL
    for key in ("basis", "exp_avg", "exp_avg_sq"):
        assert relative_error(state[key], getattr(reference, key)) <= tolerances.FLOAT32_STATE, key
    assert state["residual_norm"].item() == pytest.approx(reference.residual_norm, rel=tolerances.FLOAT32_STATE)


@pytest.mark.parametrize(
    ("shape", "proj_type", "formulation", "alpha"),
    half([(130, 40), (40, 130), (65, 64)], PROJ_TYPES, FORMULATIONS, [1.0, 0.25]),
    ids=str,
)
def test_matrices_larger_than_a_block_of_rows(shape, proj_type, formulation, alpha):
    """Work done in blocks of rows has its own mistakes to make, at the last, shorter block above all."""
    assert_parity(
        shape,
        make_gradients(shape, 6, ratio=0.9),
        proj_type=proj_type,
        formulation=formulation,
        alpha=alpha,
        rank=8,
        update_proj_gap=3,
    )


@pytest.mark.parametrize(
    ("shape", "formulation", "scaling", "limiter", "residual_scale"),
    half([(12, 20), (20, 12)], FORMULATIONS, ["column", "matrix", "none"], ["growth", "none"], [0.0, 1.0, 4.0]),
    ids=str,
)
def test_scaling_limiter_and_residual_scale(shape, formulation, scaling, limiter, residual_scale):
    assert_parity(
        shape, formulation=formulation, scaling=scaling, limiter=limiter, residual_scale=residual_scale, alpha=0.5
    )


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("gamma", [1.001, 1.1, 2.0])
def test_gamma(gamma, formulation):
    assert_parity((12, 20), formulation=formulation, gamma=gamma)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize(
    "changed",
    [
        {"weight_decay": 0.1},
        {"betas": (0.8, 0.95)},
        {"eps": 1e-3},
        {"betas": (0, 0.5)},
        {"update_proj_gap": 1},
        {"update_proj_gap": 200},
    ],
    ids=str,
)
def test_adam_settings_and_gap(changed, formulation):
    assert_parity((20, 12), formulation=formulation, alpha=0.25, **changed)


@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("shape", [(3, 10, 14), (2, 14, 10), (1, 8, 8)], ids=str)
def test_experts_are_independent_matrices(shape, formulation, proj_type):
    state, reference = assert_parity(shape, formulation=formulation, proj_type=proj_type, rank=3)
    experts = reference.experts
    assert state["step"].tolist() == [STEPS] * shape[0]
    assert state["refresh_step"].tolist() == [12] * shape[0]
    assert state["step"].dtype == state["refresh_step"].dtype == torch.int64
    assert state["residual_norm"].tolist() == pytest.approx(
        [e.residual_norm for e in experts], rel=tolerances.FLOAT32_STATE
    )
    for key in ("basis", "exp_avg", "exp_avg_sq"):
        stacked = torch.stack([getattr(e, key) for e in experts])
        assert relative_error(state[key], stacked) <= tolerances.FLOAT32_STATE, key


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(24, 32), (130, 40)], ids=str)
def test_a_small_residual_is_measured_not_cancelled(shape, side, formulation, share):
    """|S| is what the limiter stores; |G|^2 - |R|^2 would lose a small one in float32, and half its digits sooner.

    The first gradient has only the rank's directions and a full-rank part of relative size ``share``.
    """
    strong = low_rank_gradient(shape, true_rank=4, seed=1)
    weak = low_rank_gradient(shape, true_rank=24, seed=2, scale=share)
    within = tolerances.FLOAT32_SMALL_RESIDUAL
    state, reference = assert_parity(shape, [strong + weak] * 3, within=within, proj_type=side, formulation=formulation)
    assert share / 20 < reference.residual_share[0] < share * 20
    # float32 carries G itself to 6e-8 of |G|, so the norm of a residual of relative size s is known to 6e-8 / s.
    known_to = tolerances.FLOAT32_STATE + 1e-6 / share
    assert state["residual_norm"].item() == pytest.approx(reference.residual_norm, rel=known_to)


def assert_rounded_once(parameter, exact, before):
    """The bfloat16 weight is within half a unit in its last place of ``exact``, and the float32 arithmetic's error."""
    half_ulp = torch.ldexp(torch.ones(exact.shape), torch.frexp(exact.float())[1] - 9).double()  # 8 bits of precision
    arithmetic = tolerances.FLOAT32_VS_REFERENCE * (exact - before).abs().max()
    off = (parameter.detach().double() - exact).abs()
    assert (off <= half_ulp + arithmetic).all(), f"{(off / half_ulp).max():.3f} half units in the last place"


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (2, 10, 14), (130, 33)], ids=str)
def test_bfloat16_weights_are_the_float32_result_rounded_once(shape, formulation):
    weight = make_weight(shape, dtype=torch.bfloat16)
    gradients = make_gradients(shape, STEPS, dtype=torch.bfloat16)
    settings_ = {**BASE, "rank": 3, "weight_decay": 0.1, "formulation": formulation}
    parameter = nn.Parameter(weight.clone())
    optimizer = FiraAdam([{"params": [parameter], **settings_}], lr=LR)
    reference = (FiraStackReference if weight.dim() == 3 else FiraReference)(weight, lr=LR, **settings_)
    rounded = 0
    for gradient in gradients:
        before = parameter.detach().double()
        drive(optimizer, parameter, [gradient])
        reference.step(gradient)
        assert_rounded_once(parameter, reference.weight, before)
        rounded += int((parameter.detach().double() != reference.weight).sum())
        # Both go on from the rounded weight.
        parts = [reference] if weight.dim() == 2 else reference.experts
        for part, rounded_weight in zip(parts, parameter.detach().view(-1, *shape[-2:]), strict=True):
            part.weight = rounded_weight.double().clone()
    assert rounded > 0, "nothing was rounded: the test compared nothing"
    state = optimizer.state[parameter]
    assert {state[k].dtype for k in ("basis", "exp_avg", "exp_avg_sq", "residual_norm")} == {torch.float32}


def test_bfloat16_adamw_weights_are_rounded_once():
    parameter = nn.Parameter(make_weight((40,), dtype=torch.bfloat16))
    optimizer = FiraAdam(with_a_rank({"params": [parameter]}), lr=LR, weight_decay=0.1)
    reference = AdamWReference(parameter, lr=LR, weight_decay=0.1)
    for gradient in make_gradients((1, 40), STEPS, dtype=torch.bfloat16):
        before = parameter.detach().double()
        drive(optimizer, parameter, gradient)
        reference.step(gradient[0])
        assert_rounded_once(parameter, reference.weight, before)
        reference.weight = parameter.detach().double()


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_float64_weights_are_computed_in_float64(formulation):
    weight = make_weight((12, 20)).double()
    gradients = [g.double() for g in make_gradients((12, 20), STEPS)]
    error, state, _ = run_both(weight, gradients, **BASE, formulation=formulation, alpha=0.25)
    assert error <= tolerances.FLOAT64_VS_REFERENCE
    assert state["exp_avg"].dtype == state["basis"].dtype == torch.float64


@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    experts=st.integers(0, 2),
    rank=st.integers(1, 24),
    update_proj_gap=st.integers(1, 6),
    formulation=st.sampled_from(FORMULATIONS),
    proj_type=st.sampled_from(PROJ_TYPES),
    scaling=st.sampled_from(["column", "matrix", "none"]),
    limiter=st.sampled_from(["growth", "none"]),
    alpha=st.sampled_from([1.0, 0.5, 0.25]),
    residual_scale=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_random_settings(m, n, experts, seed, **group):
    shape = (experts, m, n) if experts else (m, n)
    assert_parity(shape, make_gradients(shape, 9, seed=seed), seed=seed, **group)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 0.26},
        {"gamma": 1.02},
        {"residual_scale": 1.01},
        {"rank": 5},
        {"update_proj_gap": 5},
        {"betas": (0.9, 0.998)},
        {"eps": 1e-5},
        {"weight_decay": 0.01},
        {"scaling": "matrix"},
        {"limiter": "none"},
        {"proj_type": "right"},
        {"formulation": "other"},
    ],
    ids=str,
)
def test_these_comparisons_can_fail(wrong, formulation):
    """One setting of the reference is put wrong: the error must stand far above the tolerance."""
    right = {**BASE, "alpha": 0.25, "formulation": formulation}
    wrong = {"formulation": FORMULATIONS[formulation == "released"]} if "formulation" in wrong else wrong
    weight, gradients = make_weight((12, 20)), make_gradients((12, 20), STEPS)
    ours, _ = run_optimizer(make_ours, weight, gradients, **right)
    theirs = run_reference(FiraReference(weight, lr=LR, **{**right, **wrong}), gradients)
    assert weight_change_error(weight, ours, theirs) > 20 * tolerances.FLOAT32_VS_REFERENCE
