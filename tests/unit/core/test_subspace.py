"""Bases: against float64 decompositions, at every scale, and on real gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ds_fira.core.subspace import (
    align_signs,
    basis_shape,
    compute_basis,
)
from tests.grids import half
from tests.unit.core.subspace_cases import ORTHONORMAL, SIDES, gradient, orthonormality, random_basis, relative_energy

METHODS = ["svd", "gram", "randomized"]
SHAPES = [(1, 1), (1, 9), (9, 1), (7, 13), (13, 7), (33, 33), (90, 119), (119, 90), (91, 91)]


@pytest.mark.parametrize(
    ("method", "rank", "side", "shape"), half(["gram", "svd"], [1, 5, 40, 1000], SIDES, SHAPES), ids=str
)
def test_exact_methods_capture_the_optimal_energy(method: str, rank: int, side: str, shape: tuple[int, int]) -> None:
    grad = gradient(shape)
    basis = compute_basis(grad, rank, side, method)
    assert tuple(basis.shape) == basis_shape(shape, rank, side)
    assert basis.is_contiguous()
    assert basis.dtype == torch.float32
    assert orthonormality(basis) <= ORTHONORMAL
    assert abs(relative_energy(grad, basis, side) - 1.0) <= 1e-5


@pytest.mark.parametrize(
    ("warm", "rank", "side", "shape"), half([False, True], [1, 5, 40, 1000], SIDES, SHAPES), ids=str
)
def test_randomized_is_orthonormal_and_near_the_optimum(
    warm: bool, rank: int, side: str, shape: tuple[int, int], way: str
) -> None:
    grad = gradient(shape)
    previous = random_basis(shape, rank, side) if warm else None
    basis = compute_basis(grad, rank, side, "randomized", previous)
    assert tuple(basis.shape) == basis_shape(shape, rank, side)
    assert orthonormality(basis) <= ORTHONORMAL
    # A random basis is the worst warm start: it knows nothing.
    assert 0.99 <= relative_energy(grad, basis, side) <= 1.0 + 1e-5


def test_svd_is_the_released_call() -> None:
    grad = gradient((13, 7))
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    assert torch.equal(compute_basis(grad, 3, "left", "svd"), u[:, :3])
    assert torch.equal(compute_basis(grad, 3, "right", "svd"), vh[:3].t())
    assert torch.equal(compute_basis(grad, 3, "right", "svd", -vh[:3].t()), vh[:3].t())


@pytest.mark.parametrize("shape", [(21, 34), (34, 21), (25, 25)])
@pytest.mark.parametrize("side", SIDES)
def test_gram_finds_the_singular_vectors_in_float64(shape: tuple[int, int], side: str) -> None:
    grad = gradient(shape, decay=0.6, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    expected = (u if side == "left" else vh.t())[:, :6]
    basis = compute_basis(grad, 6, side, "gram")
    assert basis.dtype == torch.float64
    assert (align_signs(basis, expected) - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(90, 105), (105, 90)])
def test_randomized_computes_float64_in_float64(shape: tuple[int, int], side: str, way: str) -> None:
    basis = compute_basis(gradient(shape, decay=0.5, dtype=torch.float64), 20, side, "randomized")
    assert basis.dtype == torch.float64
    assert orthonormality(basis) <= 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_low_precision_gradients_are_converted(method: str) -> None:
    grad = gradient((40, 60)).bfloat16()
    assert torch.equal(compute_basis(grad, 8, "left", method), compute_basis(grad.float(), 8, "left", method))


@pytest.mark.parametrize("scale", [2.0**-60, 1e-30, 1e30, 2.0**60])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(90, 119), (119, 90)])
def test_scales_change_nothing(shape: tuple[int, int], side: str, scale: float, way: str) -> None:
    grad = gradient(shape)
    for method in ("gram", "randomized"):
        basis = compute_basis(grad * scale, 20, side, method)
        assert orthonormality(basis) <= ORTHONORMAL
        assert relative_energy(grad, basis, side) >= 0.99
        if math.log2(scale).is_integer():
            # Divided by a power of two, the numbers are the same to the bit.
            assert torch.equal(basis, compute_basis(grad, 20, side, method))


def deficient_gradients() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    column, row = torch.randn(80, 1, generator=generator), torch.randn(1, 95, generator=generator)
    rows = torch.randn(80, 95, generator=generator)
    rows[5:] = 0.0
    single = torch.zeros(80, 95)
    single[17, 4] = -2.0
    flat = torch.zeros(80, 95)
    flat[:, :80] = torch.eye(80)
    return {"rank 1": column @ row, "zero rows": rows, "one element": single, "repeated values": flat}


@pytest.mark.parametrize(
    ("method", "side", "name", "warm"), half(METHODS, SIDES, deficient_gradients(), [False, True]), ids=str
)
def test_deficient_gradients_get_a_full_basis(name: str, side: str, method: str, warm: bool, way: str) -> None:
    grad = deficient_gradients()[name]
    for g, s in ((grad, side), (grad.t(), {"left": "right", "right": "left"}[side])):
        previous = random_basis((g.shape[0], g.shape[1]), 12, s) if warm else None
        basis = compute_basis(g, 12, s, method, previous)
        assert orthonormality(basis) <= ORTHONORMAL
        assert relative_energy(g, basis, s) >= 1.0 - 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_failure_is_a_linear_algebra_error(method: str, value: float, way: str) -> None:
    grad = gradient((300, 310))
    grad[3, 5] = value
    with pytest.raises(torch.linalg.LinAlgError):
        compute_basis(grad, 10, "left", method)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="'qr'"):
        compute_basis(gradient((4, 5)), 2, "left", "qr")
