"""DDP without DeepSpeed: the weights of one process to the bit, and each basis computed on one rank."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_fsdp import check, run
from tests.ranks import Pools

MODULE = "tests.distributed.ddp_jobs"


@pytest.mark.parametrize(
    ("world_size", "job"),
    [
        (2, {"given": "model", "accumulation": 2, "clip": 0.01}),
        (2, {"given": "groups", "params": {"stagger": True}}),
        pytest.param(3, {"given": "model", "optimizer": "GaLoreAdam"}, marks=pytest.mark.full),
        pytest.param(4, {"given": "groups", "kind": "experts"}, marks=pytest.mark.full),
    ],
)
def test_one_process_s_weights(ranks: Pools, world_size: int, job: dict[str, Any]) -> None:
    results = run(ranks, world_size, ddp=True, **job)
    check(results, low_rank=False, kind=job.get("optimizer", "FiraAdam"), copies=world_size)


def test_each_basis_is_computed_once(ranks: Pools) -> None:
    """Of a model that tells; parameters alone do not, and nothing is communicated for them."""
    for given, computed, collectives in (("model", 8, 8), ("groups", 8, 8), ("compiled", 8, 8), ("params", 16, 0)):
        found = ranks.run(2, "bases", module=MODULE, given=given)
        assert sum(count for count, _ in found) == computed
        assert [sent for _, sent in found] == [collectives, collectives]


def test_state_dicts_are_those_of_one_process(ranks: Pools) -> None:
    """A run of one process goes on under DDP and back, with the scaling factors that were recorded."""
    assert ranks.run(2, "to_and_from_one_process", module=MODULE) == [True, True]
