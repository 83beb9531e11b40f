"""The Triton kernels that multiply, against float64 arithmetic: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ds_fira.core import kernels
from tests.grids import once
from tests.unit.core.kernel_cases import (
    BETAS,
    CASES,
    DEVICE,
    PRODUCT,
    ROUNDING,
    SIDES,
    SQUARES,
    error,
    flag,
    random,
    random_basis,
)

pytest.importorskip("triton", reason="Triton is not installed, and without it there are no kernels")
# What the interpreter's NumPy says of the NaN and infinity that it is given here.
pytestmark = [
    pytest.mark.usefixtures("kernels_allowed"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


@pytest.mark.parametrize(
    ("side", "case", "dtype"), once(SIDES, CASES, [torch.float32, torch.bfloat16, torch.float16]), ids=str
)
def test_projection_and_norms(side: str, case: Any, dtype: torch.dtype) -> None:
    batch, (m, n, rank) = case
    grad = random(*batch, m, n, dtype=dtype)
    basis = random_basis(batch, m if side == "left" else n, rank)
    low_rank, grad_sq = kernels.project(grad, basis, side, "float32")
    exact = basis.double().mT @ grad.double() if side == "left" else grad.double() @ basis.double()
    assert low_rank.dtype == torch.float32
    assert low_rank.shape == exact.shape
    assert low_rank.is_contiguous()
    assert error(low_rank, exact) <= PRODUCT["float32"]
    exact_sq = grad.double().square().sum(-2 if side == "left" else -1)
    assert grad_sq.dtype == torch.float64
    assert grad_sq.shape == exact_sq.shape
    assert float(((grad_sq - exact_sq) / exact_sq).abs().max()) <= SQUARES


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_projection_in_a_lower_precision(side: str, precision: str, dtype: torch.dtype) -> None:
    grad = random(150, 139, dtype=dtype)
    basis = random_basis((), 150 if side == "left" else 139, 20)
    low_rank, _ = kernels.project(grad, basis, side, precision)
    exact = basis.double().mT @ grad.double() if side == "left" else grad.double() @ basis.double()
    assert error(low_rank, exact) <= PRODUCT[precision]
    if precision == "bfloat16":
        # Rounded factors, and sums that are not rounded again.
        grad, basis = grad.bfloat16().double(), basis.bfloat16().double()
        assert error(low_rank, basis.mT @ grad if side == "left" else grad @ basis) <= PRODUCT["float32"]


@pytest.mark.parametrize("side", SIDES)
def test_factors_rounded_beforehand_give_the_same_bits(side: str) -> None:
    """As those that a program rounds for itself."""
    grad, basis = random(150, 139), random_basis((), 150 if side == "left" else 139, 20)
    phi = random(139 if side == "left" else 150, seed=4)
    (low_rank, grad_sq), half = kernels.project(grad, basis, side, "bfloat16"), basis.bfloat16()
    assert not torch.equal(basis, half.float())
    for before, after in zip((low_rank, grad_sq), kernels.project(grad, half, side, "bfloat16"), strict=True):
        assert torch.equal(before, after)
    factors = [[p, r] if side == "left" else [r, p.mT] for p, r in ((basis, low_rank), (half, low_rank.bfloat16()))]
    options: dict[str, Any] = {"precision": "bfloat16", "needed": flag((), True), "side": side, "alpha": 1.0}
    squares = [kernels.residual_square(grad, p, low_rank, phi, **options) for p in (basis, half)]
    assert torch.equal(*squares)
    weights = []
    for left, right in factors:
        weights.append(random(150, 139, seed=5))
        options = {"by_row": side == "right", "decay_factor": 0.5, "grad_finite": flag((), True)}
        kernels.apply_update_(weights[-1], grad, left, right, phi, precision="bfloat16", **options)
    assert torch.equal(*weights)


@pytest.mark.parametrize("side", SIDES)
def test_a_gradient_with_strides(side: str) -> None:
    """A transposed gradient, and every second row and third column of one."""
    for grad in (random(53, 37).t(), random(74, 159)[::2, ::3]):
        basis = random_basis((), 37 if side == "left" else 53, 5)
        low_rank, grad_sq = kernels.project(grad, basis, side, "float32")
        whole, whole_sq = kernels.project(grad.contiguous(), basis, side, "float32")
        assert error(low_rank, whole.double()) <= PRODUCT["float32"]
        assert error(grad_sq, whole_sq) <= SQUARES


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_norms_tell_a_bad_gradient(side: str, bad: float) -> None:
    """And only the column or row it is in; 1e30 is finite, and its square is not in float32."""
    grad = random(2, 37, 53)
    grad[1, 30, 50] = bad
    basis = random_basis((2,), 37 if side == "left" else 53, 5)
    _, grad_sq = kernels.project(grad, basis, side, "float32")
    expected = torch.ones_like(grad_sq, dtype=torch.bool)
    expected[1, 50 if side == "left" else 30] = False
    assert torch.equal(torch.isfinite(grad_sq), expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("batch", "shape"), CASES)
@pytest.mark.parametrize("scalar", [False, True])
def test_residual(side: str, batch: tuple[int, ...], shape: tuple[int, int, int], scalar: bool) -> None:
    m, n, rank = shape
    grad = random(*batch, m, n)
    basis = random_basis(batch, m if side == "left" else n, rank)
    low_rank = (basis.mT @ grad if side == "left" else grad @ basis).contiguous()
    phi = random(*batch, 1 if scalar else (n if side == "left" else m), seed=4).abs()
    arguments: dict[str, Any] = {"side": side, "alpha": 0.75, "precision": "float32"}
    square = kernels.residual_square(grad, basis, low_rank, phi, needed=flag(batch, True, False, True), **arguments)
    g, p, r = grad.double(), basis.double(), low_rank.double()
    back = p @ r if side == "left" else r @ p.mT
    scale = phi.double().unsqueeze(-2 if side == "left" else -1)
    exact = (scale * (g - 0.75 * back)).square().sum((-2, -1))
    assert square.dtype == torch.float64
    assert square.shape == exact.shape
    if batch:
        assert float(square[1]) == 0.0
        square, exact = square[[0, 2]], exact[[0, 2]]
    assert float(((square - exact) / exact).abs().max()) <= 10 * SQUARES


def test_residual_of_more_tiles_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_fira.core.kernels import residual

    monkeypatch.setattr(residual, "PROGRAMS", 2)
    grad, basis = random(300, 139), random_basis((), 139, 20)
    low_rank, phi = grad @ basis, random(300, seed=4)
    square = kernels.residual_square(
        grad, basis, low_rank, phi, side="right", alpha=1.0, needed=flag((), True), precision="float32"
    )
    exact = (phi.double()[:, None] * (grad.double() - low_rank.double() @ basis.double().t())).square().sum()
    assert float(((square - exact) / exact).abs()) <= 10 * SQUARES


DTYPES = [  # of weight and gradient
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize(("case", "scaling", "dtypes"), once(CASES, ["column", "row", "matrix"], DTYPES), ids=str)
def test_update(
    case: tuple[tuple[int, ...], tuple[int, int, int]], scaling: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    batch, (m, n, rank) = case
    weight_dtype, grad_dtype = dtypes
    weight, grad = random(*batch, m, n, dtype=weight_dtype, seed=5), random(*batch, m, n, dtype=grad_dtype)
    left, right = random(*batch, m, rank, seed=6), random(*batch, n, rank, seed=7).mT
    phi = random(*batch, {"column": n, "row": m, "matrix": 1}[scaling], seed=4)
    scale = phi.double().unsqueeze(-1 if scaling == "row" else -2)
    exact = 0.9 * weight.double() - (scale * grad.double() + left.double() @ right.double())
    before = weight.clone()
    kernels.apply_update_(
        weight,
        grad,
        left,
        right,
        phi,
        by_row=scaling == "row",
        decay_factor=0.9,
        grad_finite=flag(batch, True, False, True),
        precision="float32",
    )
    if batch:
        assert torch.equal(weight[1], before[1])
        weight, exact = weight[[0, 2]], exact[[0, 2]]
    assert error(weight, exact) <= ROUNDING[weight_dtype]


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_update_in_a_lower_precision(precision: str) -> None:
    weight, grad = torch.zeros(150, 139, device=DEVICE), torch.zeros(150, 139, device=DEVICE)
    left, right, phi = random(150, 20, seed=6), random(20, 139, seed=7), random(139)
    kernels.apply_update_(
        weight, grad, left, right, phi, by_row=False, decay_factor=1.0, grad_finite=flag((), True), precision=precision
    )
    assert error(weight, -(left.double() @ right.double())) <= PRODUCT[precision]


def test_update_of_a_weight_with_strides() -> None:
    """A view of every second row and column: what lies between is not touched."""
    storage, grad = random(74, 106, seed=5), random(53, 37).t()
    before, weight = storage.clone(), storage[::2, ::2]
    left, right, phi = random(37, 5, seed=6), random(5, 53, seed=7), random(37, seed=4)
    exact = weight.double() - (phi.double()[:, None] * grad.double() + left.double() @ right.double())
    kernels.apply_update_(
        weight, grad, left, right, phi, by_row=True, decay_factor=1.0, grad_finite=flag((), True), precision="float32"
    )
    assert error(weight, exact) <= ROUNDING[torch.float32]
    storage[::2, ::2] = before[::2, ::2]
    assert torch.equal(storage, before)


def test_nothing_is_written_for_a_bad_gradient() -> None:
    weight = random(2, 37, 53, seed=5)
    before = weight.clone()
    nan = torch.full((2, 37, 53), math.nan, device=DEVICE)
    kernels.apply_update_(
        weight,
        nan,
        nan[..., :5],
        nan[:, :5],
        nan[:, 0],
        by_row=False,
        decay_factor=math.nan,
        grad_finite=flag((2,), False, False),
        precision="float32",
    )
    assert torch.equal(weight, before)


def test_factors_of_another_size_are_refused() -> None:
    """Before a kernel could read beyond them."""
    weight, left, right = random(6, 4), random(6, 2), random(2, 5)
    with pytest.raises(RuntimeError, match="size"):
        kernels.apply_update_(
            weight,
            weight.clone(),
            left,
            right,
            random(4),
            by_row=False,
            decay_factor=1.0,
            grad_finite=flag((), True),
            precision="float32",
        )


def test_a_wrong_precision_is_named() -> None:
    with pytest.raises(ValueError, match=r"precision = 'fp8' is not legal; choose one of 'float32', 'tf32'"):
        kernels.project(random(4, 4), random(4, 2), "left", "fp8")


@pytest.mark.parametrize("side", SIDES)
def test_two_runs_give_the_same_bits(side: str) -> None:
    m, n, rank = 150, 139, 20
    grad, basis = random(m, n), random_basis((), m if side == "left" else n, rank)
    every, runs = flag((), True), []
    for _ in range(2):
        low_rank, grad_sq = kernels.project(grad, basis, side, "bfloat16")
        moments = [torch.zeros_like(low_rank), torch.zeros_like(low_rank)]
        steps = kernels.adam_direction_(low_rank, *moments, betas=BETAS, eps=1e-6, side=side, grad_finite=every)
        phi = (steps[1].sqrt() / steps[2].sqrt()).float()
        square = kernels.residual_square(
            grad, basis, low_rank, phi, side=side, alpha=1.0, needed=every, precision="tf32"
        )
        weight = random(m, n, seed=5)
        left, right = (basis, low_rank) if side == "left" else (low_rank, basis.mT)
        kernels.apply_update_(
            weight,
            grad,
            left,
            right,
            phi,
            by_row=side == "right",
            decay_factor=0.5,
            grad_finite=every,
            precision="tf32",
        )
        runs.append([low_rank, grad_sq, *moments, *steps, square, weight])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_the_kernels_do_on_a_batch_what_they_do_on_each() -> None:
    grad, basis = random(3, 37, 53), random_basis((3,), 37, 5)
    low_rank, grad_sq = kernels.project(grad, basis, "left", "float32")
    for index in range(3):
        alone = kernels.project(grad[index], basis[index], "left", "float32")
        assert error(low_rank[index], alone[0].double()) <= PRODUCT["float32"]
        assert error(grad_sq[index], alone[1]) <= SQUARES
