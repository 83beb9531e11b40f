"""Bases without Rayleigh-Ritz, for moments that are rotated: a subspace as good, any orthonormal basis of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_fira.core import orthonormal, subspace_solvers
from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.basis import basis_of
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import allocate, matrix_states
from ds_fira.core.subspace import compute_basis
from ds_fira.optim.settings import check_params
from tests.unit.core.subspace_cases import ORTHONORMAL, SIDES, gradient, orthonormality, random_basis, relative_energy
from tests.unit.core.test_subspace import deficient_gradients

# A third of the smaller side; below a quarter the iteration ends with Rayleigh-Ritz in any case.
RANK = 30


@pytest.fixture(params=["gram", "direct", "bfloat16"])
def iterated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways that iterate; the exact one has no start."""
    monkeypatch.setattr(subspace_solvers, "cheapest", lambda *_: "gram" if request.param == "gram" else "direct")
    monkeypatch.setattr(subspace_solvers, "fast_bfloat16", lambda _: request.param == "bfloat16")
    return request.param


def follow(grad: Tensor, rank: int, side: str, previous: Tensor) -> Tensor:
    return compute_basis(grad, rank, side, "randomized", previous, ordered=False)


def drifted(shape: tuple[int, int], rank: int, side: str, decay: float = 0.97) -> tuple[Tensor, Tensor]:
    """A gradient, and the exact basis of an earlier one that shares a part of it."""
    grad = gradient(shape, decay)
    return grad, compute_basis(grad + 0.5 * gradient(shape, decay, seed=1), rank, side, "svd")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(90, 119), (119, 90), (91, 91)])
def test_it_is_orthonormal_and_near_the_optimum(shape: tuple[int, int], side: str, iterated: str) -> None:
    grad, previous = drifted(shape, RANK, side)
    basis = follow(grad, RANK, side, previous)
    assert orthonormality(basis) <= ORTHONORMAL
    assert basis.is_contiguous()
    # A third of these directions have much the same singular values, of which a count sketch takes what it meets;
    # real gradients, which have not, are in `test_subspace_solvers`.
    folds = iterated == "direct" and (side == "left" if shape[0] < shape[1] else side == "right" or shape == (91, 91))
    assert relative_energy(grad, basis, side) >= (0.97 if folds else 0.99)
    # The old basis is not enough, so the test can fail.
    assert relative_energy(grad, previous, side) < 0.95


