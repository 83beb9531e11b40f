"""The Triton kernels of Adam's moments, against float64 arithmetic: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ds_fira.core import kernels
from ds_fira.core.quantization import VALUES
from tests.unit.core.kernel_cases import (
    BETAS,
    CASES,
    DEVICE,
    ROUNDING,
    SIDES,
    copies,
    error,
    flag,
    random,
)

pytest.importorskip("triton", reason="Triton is not installed, and without it there are no kernels")
# What the interpreter's NumPy says of the NaN and infinity that it is given here.
pytestmark = [
    pytest.mark.usefixtures("kernels_allowed"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("batch", "shape"), CASES)
def test_moments_and_direction(side: str, batch: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    m, n, rank = shape
    low_rank = random(*batch, *((rank, n) if side == "left" else (m, rank)))
    exp_avg, exp_avg_sq = random(*low_rank.shape, seed=2), random(*low_rank.shape, seed=3).square()
    moment, moment_sq = exp_avg.double(), exp_avg_sq.double()
    direction, direction_sq, low_rank_sq = kernels.adam_direction_(
        low_rank, exp_avg, exp_avg_sq, betas=BETAS, eps=1e-6, side=side, grad_finite=flag(batch, True, True, True)
    )
    moment = BETAS[0] * moment + (1 - BETAS[0]) * low_rank.double()
    moment_sq = BETAS[1] * moment_sq + (1 - BETAS[1]) * low_rank.double().square()
    exact = moment / (moment_sq.sqrt() + 1e-6)
    for result, reference in ((exp_avg, moment), (exp_avg_sq, moment_sq), (direction, exact)):
        assert result.dtype == torch.float32
        assert error(result, reference) <= ROUNDING[torch.float32]
    axis = -2 if side == "left" else -1
    for result, reference in ((direction_sq, exact), (low_rank_sq, low_rank.double())):
        assert result.dtype == torch.float64
        assert result.shape == reference.sum(axis).shape
        assert error(result, reference.square().sum(axis)) <= ROUNDING[torch.float32]


@pytest.mark.parametrize("side", SIDES)
def test_moments_of_what_is_not_usable_stay(side: str) -> None:
    low_rank = random(3, 20, 37)
    low_rank[1] = math.nan
    moments = [random(3, 20, 37, seed=2), random(3, 20, 37, seed=3).square()]
    kept = copies(*moments)
    results = kernels.adam_direction_(
        low_rank, *moments, betas=BETAS, eps=1e-6, side=side, grad_finite=flag((3,), True, False, True)
    )
    for moment, before in zip(moments, kept, strict=True):
        assert torch.equal(moment[1], before[1])
        assert not torch.equal(moment[0], before[0])
        assert torch.isfinite(moment).all()
    for result in results:
        assert torch.equal(result[1], torch.zeros_like(result[1]))
        assert (result[0] != 0).all()


@pytest.mark.parametrize("shape", [(1,), (2500,), (37, 53), ()])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "moment_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adamw(shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype, moment_dtype: torch.dtype) -> None:
    param, grad = random(*shape, dtype=dtype, seed=5), random(*shape, dtype=grad_dtype)
    exp_avg = random(*shape, dtype=moment_dtype, seed=2)
    exp_avg_sq = random(*shape, dtype=moment_dtype, seed=3).square()
    moment = BETAS[0] * exp_avg.double() + (1 - BETAS[0]) * grad.double()
    moment_sq = BETAS[1] * exp_avg_sq.double() + (1 - BETAS[1]) * grad.double().square()
    step_size = 0.01 * math.sqrt(1 - BETAS[1] ** 7) / (1 - BETAS[0] ** 7)
    exact = (param.double() - step_size * moment / (moment_sq.sqrt() + 1e-6)) * (1 - 0.01 * 0.1)
    kernels.adamw_(param, grad, exp_avg, exp_avg_sq, step=7, lr=0.01, betas=BETAS, eps=1e-6, weight_decay=0.1)
    for result, reference in ((param, exact), (exp_avg, moment), (exp_avg_sq, moment_sq)):
        assert error(result, reference) <= ROUNDING[result.dtype]


def test_adamw_leaves_bad_elements() -> None:
    tensors = [random(2500, seed=5), random(2500), random(2500, seed=2), random(2500, seed=3).square()]
    bad = torch.zeros(2500, dtype=torch.bool, device=DEVICE)
    for place, value in ((0, math.nan), (1, math.inf), (1030, -math.inf), (2499, 1e30)):
        bad[place] = True
        tensors[1][place] = value
    before = copies(*tensors)
    settings: dict[str, Any] = {"step": 1, "lr": 0.01, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.1}
    kernels.adamw_(*tensors, **settings)
    rest = [tensor[~bad] for tensor in before]
    kernels.adamw_(*rest, **settings)
    for index in (0, 2, 3):
        assert torch.equal(tensors[index][bad], before[index][bad])
        assert torch.equal(tensors[index][~bad], rest[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noisy", [False, True])
def test_adamw_writes_back_the_bits_of_bad_elements(dtype: torch.dtype, noisy: bool) -> None:
    """Whatever parameter and moments hold there: infinity, a NaN with a payload, a zero with a sign."""
    moment_dtype = torch.bfloat16 if noisy else dtype
    tensors = [random(2048, seed=seed).to(kind) for seed, kind in ((5, dtype), (2, moment_dtype), (3, moment_dtype))]
    tensors[2].abs_()
    grad, bits = random(2048), {2: torch.int16, 4: torch.int32}
    bad = torch.arange(2048, device=DEVICE) % 7 == 3
    grad[bad] = torch.tensor([math.nan, math.inf, -math.inf, 1e30], device=DEVICE).repeat(512)[: int(bad.sum())]
    for tensor in tensors:
        tensor[3:2048:35], tensor[10:2048:35], tensor[17:2048:35] = math.inf, -0.0, math.nan
        tensor.view(bits[tensor.element_size()])[17:2048:35] += 5
    before = copies(*tensors)
    settings: dict[str, Any] = {"step": 3, "lr": 0.01, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.1}
    param, *moments = tensors
    if noisy:
        kernels.adamw_together_([(param, grad, *({VALUES: moment} for moment in moments))], **settings)
    else:
        kernels.adamw_(param, grad, *moments, **settings)
    for tensor, old in zip(tensors, before, strict=True):
        same = tensor.view(bits[tensor.element_size()]) == old.view(bits[tensor.element_size()])
        assert same[bad].all()
        assert not same[~bad].all()


def test_adamw_names_what_does_not_fit() -> None:
    tensors = [random(6, 4) for _ in range(4)]
    tensors[2] = random(4, 6).t()
    with pytest.raises(ValueError, match=r"exp_avg with shape \(6, 4\) and strides \(1, 6\).*give contiguous tensors"):
        kernels.adamw_(*tensors, step=1, lr=0.01, betas=BETAS, eps=1e-6, weight_decay=0.0)


@pytest.mark.parametrize("wrong", ["exp_avg", "exp_avg_sq"])
def test_moments_that_do_not_fit_are_named(wrong: str) -> None:
    tensors = {name: random(6, 4) for name in ("low_rank", "exp_avg", "exp_avg_sq")}
    tensors[wrong] = random(4, 6).t()
    with pytest.raises(ValueError, match=rf"{wrong} with shape \(6, 4\) and strides \(1, 6\) does not fit"):
        kernels.adam_direction_(**tensors, betas=BETAS, eps=1e-6, side="left", grad_finite=flag((), True))
