"""The low-rank way by kernels, interpreted: the steps of the torch functions, in as many collectives.

Ranks are threads of which one computes at a time, as Triton's interpreter has one state in a process.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import Any

import pytest
import torch

from ds_fira.core import kernels
from ds_fira.core.algorithms import APOLLO_ADAM
from ds_fira.core.settings import GroupSettings
from ds_fira.observe.metrics import StepMetrics
from ds_fira.sharding import plan
from ds_fira.sharding.geometry import matrices_of, split
from ds_fira.sharding.lowrank.step import LowRankMatrices
from ds_fira.sharding.plan import plan_groups
from ds_fira.sharding.refresher import Refresher
from tests.unit.sharding import test_overlap
from tests.unit.sharding.test_overlap import PAIRS, TOGETHER, train
from tests.unit.sharding.threads import Threads

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU"),
    # Of entries that are not read, in memory that is not written.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
# Of the largest element of a tensor; sums are added up in another order.
TOLERANCE = 2e-6
# Steps with gradients of rank one, whose residual is summed from itself, and with some that are not finite.
FORMS: list[tuple[dict[str, Any], bool]] = [
    ({"alpha": 1.0}, False),
    ({"alpha": 1.0, "refresh_moments": "rotate", "subspace": "gram"}, True),
    ({"scaling": "matrix", "formulation": "paper", "stagger": True}, False),
    ({"scaling": "matrix", "alpha": 1.0}, True),
    ({"residual": "normalized", "scaling": "matrix", "limiter": "growth"}, True),
    ({"residual": "normalized", "residual_beta": 0.0}, False),
    ({"residual": "normalized", "residual_warmup": 3}, True),
    ({"residual": "none"}, True),
    ({"scaling": "none", "limiter": "none", "eps": 0.0}, False),
]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes steps with and without kernels, and compares weights, states and the collectives of every step."""

    def run(changed: dict[str, Any], order: tuple[int, int, bool], steps: int, **given: Any) -> None:
        monkeypatch.setattr(test_overlap, "STEPS", steps)
        # As the torch functions multiply on a CPU.
        changed = {"matmul_precision": "float32", **changed}
        expected = train(monkeypatch, order, changed, **given)
        kernels.interpret_on_cpu(True)
        try:
            found = train(monkeypatch, order, changed, computing=Lock(), **given)
        finally:
            kernels.interpret_on_cpu(False)
        for (before, *counts), (after, *others) in zip(expected, found, strict=True):
            assert counts == others
            for first, second in zip(before, after, strict=True):
                assert first.isnan().equal(second.isnan())
                largest = float(first.double().nan_to_num().abs().max()) if first.numel() else 0.0
                assert math.isfinite(largest)
                torch.testing.assert_close(second, first, rtol=0.0, atol=TOLERANCE * largest, equal_nan=True)

    return run


@pytest.mark.parametrize("evenly_sharded", [False, True])
def test_kernels_make_the_step_of_the_torch_functions(both: Any, evenly_sharded: bool) -> None:
    """Two ranks, a refresh, a residual that is rounding, then a gradient that is not finite."""
    only = slice(0, 2) if evenly_sharded else slice(3, 4)
    both({"alpha": 1.0}, TOGETHER, 3, ranks=2, evenly_sharded=evenly_sharded, fault=True, only=only)


@pytest.mark.full
@pytest.mark.parametrize(("changed", "evenly_sharded"), FORMS, ids=str)
def test_every_form(both: Any, changed: dict[str, Any], evenly_sharded: bool) -> None:
    """Three ranks, two refreshes, matrices on both sides, cut inside rows and thinner than a cut."""
    both(changed, TOGETHER, 5, evenly_sharded=evenly_sharded, fault=True)


@pytest.mark.full
@pytest.mark.parametrize("evenly_sharded", [False, True])
def test_turns_overlap(both: Any, evenly_sharded: bool) -> None:
    """One matrix a turn, two turns at a time."""
    both({"alpha": 1.0}, PAIRS, 5, evenly_sharded=evenly_sharded, fault=True)


def test_torch_functions_step_what_has_a_drawn_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of split matrices, whose kernels read rows of P that are stored or borrowed."""
    settings = GroupSettings.of({"rank": 3, "update_proj_gap": 10**6, **APOLLO_ADAM.group_values})
    (matrix,) = matrices_of("w", (12, 40), 0)
    size = matrix.numel // 2 + 7
    layout = plan_groups([([split(matrix, size, 2)], size)], 2, [settings])[0]
    grad = torch.randn(2 * size, generator=torch.Generator().manual_seed(0))

    def run(rank: int, barrier: Barrier, box: list[Any]) -> torch.Tensor:
        param = torch.nn.Parameter(torch.zeros(size))
        one = LowRankMatrices(layout.low_rank, Threads(rank, barrier, box), {"w": 0})
        state = one.allocate(param, settings, APOLLO_ADAM)
        param.grad = grad[rank * size : (rank + 1) * size].clone()
        with torch.no_grad():
            one.step(param, state, settings, 1e-4, Refresher(StepMetrics(), "ApolloAdam"), APOLLO_ADAM)
        return param.detach()

    def both_ranks() -> torch.Tensor:
        barrier, box = Barrier(2), [()] * 2
        with ThreadPoolExecutor(2) as pool:
            return torch.cat(list(pool.map(lambda rank: run(rank, barrier, box), range(2))))

    assert [each.way for each in layout.split] == ["low_rank"]
    expected = both_ranks()
    monkeypatch.delattr("ds_fira.sharding.lowrank.device_part.DevicePart.__init__")
    kernels.interpret_on_cpu(True)
    try:
        assert kernels.supports(expected)
        assert torch.equal(both_ranks(), expected)
    finally:
        kernels.interpret_on_cpu(False)
    assert expected.abs().sum() > 0.0


@pytest.mark.full
def test_a_group_that_is_partly_even(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left matrices kept by all their sharers beside right ones with copies of P, as ZeRO-2 has them on many ranks."""
    monkeypatch.setattr(plan, "MANY_SHARERS", 1)
    both({"alpha": 1.0}, TOGETHER, 4, evenly_sharded=False, fault=True)
