"""What happens around a refresh: when it falls, what becomes of the moments, and what a failure leaves."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from ds_fira import FiraAdam, refresh
from tests.reference.gradients import make_gradients, make_weight

SHAPE, RANK = (9, 24), 4


def make(count: int = 1, **settings) -> tuple[FiraAdam, list[nn.Parameter]]:
    """An optimizer of `count` matrices."""
    params = [nn.Parameter(make_weight(SHAPE, seed=i)) for i in range(count)]
    return FiraAdam([{"params": params, "rank": RANK}], lr=0.01, **settings), params


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
        monkeypatch.setattr(refresh, "SLOW_SECONDS", limit)
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
