"""Gradients of absurd size or low precision, an SVD that fails, and AdamW's elements."""

import math
import warnings

import pytest
import torch
from torch import nn

from ds_fira import FiraAdam
from tests.reference import tolerances
from tests.reference.fira_reference import AdamWReference
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import drive, run_reference, weight_change_error, with_a_rank
from tests.unit.core.fault_cases import FORMULATIONS, GROUP, LR, SHAPE, make_ours, ours_and_reference


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
