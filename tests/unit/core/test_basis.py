"""What happens around a refresh: when it falls, what becomes of the moments, and what a failure leaves."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_fira import FiraAdam
from ds_fira.core.subspace import align_signs, changed_moment, refresh_due, refresh_offset
from ds_fira.sharding import refresher
from tests.reference.gradients import make_gradients, make_weight
from tests.unit.core.test_subspace import SIDES, random_basis

SHAPE, RANK = (9, 24), 4


def make(count: int = 1, **changed) -> tuple[FiraAdam, list[nn.Parameter]]:
    """An optimizer of `count` matrices."""
    params = [nn.Parameter(make_weight(SHAPE, seed=i)) for i in range(count)]
    return FiraAdam([{"params": params, "rank": RANK}], lr=0.01, **changed), params


def drive(optimizer: FiraAdam, params: list[nn.Parameter], steps: int, seed: int = 0) -> list[int]:
    """Make steps; returns how many bases each computed."""
    gradients = [make_gradients(SHAPE, steps, seed=seed + i) for i in range(len(params))]
    computed = []
    for step in range(steps):
        before = optimizer.metrics.refreshes
        for param, grads in zip(params, gradients, strict=True):
            param.grad = grads[step].clone()
        optimizer.step()
        computed.append(optimizer.metrics.refreshes - before)
    return computed


def test_staggered_matrices_refresh_on_different_steps() -> None:
    """The first step makes all bases; then each matrix has its turn once in every gap, and no step has many."""
    computed = drive(*make(12, update_proj_gap=10, stagger=True), steps=31)
    together = drive(*make(12, update_proj_gap=10), steps=31)
    assert together == [12 if step % 10 == 0 else 0 for step in range(31)]
    assert computed[0] == 12
    assert max(computed[1:]) <= 2
    for first in (1, 11, 21):
        assert sum(computed[first : first + 10]) == 12


@pytest.mark.parametrize("subspace", ["svd", "gram", "randomized"])
@pytest.mark.parametrize("refresh_moments", ["keep", "rotate", "reset"])
def test_moments_at_a_refresh(subspace: str, refresh_moments: str) -> None:
    """The step after a refresh starts from the moments that the setting says, with C = P_new' P_old."""
    optimizer, (param,) = make(update_proj_gap=3, subspace=subspace, refresh_moments=refresh_moments)
    drive(optimizer, [param], 3)
    state = optimizer.state[param]
    basis, exp_avg, exp_avg_sq = (state[key].double().clone() for key in ("basis", "exp_avg", "exp_avg_sq"))
    param.grad = make_gradients(SHAPE, 1, seed=7)[0]
    low_rank_of = param.grad.double()
    optimizer.step()
    change = state["basis"].double().t() @ basis
    if refresh_moments == "rotate":
        exp_avg, exp_avg_sq = change @ exp_avg, change.square() @ exp_avg_sq
    elif refresh_moments == "reset":
        exp_avg, exp_avg_sq = torch.zeros_like(exp_avg), torch.zeros_like(exp_avg_sq)
    low_rank = state["basis"].double().t() @ low_rank_of
    torch.testing.assert_close(state["exp_avg"].double(), 0.9 * exp_avg + 0.1 * low_rank, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        state["exp_avg_sq"].double(), 0.999 * exp_avg_sq + 0.001 * low_rank.square(), rtol=1e-5, atol=1e-9
    )
    assert (change - torch.eye(RANK)).abs().max() > 0.05, "the subspace has not moved, so nothing is tested"
    if subspace != "svd":
        assert (change.diagonal() >= 0.0).all(), "signs follow the old basis"


@pytest.mark.parametrize("refresh_limiter", ["keep", "reset"])
def test_the_limiter_at_a_refresh(refresh_limiter: str) -> None:
    """A gradient a thousand times larger: gamma times the norm before it, or its own where a refresh forgets that."""
    optimizer, (param,) = make(update_proj_gap=3, refresh_limiter=refresh_limiter, scaling="none", alpha=1.0)
    norms, whole = [], []
    for gradient, factor in zip(make_gradients(SHAPE, 5), (1, 1, 1, 1000, 1000), strict=True):
        param.grad = factor * gradient
        optimizer.step()
        norms.append(float(optimizer.state[param]["residual_norm"]))
        basis = optimizer.state[param]["basis"].double()
        whole.append(float((param.grad.double() - basis @ (basis.t() @ param.grad.double())).norm()))
    expected = 1.01 * norms[2] if refresh_limiter == "keep" else whole[3]
    assert norms[3] == pytest.approx(expected, rel=1e-4)
    assert norms[4] == pytest.approx(min(1.01 * norms[3], whole[4]), rel=1e-4)
    assert whole[3] > 100 * norms[2]


