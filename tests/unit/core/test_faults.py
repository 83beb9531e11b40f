"""Gradients that are zero, not finite, rank-deficient or of absurd size, and an SVD that fails.

Each fault of the released code is shown in fira 1.0.2 beside what FiraAdam does, so that the contrast is real.
"""

import math
import warnings

import pytest
import torch
from fira import FiraAdamW
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_fira import FiraAdam
from tests.reference import tolerances
from tests.reference.fira_reference import AdamWReference, FiraReference
from tests.reference.gradients import low_rank_gradient, make_gradients, make_weight
from tests.reference.harness import drive, run_optimizer, run_reference, weight_change_error, with_a_rank

LR = 1e-2
SHAPE, EXPERTS = (10, 14), (3, 10, 14)
GROUP = {"rank": 4, "update_proj_gap": 4}
FIRA_GROUP = {**GROUP, "alpha": 1.0, "proj_type": "std"}  # fira has no defaults for these
FORMULATIONS = ["released", "paper"]
KINDS = ["normal", "zero", "nan", "inf", "minus_inf", "low_rank"]


def make_ours(groups, **settings):
    return FiraAdam(groups, lr=LR, **settings)


def make_fira(groups, **settings):
    return FiraAdamW(groups, lr=LR, no_deprecation_warning=True, **settings)


def ours_and_reference(**changed):
    group = {**GROUP, **changed}
    parameter = nn.Parameter(make_weight(SHAPE))
    return make_ours([{"params": [parameter], **group}]), parameter, FiraReference(parameter, lr=LR, **group)


def spoil(gradient, kind):
    """A copy of ``gradient`` with one fault in it."""
    gradient = gradient.clone()
    if kind == "zero":
        return torch.zeros_like(gradient)
    if kind == "low_rank":
        return low_rank_gradient(gradient.shape, true_rank=4, seed=int(gradient[0, 0].abs() * 1e6))
    if kind != "normal":
        gradient[3, 5] = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf}[kind]
    return gradient


def snapshot(optimizer, parameter):
    return {key: value.clone() for key, value in optimizer.state[parameter].items()}


def assert_same(state, before, keys=None):
    assert set(state) == set(before)
    for key in keys or before:
        assert torch.equal(state[key], before[key]), key


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


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_gradients_of_absurd_size_leave_everything_finite(formulation, size):
    optimizer, parameter, _ = ours_and_reference(formulation=formulation)
    gradients = make_gradients(SHAPE, 10)
    for index, gradient in enumerate(gradients):
        before = parameter.detach().clone()
        drive(optimizer, parameter, [gradient * size if index in (0, 3, 5) else gradient])
        assert parameter.isfinite().all(), index
        for key, value in optimizer.state[parameter].items():
            assert value.isfinite().all(), (key, index)
        assert (parameter.detach() - before).abs().max() <= 100 * LR, "Adam's step is bounded whatever the gradient"
    assert not torch.equal(parameter, before)


@pytest.mark.parametrize("size", [1e18, 2e18, 3e18, 1e19])
@pytest.mark.parametrize("shape", [(128, 200), (200, 128)], ids=str)
def test_the_state_stays_finite_where_squares_begin_to_overflow(shape, size):
    """float32 ends at 3.4e38: single squares are finite here, sums of them not always, and which differs by axis."""
    parameter = nn.Parameter(make_weight(shape))
    optimizer = make_ours([{"params": [parameter], **GROUP}])
    ordinary = make_gradients(shape, 2)
    for gradient in (size * (1 + ordinary[0]), ordinary[1]):
        drive(optimizer, parameter, [gradient])
        assert parameter.isfinite().all()
        for key, value in optimizer.state[parameter].items():
            assert value.isfinite().all(), key


@pytest.mark.parametrize("failing", ["later", "from_the_start"])
def test_an_svd_that_fails_keeps_the_old_basis_and_warns_once(monkeypatch, failing):
    optimizer, parameter, reference = ours_and_reference(update_proj_gap=4)
    gradients, start, svd = make_gradients(SHAPE, 14), parameter.detach().clone(), torch.linalg.svd

    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    if failing == "later":
        drive(optimizer, parameter, gradients[:4])
        run_reference(reference, gradients[:4])
    monkeypatch.setattr(torch.linalg, "svd", fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drive(optimizer, parameter, gradients[4:11])  # two refreshes fall in here
    assert len([w for w in caught if "svd" in str(w.message).lower()]) == 1, [str(w.message) for w in caught]
    monkeypatch.setattr(torch.linalg, "svd", svd)
    assert parameter.isfinite().all()
    if failing == "from_the_start":
        assert torch.equal(parameter, start)
        assert optimizer.state[parameter]["step"].item() == 0
        drive(optimizer, parameter, gradients)
        run_reference(reference, gradients)
    else:
        assert optimizer.state[parameter]["refresh_step"].item() == 0
        reference.update_proj_gap = 100  # seven more steps on the first basis
        run_reference(reference, gradients[4:11])
    assert weight_change_error(start, parameter.detach(), reference.weight) <= tolerances.FLOAT32_VS_REFERENCE


def test_adamw_leaves_elements_without_a_finite_gradient_alone():
    parameter = nn.Parameter(make_weight((6, 5)))
    optimizer = FiraAdam(with_a_rank({"params": [parameter]}), lr=LR, weight_decay=0.1)
    reference = AdamWReference(parameter, lr=LR, weight_decay=0.1)
    start = parameter.detach().clone()
    for index, gradient in enumerate(make_gradients((6, 5), 6)):
        if index in (0, 3):
            gradient[2, 3], gradient[0, 0] = math.nan, math.inf
        before = parameter.detach().clone()
        drive(optimizer, parameter, [gradient])
        reference.step(gradient)
        for element in ((2, 3), (0, 0)):
            assert (parameter[element] == before[element]) == (index in (0, 3))
    state = optimizer.state[parameter]
    assert state["exp_avg"].isfinite().all()
    assert state["exp_avg_sq"].isfinite().all()
    assert weight_change_error(start, parameter.detach(), reference.weight) <= tolerances.FLOAT32_VS_REFERENCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_of_low_precision_gradients_is_no_history(dtype):
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(64, 3, generator=generator) @ torch.randn(3, 96, generator=generator)
    parameter = nn.Parameter(torch.zeros(64, 96, dtype=dtype))
    optimizer = FiraAdam([{"params": [parameter], "rank": 3}], lr=0.01)
    parameter.grad = low_rank.to(dtype)
    outside = parameter.grad.float() - low_rank
    assert outside.norm() > 1e-4 * low_rank.norm(), "rounded as a float32 gradient would be: the test says nothing"
    optimizer.step()
    assert optimizer.state[parameter]["residual_norm"] == 0.0
    parameter.grad = torch.randn(64, 96, generator=generator).to(dtype)
    optimizer.step()
    assert optimizer.state[parameter]["residual_norm"] > 0.0