@pytest.mark.parametrize("name", deficient_gradients())
@pytest.mark.parametrize("side", SIDES)
def test_deficient_gradients_get_a_full_basis(
    name: str, side: str, iterated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1, zero rows and columns, one element: the factor of the block does not exist, and Householder's does."""
    fallbacks = []
    householder = orthonormal._householder
    monkeypatch.setattr(orthonormal, "_householder", lambda rows: fallbacks.append(1) or householder(rows))
    grad = deficient_gradients()[name]
    for g, s in ((grad, side), (grad.t(), {"left": "right", "right": "left"}[side])):
        basis = follow(g, RANK, s, random_basis((g.shape[0], g.shape[1]), RANK, s))
        assert orthonormality(basis) <= ORTHONORMAL
        if name != "repeated values":  # any 30 of 80 equal directions are the best
            assert relative_energy(g, basis, s) >= 1.0 - 1e-4
    # Rounded to bfloat16, products of a matrix of rank 1 may have a full rank.
    if (name, iterated) != ("rank 1", "bfloat16"):
        assert bool(fallbacks) == (name != "repeated values")


def test_no_eigendecomposition_where_moments_are_rotated(iterated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the setting: "rotate" does without from the second basis on, "keep" and "reset" do not."""
    grad, previous = drifted((90, 119), RANK, "left")
    called = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: called.append(tuple(a.shape)) or eigh(a))
    for moments, start, expected in (
        ("rotate", previous, 0),
        ("rotate", None, 1),
        ("keep", previous, 1),
        ("reset", previous, 1),
    ):
        settings = GroupSettings.of(
            check_params({"rank": RANK, "subspace": "randomized", "refresh_moments": moments, "proj_type": "left"})
        )
        weight = torch.zeros(90, 119)
        state = allocate(weight, [(90, 119)], settings, False)
        (view,) = matrix_states(state, [(90, 119)], settings, False, FIRA_ADAM)
        called.clear()
        basis_of(grad, view, settings, start)
        assert len(called) == expected, moments


def test_it_repeats_to_the_bit_whatever_the_global_seed(iterated: str) -> None:
    grad, previous = drifted((90, 119), RANK, "left")
    torch.manual_seed(1)
    first = follow(grad, RANK, "left", previous)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3)), "the global generator was used"
    assert torch.equal(first, follow(grad, RANK, "left", previous))


def test_it_finds_what_the_old_basis_is_blind_to(iterated: str) -> None:
    """A basis outside of the gradient: the products take nothing from it, and all from the Gaussian beside it."""
    grad = torch.zeros(300, 400)
    grad[:50] = gradient((50, 400), decay=0.9)
    previous = torch.eye(300)[:, 100:175]
    assert relative_energy(grad, previous, "left") == 0.0
    assert relative_energy(grad, follow(grad, 75, "left", previous), "left") >= 0.95


def test_a_sketch_is_for_fast_products_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the strict precision, nor for float64; nor for the long side, whose basis half a product ends."""
    monkeypatch.setattr(subspace_solvers, "cheapest", lambda *_: "direct")
    monkeypatch.setattr(subspace_solvers, "fast_bfloat16", lambda _: False)
    folded, fold = [], subspace_solvers.fold
    monkeypatch.setattr(subspace_solvers, "fold", lambda x, k, inverse: folded.append(k) or fold(x, k, inverse))
    grad, previous = drifted((90, 250), RANK, "left")
    fast = follow(grad, RANK, "left", previous)
    assert folded == [45, 125]
    strict = compute_basis(grad, RANK, "left", "randomized", previous, strict=True, ordered=False)
    follow(grad.double(), RANK, "left", previous.double())
    follow(grad, RANK, "right", drifted((90, 250), RANK, "right")[1])
    assert folded == [45, 125]
    assert relative_energy(grad, strict, "left") > relative_energy(grad, fast, "left")


def test_a_sketch_has_the_gram_matrix_on_average() -> None:
    """Over the signs of many columns XSS'X' is XX'; no column is left out, and the scale is taken off."""
    # A part that all columns share, which sums without signs would count four times.
    x = gradient((6, 4000), decay=0.9, dtype=torch.float64) + 4000**-0.5
    sketch = subspace_solvers.fold(x, 1000, torch.full((1, 1), 0.5, dtype=torch.float64))
    # 12,000 products of columns of square norm 1 / 2000 with random signs: five standard deviations. Without signs it
    # is 3.
    assert (sketch @ sketch.t() * 4.0 - x @ x.t()).abs().max() <= 5 * 12_000**0.5 / 2000
    single = torch.zeros(5, 4000)
    single[3, 3777] = 8.0
    assert torch.equal(
        subspace_solvers.fold(single, 1000, torch.tensor([[0.5]])).abs().nonzero(), torch.tensor([[3, 777]])
    )


def test_columns_keep_near_their_places(iterated: str) -> None:
    """As an orthogonal iteration does: a basis of the same subspace is returned column by column."""
    grad = gradient((90, 119), decay=0.9)
    previous = compute_basis(grad, RANK, "left", "svd")
    basis = follow(grad, RANK, "left", previous)
    overlap = (basis * previous).sum(dim=0).abs()
    assert overlap[:15].min() >= 0.9


def test_float64_stays_float64() -> None:
    grad = gradient((300, 310), dtype=torch.float64)
    previous = random_basis((300, 310), 80, "left").double()
    basis = follow(grad, 80, "left", previous)
    assert basis.dtype == torch.float64
    assert orthonormality(basis) <= 1e-13


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(90, 119), (119, 90)])
def test_a_batch_is_its_matrices_one_by_one(
    shape: tuple[int, int], side: str, warm: bool, ordered: bool, way: str
) -> None:
    """The same subspaces to 1e-4 of rounding; a deficient matrix among them does not disturb the others."""
    grads = [gradient(shape, 0.9, seed) for seed in range(3)]
    grads[1] = torch.zeros(shape)
    grads[1][3, 5] = 2.0
    previous = [random_basis(shape, RANK, side, seed) if warm else None for seed in range(3)]
    stacked = torch.stack(previous) if warm else None
    together = compute_basis(torch.stack(grads), RANK, side, "randomized", stacked, ordered=ordered)
    assert together.is_contiguous()
    for grad, start, found in zip(grads, previous, together, strict=True):
        alone = compute_basis(grad, RANK, side, "randomized", start, ordered=ordered)
        assert orthonormality(found) <= ORTHONORMAL
        assert abs(relative_energy(grad, found, side) - relative_energy(grad, alone, side)) <= 1e-4