@pytest.mark.parametrize("subspace", ["gram", "randomized"])
def test_a_decomposition_that_fails_keeps_the_old_basis_and_warns_once(monkeypatch, subspace: str) -> None:
    optimizer, (param,) = make(update_proj_gap=3, subspace=subspace)
    drive(optimizer, [param], 3)
    basis = optimizer.state[param]["basis"].clone()

    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(torch.linalg, "eigh", fails)
        assert drive(optimizer, [param], 4, seed=3) == [0, 0, 0, 0]
    assert [str(w.message) for w in caught if "decomposition failed" in str(w.message)] != []
    assert len([w for w in caught if "decomposition failed" in str(w.message)]) == 1
    assert torch.equal(optimizer.state[param]["basis"], basis)
    assert param.isfinite().all()
    # It is due until it is done.
    assert drive(optimizer, [param], 1, seed=5) == [1]


def test_slow_exact_decompositions_are_told_of_once(monkeypatch) -> None:
    """Seconds spent on SVDs; never a word about the other methods, or about a quick one."""
    for subspace, limit, expected in (("svd", 0.0, 1), ("gram", 0.0, 0), ("svd", 30.0, 0)):
        monkeypatch.setattr(refresher, "SLOW_SECONDS", limit)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer, params = make(2, update_proj_gap=2, subspace=subspace)
            drive(optimizer, params, 5)
        said = [str(w.message) for w in caught if "'randomized' is many times faster" in str(w.message)]
        assert len(said) == expected, said


def test_a_basis_in_bfloat16_is_a_start_like_any_other() -> None:
    """Compressed states keep the basis in bfloat16: refreshes start from it, and the weights follow float32's."""
    ends = {}
    for state_dtype in ("float32", "bfloat16"):
        optimizer, (param,) = make(
            update_proj_gap=3, subspace="randomized", refresh_moments="rotate", state_dtype=state_dtype
        )
        start = param.detach().clone()
        drive(optimizer, [param], 10)
        ends[state_dtype] = param.detach() - start
        assert optimizer.state[param]["basis"].dtype == getattr(torch, state_dtype)
        assert optimizer.state[param]["exp_avg"].dtype == getattr(torch, state_dtype)
    # Ten steps of rounding by 2^-9 in P, M and V.
    assert (ends["bfloat16"] - ends["float32"]).norm() <= 0.03 * ends["float32"].norm()


def test_align_signs_turns_columns_to_the_previous_ones() -> None:
    previous = random_basis((9, 12), 4, "left")
    turned = previous * torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert torch.equal(align_signs(turned, previous), previous)
    assert torch.equal(align_signs(previous, torch.zeros_like(previous)), previous)


@pytest.mark.parametrize("side", SIDES)
def test_rotated_moments_are_those_of_the_new_basis(side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    old = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0][:, :5]
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    new = old @ turn  # the same subspace, so nothing of M may be lost
    low_rank = old.t() @ grad if side == "left" else grad @ old
    exp_avg, exp_avg_sq = low_rank.clone(), low_rank.square()
    exp_avg = changed_moment(exp_avg, new.t() @ old, side)
    exp_avg_sq = changed_moment(exp_avg_sq, (new.t() @ old).square(), side)
    expected = new.t() @ grad if side == "left" else grad @ new
    assert (exp_avg - expected).abs().max() <= 1e-12
    weights = np.square(new.numpy().T @ old.numpy())
    square = low_rank.square().numpy()
    expected_sq = weights @ square if side == "left" else square @ weights.T
    assert np.abs(exp_avg_sq.numpy() - expected_sq).max() <= 1e-12


@given(gap=st.integers(1, 50), phase=st.integers(0, 49), first=st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_refreshes_fall_on_the_multiples_plus_the_phase(gap: int, phase: int, first: int) -> None:
    phase %= gap
    refreshed, last = [], -1
    for step in range(first, first + 4 * gap + 1):
        if refresh_due(step, last, gap, phase):
            refreshed.append(step)
            last = step
    assert refreshed == [first] + [
        step for step in range(first + 1, first + 4 * gap + 1) if (step - phase) % gap == 0 and step >= phase
    ]


def test_a_late_refresh_does_not_move_the_next() -> None:
    assert not refresh_due(109, 107, 100, 10)
    assert refresh_due(112, 107, 100, 10)  # due since 110
    assert not refresh_due(209, 112, 100, 10)
    assert refresh_due(210, 112, 100, 10)


@pytest.mark.parametrize("gap", [1, 7, 200])
def test_stagger_phases_spread_over_the_gap(gap: int) -> None:
    phases = [refresh_offset(index, gap) for index in range(1000)]
    assert phases[0] == 0
    assert all(0 <= phase < gap for phase in phases)
    for first in (0, 13, 500):
        counts = np.bincount(phases[first : first + 2 * gap], minlength=gap)
        assert counts.max() <= 4, "a step has to do more than twice its share"
    taken = sorted(refresh_offset(index, 10_000) for index in range(0, 160, 8))  # one rank's of eight
    nearest = min((later - earlier) % 10_000 for earlier, later in zip(taken, taken[1:] + taken[:1], strict=True))
    assert nearest >= 10_000 / (math.sqrt(5) * 160) - 1
