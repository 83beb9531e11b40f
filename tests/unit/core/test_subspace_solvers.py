"""Steps of the randomized method, and its bases of gradients of a training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_fira import FiraAdam
from ds_fira.core import iteration_plan, orthonormal, subspace_solvers
from ds_fira.core.iteration_plan import Iteration
from ds_fira.core.subspace import (
    compute_basis,
)
from tests.unit.core.subspace_cases import ORTHONORMAL, SIDES, gradient, orthonormality, random_basis, relative_energy


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
    monkeypatch.setattr(iteration_plan, "COLD_PRODUCTS", iteration_plan.WARM_PRODUCTS)
    monkeypatch.setattr(iteration_plan, "OVERSAMPLING", 4)
    monkeypatch.setattr(iteration_plan, "WIDE", 0)
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


def test_the_cheapest_way_follows_shape_and_rank() -> None:
    assert subspace_solvers.cheapest(128, 4096, Iteration(40, (4096,) * 2), "cpu") == "exact"
    assert subspace_solvers.cheapest(2048, 5461, Iteration(544, (5461,) * 2), "cpu") == "gram"
    assert subspace_solvers.cheapest(2048, 5461, Iteration(64, (5461,) * 2), "cpu") == "direct"
    assert subspace_solvers.cheapest(512, 1376, Iteration(512, (1376,) * 3), "cpu") == "exact"
    # In bfloat16 the products with X are cheap, and A would be too coarse.
    assert subspace_solvers.cheapest(2048, 5461, Iteration(544, (5461,) * 2), "cpu", 4.0) == "direct"


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
    q = orthonormal.orthonormal(block.t()).t()
    assert orthonormality(q) <= ORTHONORMAL
    # The same span: every column, brought to norm 1, lies in it.
    unit = torch.nn.functional.normalize(block.double(), dim=0)
    assert (unit - q.double() @ (q.double().t() @ unit)).abs().max() <= 1e-3


def test_a_block_that_breaks_down_leaves_the_others_of_its_batch_alone() -> None:
    """One has equal rows, one has none but zeros in a row, and two need the second pass."""
    blocks = torch.randn(4, 8, 50, generator=torch.Generator().manual_seed(0))
    blocks[0, 3] = blocks[0, 5]
    blocks[2, 6] = 0.0
    for place in (1, 3):
        blocks[place, 1] = blocks[place, 0] + 0.02 * blocks[place, 1]
    together = orthonormal.orthonormal(blocks)
    for block, found in zip(blocks, together, strict=True):
        assert orthonormality(found.t()) <= 1e-6
        assert (found - orthonormal.orthonormal(block)).abs().max() <= 1e-5


def test_cholesky_and_householder_agree_on_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    block = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    cheap = orthonormal.orthonormal(block.t()).t()
    monkeypatch.setattr(orthonormal, "LOST_ORTHOGONALITY", -1.0)
    assert (orthonormal.orthonormal(block.t()).t() - cheap).abs().max() <= 1e-5


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


@pytest.mark.parametrize("name", ["ffn up", "ffn down", "attention out"])
@pytest.mark.parametrize("rank", [32, 48])
@pytest.mark.parametrize("side", SIDES)
def test_real_gradients_keep_their_energy_without_rayleigh_ritz(
    real_gradients: list[dict[str, Tensor]], name: str, rank: int, side: str, way: str
) -> None:
    """From a quarter of the smaller side on, 15 steps after the basis in use was made."""
    first, second = (grads[name] for grads in real_gradients)
    previous = compute_basis(first, rank, side, "randomized")
    basis = compute_basis(second, rank, side, "randomized", previous, ordered=False)
    assert orthonormality(basis) <= ORTHONORMAL
    assert relative_energy(second, basis, side) >= 0.99
    assert relative_energy(second, previous, side) < 0.9
