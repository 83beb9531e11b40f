"""The gathered way without processes: owners assemble what the ranks hold, and every rank gets its new part back."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_fira.core.settings import GroupSettings
from ds_fira.optim.settings import check_params
from ds_fira.sharding import plan
from ds_fira.sharding.gather import GatherExchange
from ds_fira.sharding.geometry import matrices_of, split
from ds_fira.sharding.plan import plan_groups
from tests.unit.sharding.threads import Threads


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    st.integers(1, 5),
    st.sampled_from([1, 40, 10**6]),
)
def test_matrices_arrive_whole_and_return(shapes: list[tuple[int, int]], ranks: int, turn_numel: int) -> None:
    """Any shapes, any splits, one turn or many: weight and gradient at the owner, twice the weight back everywhere."""
    matrices, begin = [], 0
    for index, shape in enumerate(shapes):
        matrices += matrices_of(f"w{index}", shape, begin)
        begin += math.prod(shape)
    size = math.ceil(begin / ranks)
    chosen = GroupSettings.of(check_params({"rank": 2, "exact_cuts": True}))
    (layout,) = plan_groups([([split(matrix, size, ranks) for matrix in matrices], size)], ranks, [chosen])
    buffer = torch.arange(1.0, size * ranks + 1)
    flats = buffer.clone().chunk(ranks) if ranks > 1 else (buffer.clone(),)
    barrier, box, bound = Barrier(ranks), [()] * ranks, plan.MAX_TURN_NUMEL
    plan.MAX_TURN_NUMEL = turn_numel
    try:
        turns = layout.gathered_turns
    finally:
        plan.MAX_TURN_NUMEL = bound
    expected = {matrix.name: matrix.matrix(buffer) for matrix in matrices}

    def run(rank: int) -> int:
        communicator = Threads(rank, barrier, box)
        for turn in turns:
            exchange = GatherExchange(turn, communicator)
            assembled = exchange.to_owners(flats[rank], -flats[rank])
            for matrix, (weight, grad) in zip(exchange.owned, assembled, strict=True):
                assert torch.equal(weight, expected[matrix.name])
                assert torch.equal(grad, -expected[matrix.name])
                weight *= 2.0
            exchange.to_holders(flats[rank], [weight for weight, _ in assembled])
        return sum(len(GatherExchange(turn, communicator).owned) for turn in turns)

    with ThreadPoolExecutor(ranks) as pool:
        assert sum(pool.map(run, range(ranks))) == len(layout.split)
    for matrix in layout.split:
        expected[matrix.name] *= 2.0
    assert torch.equal(torch.cat(flats), buffer)
