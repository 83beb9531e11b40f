"""Slices of tensor parallelism, cut by ZeRO besides: ranks that are threads make the steps of one process."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier, Lock
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_fira
from ds_fira.core import kernels
from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.settings import GroupSettings
from ds_fira.observe.metrics import StepMetrics
from ds_fira.sharding.gather import GatherExchange
from ds_fira.sharding.geometry import MatrixShard, Partitioning
from ds_fira.sharding.lowrank.step import LowRankMatrices
from ds_fira.sharding.plan import plan_groups
from ds_fira.sharding.refresher import Refresher
from ds_fira.sharding.row_blocks import row_blocks
from ds_fira.sharding.split_matrix import SplitMatrix
from tests.grids import full_if, half
from tests.unit.sharding.threads import Threads

SHAPES = [(12, 40), (40, 12), (26, 37)]
STEPS = 7
GIVEN = {"lr": 0.01, "rank": 3, "update_proj_gap": 3, "alpha": 0.5, "weight_decay": 0.1}
# Of the weights, in float64: R is summed in another order, and nothing else differs.
TOLERANCE = 1e-9
# By slice and copy the rank, as DeepSpeed numbers them: the slices of one copy are neighbours.
GRIDS = {"two slices": [[0], [1]], "two slices, two copies": [[0, 2], [1, 3]], "four slices": [[0], [1], [2], [3]]}
CUT_COLUMNS = ("two slices, two copies", 1)


def planned(grid: list[list[int]], dim: int, given: dict[str, Any] = GIVEN) -> tuple[list[SplitMatrix], list[int]]:
    """The plan of matrices whose slices are of unequal width, and the elements that each rank holds."""
    size, copies = len(grid), len(grid[0])
    buffers, numels = [{} for _ in SHAPES], [0] * (size * copies)
    first = [[0, 0] for _ in SHAPES]
    for number, ranks in enumerate(grid):
        shapes = []
        for m, n in SHAPES:
            whole = (m, n)[dim]
            width = whole // size + (whole % size if number == 0 else 0) + (1 if number == 0 else 0)
            width -= 1 if number == size - 1 else 0
            shapes.append((width, n) if dim == 0 else (m, width))
        offsets = [sum(map(math.prod, shapes[:index])) for index in range(len(shapes))]
        each = tuple(map(math.prod, shapes))
        book = Partitioning(each, tuple(offsets), -(-sum(each) // copies), copies, sliced=False)
        for index, shape in enumerate(shapes):
            own = MatrixShard(f"w{index}", shape, 0, 0, math.prod(shape))
            for copy, part in book.fragments(index, own).items():
                buffers[index][ranks[copy]] = part.within(SHAPES[index], tuple(first[index]))
            first[index][dim] += shape[dim]
        for rank in ranks:
            numels[rank] = book.partition_size
    assert [place[dim] for place in first] == [shape[dim] for shape in SHAPES]
    # Refreshes that are as rare as this cost nothing, so that the low-rank way is chosen.
    chosen = GroupSettings(**{**given, "update_proj_gap": 10**6})
    (layout,) = plan_groups([(buffers, max(numels))], len(numels), [chosen], True)
    assert {matrix.way for matrix in layout.split} == {"gathered" if chosen.exact_cuts else "low_rank"}
    assert [matrix.sliced_by_columns for matrix in layout.split] == [dim == 1] * len(SHAPES)
    return list(layout.split), numels


def held(matrices: list[SplitMatrix], wholes: list[Tensor], rank: int, numel: int) -> Tensor:
    """What a rank holds of some matrices, by the places of their blocks."""
    flat = torch.zeros(numel, dtype=wholes[0].dtype)
    for matrix, whole in zip(matrices, wholes, strict=True):
        if rank in matrix.sharers:
            fragment = matrix.fragment(rank)
            for block in row_blocks(fragment):
                rows, columns = (slice(span.start, span.stop) for span in (block.rows, block.columns))
                block.view(fragment.fragment(flat)).copy_(whole[rows, columns])
    return flat


def alone(wholes: list[Tensor], grads: list[list[Tensor]], given: dict[str, Any]) -> list[Tensor]:
    """What one process makes of them."""
    params = [torch.nn.Parameter(whole.clone()) for whole in wholes]
    optimizer = ds_fira.FiraAdam(params, **given)
    for grad in grads:
        for param, own in zip(params, grad, strict=True):
            param.grad = own.clone()
        optimizer.step()
    return [param.detach() for param in params]


def by_threads(
    grid: list[list[int]], dim: int, given: dict[str, Any], wholes: list[Tensor], grads: list[list[Tensor]], lock: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """What each rank holds at the end, and what it should."""
    matrices, numels = planned(grid, dim, given)
    settings, numbers = GroupSettings(**given), {matrix.name: number for number, matrix in enumerate(matrices)}
    barrier, box = Barrier(len(numels)), [()] * len(numels)

    def run(rank: int) -> Tensor:
        communicator = Threads(rank, barrier, box)
        communicator.computing = lock
        param = torch.nn.Parameter(held(matrices, wholes, rank, numels[rank]))
        one = LowRankMatrices(dict(enumerate(matrices)), communicator, numbers)
        state = one.allocate(param, settings, FIRA_ADAM)
        with torch.no_grad(), lock or nullcontext():
            for grad in grads:
                param.grad = held(matrices, grad, rank, numels[rank])
                one.step(param, state, settings, 1e-4, Refresher(StepMetrics(), "FiraAdam"), FIRA_ADAM)
        return param.detach()

    with ThreadPoolExecutor(len(numels)) as pool:
        found = list(pool.map(run, range(len(numels))))
    expected = alone(wholes, grads, given)
    return found, [held(matrices, expected, rank, numel) for rank, numel in enumerate(numels)]


def drawn(dtype: torch.dtype, steps: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights and gradients."""
    generator = torch.Generator().manual_seed(0)
    draw = [[torch.randn(shape, dtype=dtype, generator=generator) for shape in SHAPES] for _ in range(1 + steps)]
    return draw[0], draw[1:]


