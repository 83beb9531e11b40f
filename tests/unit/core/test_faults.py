"""Gradients that are zero, not finite, rank-deficient or of absurd size, and an SVD that fails.

Each fault of the released code is shown in fira 1.0.2 beside what FiraAdam does, so that the contrast is real.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.reference import tolerances
from tests.reference.fira_reference import FiraReference
from tests.reference.gradients import low_rank_gradient, make_gradients, make_weight
from tests.reference.harness import drive, run_optimizer, run_reference, weight_change_error
from tests.unit.core.fault_cases import (
    EXPERTS,
    FORMULATIONS,
    GROUP,
    LR,
    SHAPE,
    assert_same,
    make_fira,
    make_ours,
    ours_and_reference,
    snapshot,
    spoil,
)

FIRA_GROUP = {**GROUP, "alpha": 1.0, "proj_type": "std"}  # fira has no defaults for these
KINDS = ["normal", "zero", "nan", "inf", "minus_inf", "low_rank"]


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_a_zero_first_gradient_starts_nothing(formulation):
    optimizer, parameter, reference = ours_and_reference(formulation=formulation, weight_decay=0.1)
    start, zero = parameter.detach().clone(), torch.zeros(SHAPE)
    drive(optimizer, parameter, [zero, zero])
    state = optimizer.state[parameter]
    assert state["step"].item() == 0
    assert state["refresh_step"].item() == -1
    assert state["residual_norm"].item() == 0.0
    torch.testing.assert_close(parameter.detach(), start * (1 - LR * 0.1) ** 2, rtol=1e-6, atol=0.0)  # decay alone
    run_reference(reference, [zero, zero])
    gradients = make_gradients(SHAPE, 9)
    drive(optimizer, parameter, gradients)
    assert weight_change_error(start, parameter.detach(), run_reference(reference, gradients)) <= (
        tolerances.FLOAT32_VS_REFERENCE
    )
    assert state["step"].item() == 9


@pytest.mark.parametrize("kind", ["zero", "inside_the_basis"])
def test_fira_pins_the_residual_after_such_a_first_gradient_and_we_do_not(kind):
    weight, gradients = make_weight(SHAPE), make_gradients(SHAPE, 30)
    first = torch.zeros(SHAPE) if kind == "zero" else low_rank_gradient(SHAPE, true_rank=4, scale=0.1)
    sequence = [first, *gradients]
    _, theirs = run_optimizer(make_fira, weight, sequence, **FIRA_GROUP)
    ours_weight, ours = run_optimizer(make_ours, weight, sequence, **GROUP)
    free = FiraReference(weight, limiter="none", lr=LR, **GROUP)
    run_reference(free, sequence)
    assert theirs["scaling_grad"].item() < 1e-4 * free.residual_norm, "fira no longer pins: the contrast is gone"
    assert ours["residual_norm"].item() > 0.1 * free.residual_norm
    reference = FiraReference(weight, lr=LR, **GROUP)
    assert weight_change_error(weight, ours_weight, run_reference(reference, sequence)) <= (
        tolerances.FLOAT32_VS_REFERENCE
    )


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_a_gradient_inside_the_basis_leaves_no_limiter_history(proj_type, formulation):
    optimizer, parameter, reference = ours_and_reference(proj_type=proj_type, formulation=formulation)
    inside, *real = [low_rank_gradient(SHAPE, true_rank=4, scale=0.1), *make_gradients(SHAPE, 3)]
    state = optimizer.state
    drive(optimizer, parameter, [inside])
    reference.step(inside)
    assert state[parameter]["refresh_step"].item() == 0
    assert state[parameter]["residual_norm"].item() == 0.0
    for gradient in real:
        drive(optimizer, parameter, [gradient])
        reference.step(gradient)
        assert reference.residual_norm > 0.0
        assert state[parameter]["residual_norm"].item() == pytest.approx(reference.residual_norm, rel=1e-4)
    assert not reference.limited[1], "the first real residual has nothing to be limited by"


@pytest.mark.parametrize("when", [0, 3, 4], ids=["first", "between_refreshes", "at_a_refresh"])
@pytest.mark.parametrize("kind", ["nan", "inf", "minus_inf"])
def test_a_gradient_that_is_not_finite_changes_nothing(kind, when):
    optimizer, parameter, reference = ours_and_reference(weight_decay=0.1)
    gradients = make_gradients(SHAPE, 10)
    start = parameter.detach().clone()
    drive(optimizer, parameter, gradients[:when])
    weight, before = parameter.detach().clone(), snapshot(optimizer, parameter) if when else None
    drive(optimizer, parameter, [spoil(gradients[when], kind)])
    assert torch.equal(parameter, weight)
    if when:
        assert_same(optimizer.state[parameter], before)
    else:
        assert optimizer.state[parameter].get("step", torch.tensor(0)).item() == 0
    drive(optimizer, parameter, gradients[when:])  # and the run goes on as if the step had not been
    assert weight_change_error(start, parameter.detach(), run_reference(reference, gradients)) <= (
        tolerances.FLOAT32_VS_REFERENCE
    )


def test_fira_is_poisoned_for_good_by_one_nan():
    gradients = make_gradients(SHAPE, 10)
    gradients[3] = spoil(gradients[3], "nan")
    theirs, state = run_optimizer(make_fira, make_weight(SHAPE), gradients[:4] + gradients[5:8], **FIRA_GROUP)
    assert theirs.isnan().any()
    assert state["exp_avg"].isnan().any()
    ours, state = run_optimizer(make_ours, make_weight(SHAPE), gradients, **GROUP)
    assert ours.isfinite().all()
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_a_zero_gradient_later_is_a_momentum_step_without_history(formulation):
    optimizer, parameter, reference = ours_and_reference(formulation=formulation, weight_decay=0.1)
    gradients = make_gradients(SHAPE, 4)
    drive(optimizer, parameter, gradients[:2])
    run_reference(reference, gradients[:2])
    before, weight = snapshot(optimizer, parameter), parameter.detach().clone()
    assert before["residual_norm"].item() > 0.0
    drive(optimizer, parameter, [torch.zeros(SHAPE)])
    reference.step(torch.zeros(SHAPE))
    state = optimizer.state[parameter]
    assert state["step"].item() == 3
    assert state["residual_norm"].item() == 0.0
    torch.testing.assert_close(state["exp_avg"], 0.9 * before["exp_avg"], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(state["exp_avg_sq"], 0.999 * before["exp_avg_sq"], rtol=1e-6, atol=0.0)
    assert_same(state, before, ["basis", "refresh_step"])
    assert weight_change_error(weight, parameter.detach(), reference.weight) <= tolerances.FLOAT32_VS_REFERENCE
    drive(optimizer, parameter, gradients[2:3])
    reference.step(gradients[2])
    assert not reference.limited[-1]
    assert state["residual_norm"].item() == pytest.approx(reference.residual_norm, rel=tolerances.FLOAT32_STATE)


def test_a_due_refresh_waits_for_a_usable_gradient():
    optimizer, parameter, reference = ours_and_reference()
    gradients = make_gradients(SHAPE, 12)
    gradients[4] = torch.zeros(SHAPE)  # due here
    seen, start = [], parameter.detach().clone()
    for gradient in gradients:
        drive(optimizer, parameter, [gradient])
        reference.step(gradient)
        seen.append(optimizer.state[parameter]["refresh_step"].item())
    assert seen == [0, 0, 0, 0, 0, 5, 5, 5, 8, 8, 8, 8]  # late once, then on the schedule again
    assert reference.refreshes == [0, 5, 8]
    assert weight_change_error(start, parameter.detach(), reference.weight) <= tolerances.FLOAT32_VS_REFERENCE


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=10),
    formulation=st.sampled_from(FORMULATIONS),
    alpha=st.sampled_from([1.0, 0.25]),
    gap=st.integers(1, 4),
    proj_type=st.sampled_from(["left", "right"]),
)
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_any_sequence_of_faults_follows_the_reference(kinds, formulation, alpha, gap, proj_type):
    optimizer, parameter, reference = ours_and_reference(
        formulation=formulation, alpha=alpha, update_proj_gap=gap, weight_decay=0.1, proj_type=proj_type
    )
    start = parameter.detach().clone()
    for kind, gradient in zip(kinds, make_gradients(SHAPE, len(kinds)), strict=True):
        spoiled = spoil(gradient, kind)
        drive(optimizer, parameter, [spoiled])
        reference.step(spoiled)
        state = optimizer.state[parameter]
        if "step" in state:
            assert (state["step"].item(), state["refresh_step"].item()) == (reference.steps, reference.refresh_step)
            assert (state["residual_norm"].item() == 0.0) == (reference.residual_norm == 0.0), kind
    if reference.steps or "zero" in kinds:
        error = weight_change_error(start, parameter.detach(), reference.weight)
        assert error <= (tolerances.FLOAT32_VS_REFERENCE if reference.steps else tolerances.FLOAT32_DECAY_ALONE)


@pytest.mark.parametrize("kind", ["zero", "nan"])
def test_one_experts_fault_is_not_anothers(kind):
    parameter = nn.Parameter(make_weight(EXPERTS))
    optimizer = make_ours([{"params": [parameter], **GROUP, "weight_decay": 0.1}])
    references = [FiraReference(w, lr=LR, weight_decay=0.1, **GROUP) for w in parameter]
    start = parameter.detach().clone()
    for index, gradient in enumerate(make_gradients(EXPERTS, 10)):
        if index in (0, 1, 6):
            gradient[1] = 0.0 if kind == "zero" else math.nan
        drive(optimizer, parameter, [gradient])
        for reference, expert in zip(references, gradient, strict=True):
            reference.step(expert)
    state = optimizer.state[parameter]
    assert state["step"].tolist() == [r.steps for r in references] == [10, 8 if kind == "zero" else 7, 10]
    assert state["refresh_step"].tolist() == [r.refresh_step for r in references]
    for before, ours, reference in zip(start, parameter.detach(), references, strict=True):
        assert weight_change_error(before, ours, reference.weight) <= tolerances.FLOAT32_VS_REFERENCE
