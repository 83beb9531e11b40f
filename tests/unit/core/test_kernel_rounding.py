"""Weights in bfloat16 rounded stochastically inside a kernel: as the functions round, with the same noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_fira.core import kernels, quantization
from ds_fira.core.kernels.fragments import Edge, Edges, launch_update_edges
from ds_fira.core.kernels.views import batched
from ds_fira.core.rounding import store_weight_
from tests.unit.core.kernel_cases import BETAS, DEVICE, flag, random

pytest.importorskip("triton", reason="Triton is not installed, and without it there are no kernels")
pytestmark = [pytest.mark.usefixtures("kernels_allowed")]
# On a GPU the products of two sums are fused differently into a tile of bfloat16 and one of float32.
DIFFERING = 0.0 if DEVICE == "cpu" else 1e-2


def require_rounded(found: Tensor, value: Tensor, count: int, start: int = 0) -> None:
    """`found` is `value` by the noise of a step; and that is neither the nearest nor the noise of another step."""
    expected, other = torch.empty_like(found), torch.empty_like(found)
    store_weight_(expected, value.clone().contiguous(), -count, start)
    store_weight_(other, value.clone().contiguous(), -count - 1, start)
    assert (found != expected).float().mean() <= DIFFERING
    assert 0.2 < (found != other).float().mean() < 0.5
    assert 0.1 < (found != value.bfloat16()).float().mean() < 0.4


@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_update_of_a_matrix(batch: tuple[int, ...]) -> None:
    m, n, rank = 70, 51, 5
    grad, left, right = random(*batch, m, n), random(*batch, m, rank, seed=6), random(*batch, rank, n, seed=7)
    weight, phi = random(*batch, m, n, seed=5).bfloat16(), random(*batch, n, seed=4)
    value, found = weight.float(), weight.clone()
    counts = torch.arange(11, 11 + (batch or (1,))[0], device=DEVICE).view(batch)
    finite = flag(batch, *([True] * (batch or (1,))[0]))
    options = {"by_row": False, "decay_factor": 0.9, "grad_finite": finite, "precision": "float32"}
    for target in (value, found):
        kernels.apply_update_(target, grad, left, right, phi, **options, count=counts)
    for one, exact, count in zip(found.view(-1, m, n), value.view(-1, m, n), counts.view(-1).tolist(), strict=True):
        require_rounded(one, exact, count)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("on_device", [False, True])
def test_adamw(state_dtype: str, on_device: bool) -> None:
    numel = 5000
    found, grad = random(numel, seed=5).bfloat16(), random(numel)
    value = found.float()
    for param in (value, found):
        kept = {"dtype": torch.float32, "device": DEVICE}
        moments = [quantization.allocate((numel,), (), state_dtype, signed=signed, **kept) for signed in (True, False)]
        step = [torch.tensor(6, device=DEVICE)] if on_device else 7
        lr = torch.tensor([0.01], device=DEVICE) if on_device else 0.01
        options = {"step": step, "lr": lr, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.1, "stochastic": True}
        kernels.adamw_together_([(param, grad, *moments)], **options)
    require_rounded(found, value, 7)


def test_the_edges_of_a_fragment() -> None:
    """A part of one row, whose place is where it lies in the stepped tensor."""
    rank, count, first = 3, 120, 6
    found = random(first + count, seed=5).bfloat16()
    before, value, grad = found.clone(), found.float(), random(first + count)
    words, basis = random(rank * count + count, seed=6), random(4, rank, seed=7)
    edges = Edges(0, 0, count, 0, 0, rank * count, (Edge(first, count, 0, 2), Edge()))
    counts = torch.tensor([9.0], dtype=torch.float64, device=DEVICE)
    for target in (value, found):
        view = batched(basis, 1, 4, rank)
        own = batched(counts.view(1, 1), 1, 1)
        launch_update_edges(target, grad, view, words, [edges], rank, 0.9, "left", own, scaled=True, one=False)
    assert torch.equal(found[:first], before[:first])
    require_rounded(found[first:], value[first:], 9, first)