@pytest.mark.parametrize(
    ("name", "dim", "changed"),
    half(
        GRIDS,
        [0, 1],
        [{}, {"subspace": "gram", "refresh_moments": "rotate"}, {"scaling": "matrix"}, {"proj_type": "reverse_std"}],
    ),
    ids=str,
)
def test_threads_make_the_steps_of_one_process(name: str, dim: int, changed: dict[str, Any]) -> None:
    """Rows and columns on both sides, slices of unequal width, cut inside rows; refreshes at steps 1, 4 and 7."""
    found, expected = by_threads(GRIDS[name], dim, {**GIVEN, **changed}, *drawn(torch.float64, STEPS), None)
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("case", full_if(CUT_COLUMNS.__ne__, itertools.product(list(GRIDS)[:2], [0, 1])))
def test_kernels_make_the_steps_of_the_torch_functions(kernels_allowed: None, case: tuple[str, int]) -> None:
    """Interpreted; a thread computes at a time. Sums are added up in another order, in float32."""
    pytest.importorskip("triton")
    given = {**GIVEN, "matmul_precision": "float32"}
    found, expected = by_threads(GRIDS[case[0]], case[1], given, *drawn(torch.float32, 2), Lock())
    assert kernels.supports(found[0])
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_gathered_and_given_back(name: str, dim: int) -> None:
    """Owners assemble the whole matrices to the bit, and every rank gets its blocks of what they made."""
    matrices, numels = planned(GRIDS[name], dim, {**GIVEN, "exact_cuts": True})
    (weights, [grads]), barrier, box = drawn(torch.float32, 1), Barrier(len(numels)), [()] * len(numels)

    def run(rank: int) -> None:
        exchange = GatherExchange(matrices, Threads(rank, barrier, box))
        flats = [held(matrices, wholes, rank, numels[rank]) for wholes in (weights, grads)]
        pairs = exchange.to_owners(*flats)
        for matrix, (weight, grad) in zip(exchange.owned, pairs, strict=True):
            number = matrices.index(matrix)
            assert torch.equal(weight, weights[number])
            assert torch.equal(grad, grads[number])
        exchange.to_holders(flats[0], [weight + grad for weight, grad in pairs])
        changed = [weight + grad for weight, grad in zip(weights, grads, strict=True)]
        assert torch.equal(flats[0], held(matrices, changed, rank, numels[rank]))

    with ThreadPoolExecutor(len(numels)) as pool:
        list(pool.map(run, range(len(numels))))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_every_state_is_kept_once(name: str, dim: int) -> None:
    """Of rows of P, and of entries of R; but for rows of P that ZeRO cuts inside."""
    for matrix in planned(GRIDS[name], dim)[0]:
        m, n = matrix.shape
        rows, entries = (m, n) if matrix.side == "left" else (n, m)
        basis = [row for rank in matrix.sharers for row in matrix.basis_rows(rank)]
        kept = [entry for rank in matrix.sharers for entry in matrix.kept(rank)]
        assert sorted(kept) == list(range(entries))
        assert set(basis) == set(range(rows))
        cut = dim == 0 and matrix.side == "left" and len(GRIDS[name][0]) > 1
        assert len(basis) - rows <= (len(GRIDS[name]) if cut else 0)
