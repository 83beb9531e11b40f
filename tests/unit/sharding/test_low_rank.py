"""The low-rank way without processes: ranks that are threads make the steps of one process, refreshes included."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ds_fira
from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.settings import GroupSettings
from ds_fira.observe.metrics import StepMetrics
from ds_fira.sharding.geometry import matrices_of, split
from ds_fira.sharding.lowrank.step import LowRankMatrices
from ds_fira.sharding.plan import plan_groups
from ds_fira.sharding.refresher import Refresher
from tests.unit.sharding.threads import Threads

SHAPES = [(12, 40), (40, 12), (26, 37)]
# Of the weights, in float64: R is summed in another order, and nothing else differs.
TOLERANCE = 1e-9


@pytest.mark.parametrize("evenly_sharded", [False, True])
@pytest.mark.parametrize(
    "changed",
    [{}, {"subspace": "gram", "refresh_moments": "rotate"}, {"scaling": "matrix", "refresh_moments": "reset"}],
    ids=str,
)
def test_threads_make_the_steps_of_one_process(changed: dict[str, str], evenly_sharded: bool) -> None:
    """Three ranks, seven steps, refreshes at the first, the fourth and the seventh."""
    generator = torch.Generator().manual_seed(0)
    given = {"lr": 0.01, "rank": 3, "update_proj_gap": 3, "alpha": 0.5, "weight_decay": 0.1, **changed}
    settings = GroupSettings(**given)
    matrices, begin, ranks = [], 0, 3
    for index, (m, n) in enumerate(SHAPES):
        matrices += matrices_of(f"w{index}", (m, n), begin)
        begin += m * n
    size = -(-begin // ranks)
    weights = torch.randn(size * ranks, dtype=torch.float64, generator=generator)
    grads = [torch.randn(size * ranks, dtype=torch.float64, generator=generator) for _ in range(7)]
    fragments = [split(matrix, size, ranks) for matrix in matrices]
    # Refreshes that are as rare as this cost nothing, so that the low-rank way is chosen.
    chosen = GroupSettings(**{**given, "update_proj_gap": 10**6})
    # Evenly sharded: each matrix by itself, as ZeRO-3 splits it.
    together = [[part] for part in fragments if len(part) > 1] if evenly_sharded else [fragments]
    layouts = [plan_groups([(parts, size)], ranks, [chosen], evenly_sharded)[0] for parts in together]
    low_rank = [matrix for layout in layouts for matrix in layout.low_rank.values()]
    assert {matrix.side for matrix in low_rank} == {"left", "right"}
    alone = [torch.nn.Parameter(matrix.matrix(weights).clone()) for matrix in matrices]
    optimizer = ds_fira.FiraAdam(alone, **given)
    for grad in grads:
        for param, matrix in zip(alone, matrices, strict=True):
            param.grad = matrix.matrix(grad).clone()
        optimizer.step()
    barrier, box = Barrier(ranks), [()] * ranks
    numbers = {matrix.name: number for number, matrix in enumerate(matrices)}

    def run(rank: int) -> torch.Tensor:
        communicator, metrics = Threads(rank, barrier, box), StepMetrics()
        param = torch.nn.Parameter(weights[rank * size : (rank + 1) * size].clone())
        mine = [LowRankMatrices(layout.low_rank, communicator, numbers) for layout in layouts if layout.low_rank]
        states = [one.allocate(param, settings, FIRA_ADAM) for one in mine]
        with torch.no_grad():
            for grad in grads:
                param.grad = grad[rank * size : (rank + 1) * size].clone()
                for one, state in zip(mine, states, strict=True):
                    one.step(param, state, settings, 1e-4, Refresher(metrics, "FiraAdam"), FIRA_ADAM)
        return param.detach()

    with ThreadPoolExecutor(ranks) as pool:
        found = torch.cat(list(pool.map(run, range(ranks))))
    stepped = {matrix.name for matrix in low_rank}
    for param, matrix in zip(alone, matrices, strict=True):
        if matrix.name in stepped:
            torch.testing.assert_close(matrix.matrix(found), param.detach(), rtol=TOLERANCE, atol=TOLERANCE)


class CountReads(TorchDispatchMode):
    """Counts how often the host reads some tensors."""

    def __init__(self, watched: list[Tensor]) -> None:
        super().__init__()
        self.watched = {tensor.untyped_storage().data_ptr() for tensor in watched}
        self.count = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].untyped_storage().data_ptr() in self.watched
        return func(*args, **(kwargs or {}))


def test_step_counts_are_read_where_a_refresh_may_be_due() -> None:
    """By the owner alone: before the first basis, and a gap of steps later; other steps wait for no device."""
    ranks, gap, steps = 2, 4, 7
    settings = GroupSettings(rank=3, update_proj_gap=gap)
    (matrix,) = matrices_of("w", (12, 40), 0)
    size = matrix.numel // ranks + 7
    rare = GroupSettings(rank=3, update_proj_gap=10**6)
    layout = plan_groups([([split(matrix, size, ranks)], size)], ranks, [rare])[0]
    (planned,) = layout.low_rank.values()
    grads = torch.randn(steps, ranks * size, generator=torch.Generator().manual_seed(0))
    barrier, box = Barrier(ranks), [()] * ranks

    def run(rank: int) -> tuple[int, int, int]:
        param, refresher = torch.nn.Parameter(torch.zeros(size)), Refresher(StepMetrics(), "FiraAdam")
        one = LowRankMatrices(layout.low_rank, Threads(rank, barrier, box), {"w": 0})
        state = one.allocate(param, settings, FIRA_ADAM)
        (step,) = (value for key, value in state.items() if key.startswith("step"))
        (refreshed,) = (value for key, value in state.items() if key.startswith("refresh_step"))
        with torch.no_grad(), CountReads([step]) as reads:
            for grad in grads:
                param.grad = grad[rank * size : (rank + 1) * size].clone()
                one.step(param, state, settings, 1e-4, refresher, FIRA_ADAM)
        return reads.count, int(step), int(refreshed)

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(run, range(ranks)))
    assert found == [(2 if rank == planned.owner else 0, steps, gap) for rank in range(ranks)]
