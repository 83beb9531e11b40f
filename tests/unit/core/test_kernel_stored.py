"""Moments decoded and encoded inside a kernel, against the functions of `ds_fira.core.quantization`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_fira.core import kernels, quantization
from ds_fira.core.quantization import Stored
from tests.unit.core.kernel_cases import BETAS, DEVICE, random

pytest.importorskip("triton", reason="Triton is not installed, and without it there are no kernels")
pytestmark = [
    pytest.mark.usefixtures("kernels_allowed"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
SETTINGS: dict[str, Any] = {"step": 7, "lr": 0.01, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.1}
SIZES = [(1,), (255,), (4096,), (23, 57)]


def stored(size: tuple[int, ...], state_dtype: str) -> tuple[Stored, Stored]:
    """Both moments of some gradients over eight decades, a block of zeros among them where there is room."""
    spread = 10.0 ** random(*size, seed=7).mul_(2.0)
    values = random(*size, seed=2) * spread, (random(*size, seed=3) * spread).square()
    found = []
    for place, value in enumerate(values):
        value.view(-1)[512:768] = 0.0
        kept = quantization.allocate(size, (), state_dtype, dtype=torch.float32, device=DEVICE, signed=place == 0)
        quantization.write_(kept, value, seed=place)
        found.append(kept)
    return tuple(found)


def by_functions(param: Tensor, grad: Tensor, moments: tuple[Stored, Stored]) -> None:
    """The step with moments that torch decodes and encodes."""
    values = [quantization.read(moment) for moment in moments]
    kernels.adamw_(param, grad, *values, **SETTINGS)
    for place, (moment, value) in enumerate(zip(moments, values, strict=True)):
        quantization.write_(moment, value, seed=2 * SETTINGS["step"] + place)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_a_kernel_stores_what_the_functions_store(state_dtype: str, size: tuple[int, ...]) -> None:
    """To the bit in the interpreter; on a GPU, which fuses products and sums, but for a code in a thousand."""
    results = []
    for way in (
        by_functions,
        lambda param, grad, moments: kernels.adamw_together_([(param, grad, *moments)], **SETTINGS),
    ):
        param, moments = random(*size, seed=5), stored(size, state_dtype)
        grad = random(*size)
        grad.view(-1)[-1] = math.nan
        way(param, grad, moments)
        results.append([param, *(part for moment in moments for part in moment.values())])
    for expected, found in zip(*results, strict=True):
        differing = (expected != found).float().mean()
        assert differing <= (0.0 if DEVICE == "cpu" else 1e-3), differing


def test_a_gradient_that_is_not_finite_leaves_every_code() -> None:
    """Whatever the noise of the step."""
    param, moments = random(4096, seed=5), stored((4096,), "int8")
    before = [part.clone() for moment in moments for part in moment.values()]
    kernels.adamw_together_([(param, torch.full_like(param, math.inf), *moments)], **SETTINGS)
    assert torch.equal(param, random(4096, seed=5))
    for part, old in zip((part for moment in moments for part in moment.values()), before, strict=True):
        assert torch.equal(part, old)
