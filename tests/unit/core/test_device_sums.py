"""What sums over a matrix launch on a device that is not a CPU, counted at shapes of LLaMA 7B without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_fira.core import norms
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import allocate_matrices, state_views
from ds_fira.sharding.geometry import MatrixShard, split
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.lowrank.shard_step import ShardStep
from ds_fira.sharding.split_matrix import plan_split

SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]
# The norms, in float64, squared, and their sum.
LAUNCHES = 4


# What makes a tensor without a launch.
MEMORY = (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)


class Launches(TorchDispatchMode):
    """Counts the operations that make a tensor, views and bare memory apart, and the elements of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and func not in MEMORY:
            self.count += 1
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sum_of_squares_is_one_reduction(shape: tuple[int, int], side: str, dtype: torch.dtype) -> None:
    """Not one for every block of rows, and without a copy of the matrix in another dtype."""
    grad = torch.empty(shape, dtype=dtype, device="meta")
    with Launches() as total:
        norms.total_square(grad, torch.float32, side)
    with Launches() as lines:
        norms.squared_norms(grad, side)
    assert 0 < lines.count < total.count <= LAUNCHES
    assert max(total.largest, lines.largest) <= max(shape)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_part_of_a_split_matrix_launches_a_few(side: str) -> None:
    """Before its first basis, in a step: |G|^2 of up to three blocks of rows, and R and the norms of zeros."""
    shape, ranks = (4096, 11008), 8
    size = shape[0] * shape[1] // ranks + 5
    fragments = split(MatrixShard("w", shape, 0, 0, shape[0] * shape[1]), size, ranks)
    settings = GroupSettings(rank=1024, proj_type=side)
    plan = LocalShardPlan.of(plan_split(fragments, 0, ranks, settings), 0, 0, 3)
    flat = torch.empty(plan.fragment.numel, device="meta")
    basis = plan.matrix.basis_shape(3)
    state = state_views(allocate_matrices(flat, basis, plan.low_rank_shape, "float32", ()), side)
    state.refresh_step.fill_(0)
    part = ShardStep(plan, flat, flat, state, settings, 1e-4)
    assert len(part.plan.blocks) == 3
    with Launches() as total:
        part.grad_square()
    assert total.count <= len(plan.blocks) * (LAUNCHES + 1)
    part.borrow_basis({})
    with Launches() as projected:
        part.project()
    # Of each block the product, its norms, and both added to the region's, which begin as zeros.
    assert projected.count <= 2 + len(plan.blocks) * 6
    assert max(total.largest, projected.largest) <= plan.matrix.rank * shape[side == "left"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_one_reduction_gives_the_squared_norms(dim: int, dtype: torch.dtype) -> None:
    """Of columns and rows, to a few roundings of the dtype that it sums in; NaN and infinity stay what they are."""
    grad = torch.randn(300, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    summed_in = torch.promote_types(dtype, torch.float32)
    expected = grad.double().square().sum(dim)
    found = norms.reduced_squares(grad, dim, summed_in)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=20 * torch.finfo(summed_in).eps, atol=0.0)
    for wrong in (torch.nan, torch.inf):
        grad[7, 9] = wrong
        assert not norms.reduced_squares(grad, dim, summed_in).sum().isfinite()
