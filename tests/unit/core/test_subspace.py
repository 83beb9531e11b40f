"""Bases: against float64 decompositions, at every scale, and on real gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_fira import FiraAdam
from ds_fira.core import subspace_solvers
from ds_fira.core.subspace import (
    align_signs,
    basis_shape,
    compute_basis,
)

METHODS = ["svd", "gram", "randomized"]
SIDES = ["left", "right"]
SHAPES = [(1, 1), (1, 9), (9, 1), (7, 13), (13, 7), (33, 33), (90, 119), (119, 90), (91, 91)]
ORTHONORMAL = 1e-5


def gradient(shape: tuple[int, int], decay: float = 0.97, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix of known singular values decay^j, formed in float64."""
    generator = torch.Generator().manual_seed(seed)
    small = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(size, small, generator=generator, dtype=torch.float64))[0] for size in shape
    )
    values = decay ** torch.arange(small, dtype=torch.float64)
    return ((left * values) @ right.t()).to(dtype)


def relative_energy(grad: Tensor, basis: Tensor, side: str) -> float:
    """|P'G|^2 over the sum of the top r squared singular values, by numpy in float64."""
    g, p = grad.double().numpy(), basis.double().numpy()
    g = g / np.abs(g).max()
    values = np.linalg.svd(g, compute_uv=False)[: p.shape[1]]
    return float(np.square(p.T @ g if side == "left" else g @ p).sum() / np.square(values).sum())


def orthonormality(basis: Tensor) -> float:
    """The largest element of |P'P - I|."""
    p = basis.double()
    return float((p.t() @ p - torch.eye(p.shape[1], dtype=torch.float64)).abs().max())


