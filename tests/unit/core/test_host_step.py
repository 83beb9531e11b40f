"""What a step on a CPU costs beside its products: operations, counted, and the passes that were made one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory.allocation import peak_bytes
from ds_fira import FiraAdam
from ds_fira.core import functional as F
from ds_fira.core.norms import squared_norms
from tests.reference import tolerances

CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """Counts what torch is asked for, views and numbers that are read included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("shape", "rank", "most"),
    [((128, 128), 32, 38), ((128, 384), 32, 40), ((384, 128), 32, 38), ((512, 1376), 128, 41)],
    ids=str,
)
def test_operations_of_a_step(shape: tuple[int, int], rank: int, most: int) -> None:
    """A small matrix costs its calls, and two threads meet at the end of each; there were 49, and 237 of the last.

    Nor does a longer matrix cost more of them.
    """
    param = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    optimizer = FiraAdam([{"params": [param], "rank": rank}], lr=1e-3, subspace="randomized")
    for seed in (1, 2):
        param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if seed == 1:
            optimizer.step()  # makes the basis
    with Operations() as operations:
        optimizer.step()
    assert operations.count <= most


@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_direction_in_one_pass(side: str, betas: tuple[float, float], eps: float, dtype: torch.dtype) -> None:
    """Lines 9 to 11 against their formulas in float64; an element that has had no gradient has no direction."""
    generator = torch.Generator().manual_seed(0)
    shape = (23, 401)  # neither fills the kernel's vectors, and together more than a small matrix
    low_rank, exp_avg = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    exp_avg_sq = torch.rand(shape, generator=generator, dtype=dtype)
    for tensor in (low_rank, exp_avg, exp_avg_sq):
        tensor[:, 7] = 0.0
    before = low_rank.clone()
    wanted_avg = betas[0] * exp_avg.double() + (1.0 - betas[0]) * low_rank.double()
    wanted_sq = betas[1] * exp_avg_sq.double() + (1.0 - betas[1]) * low_rank.double().square()
    wanted = wanted_avg / (wanted_sq.sqrt() + (eps or 1e-300))
    found, found_sq, low_rank_sq = F.adam_direction_(low_rank, exp_avg, exp_avg_sq, betas=betas, eps=eps, side=side)
    bound = {torch.float32: tolerances.FLOAT32_VS_REFERENCE, torch.float64: tolerances.FLOAT64_VS_REFERENCE}[dtype]
    dim = 0 if side == "left" else 1
    for result, reference in (
        (found, wanted),
        (exp_avg, wanted_avg),
        (exp_avg_sq, wanted_sq),
        (found_sq, wanted.square().sum(dim)),
        (low_rank_sq, before.double().square().sum(dim)),
    ):
        assert (result.double() - reference).norm() <= bound * reference.norm()
    assert torch.equal(low_rank, before)
    assert not found[:, 7].any()


# One row, fewer than are summed at once, several beside each other, a prime number of them.
@pytest.mark.parametrize("rows", [1, 40, 300, 512, 1153])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_squares_of_columns(rows: int, contiguous: bool, dtype: torch.dtype) -> None:
    """Every column to the digits that its dtype has; NaN and infinity spoil their own columns and no other."""
    matrix = torch.randn((rows, 70), generator=torch.Generator().manual_seed(0), dtype=dtype)
    if not contiguous:
        matrix = matrix.mT.contiguous().mT
    before, exact = matrix.clone(), matrix.double().square().sum(0)
    found = squared_norms(matrix, "left")
    assert torch.equal(matrix, before)
    assert found.dtype == torch.float64
    bound = 4 * torch.finfo(dtype).eps
    assert ((found - exact).abs() <= bound * exact).all()
    for wrong, column in ((torch.nan, 3), (torch.inf, 69)):
        matrix[rows // 2, column] = wrong
    assert squared_norms(matrix, "left").isfinite().nonzero().flatten().tolist() == [
        column for column in range(70) if column not in (3, 69)
    ]


def test_squares_of_columns_are_one_pass() -> None:
    """Beside the sums nothing is kept: their copies for each thread, and those of rows beside each other."""
    matrix = torch.randn(1024, 1376)
    assert peak_bytes(lambda: squared_norms(matrix, "left"), CPU) <= 0.03 * matrix.nbytes