def random_basis(shape: tuple[int, int], rank: int, side: str, seed: int = 7) -> Tensor:
    rows, columns = basis_shape(shape, rank, side)
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.fixture(params=["exact", "gram", "direct", "bfloat16"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way of the randomized method, whatever the sizes and the device would choose."""
    chosen = "direct" if request.param == "bfloat16" else request.param
    monkeypatch.setattr(subspace_solvers, "cheapest", lambda *_: chosen)
    monkeypatch.setattr(subspace_solvers, "fast_bfloat16", lambda _: request.param == "bfloat16")
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [1, 5, 40, 1000])
@pytest.mark.parametrize("method", ["gram", "svd"])
def test_exact_methods_capture_the_optimal_energy(method: str, rank: int, side: str, shape: tuple[int, int]) -> None:
    grad = gradient(shape)
    basis = compute_basis(grad, rank, side, method)
    assert tuple(basis.shape) == basis_shape(shape, rank, side)
    assert basis.is_contiguous()
    assert basis.dtype == torch.float32
    assert orthonormality(basis) <= ORTHONORMAL
    assert abs(relative_energy(grad, basis, side) - 1.0) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [1, 5, 40, 1000])
@pytest.mark.parametrize("warm", [False, True])
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", deficient_gradients())
@pytest.mark.parametrize("warm", [False, True])
def test_deficient_gradients_get_a_full_basis(name: str, side: str, method: str, warm: bool, way: str) -> None:
    grad = deficient_gradients()[name]
    for g, s in ((grad, side), (grad.t(), {"left": "right", "right": "left"}[side])):
        previous = random_basis((g.shape[0], g.shape[1]), 12, s) if warm else None
        basis = compute_basis(g, 12, s, method, previous)
        assert orthonormality(basis) <= ORTHONORMAL
        assert relative_energy(g, basis, s) >= 1.0 - 1e-4


def test_a_warm_start_finds_what_the_old_basis_is_blind_to(way: str) -> None:
    grad = torch.zeros(300, 400)
    grad[:50] = torch.randn(50, 400, generator=torch.Generator().manual_seed(0))
    previous = torch.eye(300)[:, 100:120]
    basis = compute_basis(grad, 20, "left", "randomized", previous)
    assert relative_energy(grad, basis, "left") >= 0.9
    assert relative_energy(grad, previous, "left") == 0.0


@pytest.mark.parametrize("way", ["gram", "direct", "bfloat16"], indirect=True)
@pytest.mark.usefixtures("way")
def test_a_warm_start_is_better_than_a_cold_one_of_as_many_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ways that have a start."""
    monkeypatch.setattr(subspace_solvers, "COLD_PRODUCTS", subspace_solvers.WARM_PRODUCTS)
    monkeypatch.setattr(subspace_solvers, "OVERSAMPLING", 4)
    monkeypatch.setattr(subspace_solvers, "WIDE", 0)
    grad = gradient((300, 400), decay=0.995)
    near = compute_basis(grad + 0.01 * gradient((300, 400), decay=0.995, seed=1), 30, "left", "svd")
    warm, cold = (compute_basis(grad, 30, "left", "randomized", start) for start in (near, None))
    assert relative_energy(grad, warm, "left") > relative_energy(grad, cold, "left") + 1e-3


def test_randomized_repeats_to_the_bit_whatever_the_global_seed(way: str) -> None:
    grad, previous = gradient((90, 119)), random_basis((90, 119), 20, "left")
    for start in (None, previous):
        torch.manual_seed(1)
        first = compute_basis(grad, 20, "left", "randomized", start)
        drawn = torch.rand(3)
        torch.manual_seed(1)
        assert torch.equal(drawn, torch.rand(3)), "the global generator was used"
        assert torch.equal(first, compute_basis(grad, 20, "left", "randomized", start))


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


def test_the_cheapest_way_follows_shape_and_rank() -> None:
    assert subspace_solvers.cheapest(128, 4096, 40, 2, "cpu") == "exact"
    assert subspace_solvers.cheapest(2048, 5461, 544, 2, "cpu") == "gram"
    assert subspace_solvers.cheapest(2048, 5461, 64, 2, "cpu") == "direct"
    assert subspace_solvers.cheapest(512, 1376, 512, 3, "cpu") == "exact"
    # In bfloat16 the products with X are cheap, and A would be too coarse.
    assert subspace_solvers.cheapest(2048, 5461, 544, 2, "cpu", 4.0) == "direct"


def test_strict_precision_keeps_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = gradient((300, 400))
    monkeypatch.setattr(subspace_solvers, "fast_bfloat16", lambda _: True)
    fast, strict = (compute_basis(grad, 30, "left", "randomized", None, strict) for strict in (False, True))
    monkeypatch.setattr(subspace_solvers, "fast_bfloat16", lambda _: False)
    plain = compute_basis(grad, 30, "left", "randomized")
    assert torch.equal(strict, plain)
    assert not torch.equal(fast, plain)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-6, 6),
)
@settings(max_examples=60, deadline=None)
def test_orthonormal_handles_any_block(rows: int, columns: int, seed: int, exponent: int) -> None:
    columns = min(rows, columns)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(rows, columns, generator=generator) * 10.0 ** (exponent * torch.arange(columns) / columns)
    if seed % 2:
        block[:, columns // 2 :] = block[:, :1]  # repeated columns: Cholesky breaks down
    q = subspace_solvers.orthonormal(block.t()).t()
    assert orthonormality(q) <= ORTHONORMAL
    # The same span: every column, brought to norm 1, lies in it.
    unit = torch.nn.functional.normalize(block.double(), dim=0)
    assert (unit - q.double() @ (q.double().t() @ unit)).abs().max() <= 1e-3


def test_cholesky_and_householder_agree_on_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    block = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    cheap = subspace_solvers.orthonormal(block.t()).t()
    monkeypatch.setattr(subspace_solvers, "LOST_ORTHOGONALITY", -1.0)
    assert (subspace_solvers.orthonormal(block.t()).t() - cheap).abs().max() <= 1e-5


def test_gram_matrix_over_blocks_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gradient((33, 71), dtype=torch.float64)
    monkeypatch.setattr(subspace_solvers, "BLOCK", 10)
    monkeypatch.setattr(subspace_solvers, "STRIP", 7)
    gram = subspace_solvers.gram_matrix(x, torch.tensor(0.5, dtype=torch.float64))
    expected = x @ x.t()
    assert (gram / gram.trace() - expected / expected.trace()).abs().max() <= 1e-15
    assert torch.equal(gram, gram.t())


@pytest.fixture(scope="module")
def real_gradients() -> list[dict[str, Tensor]]:
    """Gradients of a small network in training, by name, at steps 1 and 16: a mixture of tokens with a skewed law."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vocabulary, width = 64, 128
    model = nn.Sequential(
        nn.Embedding(vocabulary, width),
        nn.TransformerEncoderLayer(width, 4, 192, dropout=0.0, batch_first=True, norm_first=True),
        nn.Linear(width, vocabulary),
    )
    weights = {"ffn up": model[1].linear1.weight, "ffn down": model[1].linear2.weight}
    weights["attention out"] = model[1].self_attn.out_proj.weight
    chosen = {id(weight) for weight in weights.values()}
    rest = [param for param in model.parameters() if id(param) not in chosen]
    optimizer = FiraAdam([{"params": list(weights.values()), "rank": 16}, {"params": rest}], lr=2e-3)
    law = 1.0 / torch.arange(1, vocabulary + 1)
    kept = []
    for step in range(1, 17):
        ids = torch.multinomial(law, 8 * 49, replacement=True).view(8, 49)
        # Every second token follows from the one before it, so that there is something to learn.
        ids[:, 1::2] = (ids[:, 0:-1:2] * 5 + 3) % vocabulary
        mask = nn.Transformer.generate_square_subsequent_mask(48)
        logits = model[2](model[1](model[0](ids[:, :-1]), src_mask=mask, is_causal=True))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        if step in (1, 16):
            kept.append({name: weight.grad.clone() for name, weight in weights.items()})
        optimizer.step()
    return kept


@pytest.mark.parametrize("name", ["ffn up", "ffn down", "attention out"])
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("side", SIDES)
def test_real_gradients_keep_their_energy(
    real_gradients: list[dict[str, Tensor]], name: str, rank: int, side: str, way: str
) -> None:
    first, second = (grads[name] for grads in real_gradients)
    cold = compute_basis(first, rank, side, "randomized")
    warm = compute_basis(second, rank, side, "randomized", cold)
    assert relative_energy(first, cold, side) >= 0.99
    assert relative_energy(second, warm, side) >= 0.99
    # The old basis alone is not enough, so the test can fail.
    assert relative_energy(second, cold, side) < 0.99
    assert relative_energy(second, compute_basis(second, rank, side, "gram"), side) >= 1.0 - 1e-5
