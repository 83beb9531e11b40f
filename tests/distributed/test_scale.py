"""Plans of many ranks, made on a few: what live engines hand to other ranks, and the weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.communication.scale_step import Exchange, GroupModel, Link
from ds_fira.core.settings import GroupSettings
from ds_fira.optim.settings import check_params
from tests.distributed.test_low_rank_exchange import FEW, PARAMS, check, low_rank_matrices
from tests.distributed.zero_jobs import config
from tests.grids import once
from tests.ranks import Pools

MODULE = "tests.distributed.scale_jobs"
# A matrix on two ranks is on many; or no plan is even enough.
MANY = {"ds_fira.sharding.plan.MANY_SHARERS": 1}
EVEN = {"ds_fira.sharding.plan.MAX_UNEVEN_NUMEL": 0, "ds_fira.sharding.plan.MAX_IMBALANCE": 0}


@pytest.mark.parametrize(
    ("stage", "world_size", "limits", "exact"),
    [
        (2, 2, {}, False),
        (2, 3, MANY, False),
        (3, 3, {}, False),
        pytest.param(2, 4, {**MANY, **EVEN}, False, marks=pytest.mark.full),
        pytest.param(2, 3, {}, True, marks=pytest.mark.full),
        pytest.param(3, 2, {}, True, marks=pytest.mark.full),
        pytest.param(3, 4, {}, False, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_the_model_counts_what_ranks_send(
    ranks: Pools, stage: int, world_size: int, limits: dict[str, int], exact: bool
) -> None:
    """Bytes of every rank and collectives, in steps between two refreshes and in those with one."""
    params = {**PARAMS, "subspace": "gram", "exact_cuts": exact, "update_proj_gap": 3}
    job = {"ds_config": config(stage, "fp32", params), "shapes": FEW, "steps": 6}
    results = ranks.run(world_size, "count", module=MODULE, limits=limits, **job)
    settings, expected = GroupSettings.of(check_params(params)), []
    for refresh in (False, True):
        exchange = Exchange(world_size, Link())
        for layout in results[0][0]:
            GroupModel(layout, settings).step(exchange, refresh)
        expected.append(exchange)
    usual, renewing = expected
    assert {matrix.way for layout in results[0][0] for matrix in layout.split} == {"gathered" if exact else "low_rank"}
    for rank, (_, sent, calls) in enumerate(results):
        assert sent[1:] == [usual.sent[rank]] * 2 + [renewing.sent[rank]] + [usual.sent[rank]] * 2
        assert calls[1:] == [usual.collectives] * 2 + [renewing.collectives] + [usual.collectives] * 2


@pytest.mark.parametrize(
    ("world_size", "limits", "dtype"), once([3, 4], [MANY, {**MANY, **EVEN}], ["fp32", "bf16"]), ids=str
)
def test_one_process_s_weights(ranks: Pools, world_size: int, limits: dict[str, int], dtype: str) -> None:
    """Matrices that ZeRO-2 cuts and the plan shards evenly: a left one by the columns of R, others with rows of P."""
    job = {"ds_config": config(2, dtype, {**PARAMS, "update_proj_gap": 2}), "shapes": FEW, "steps": 4}
    results = ranks.run(world_size, "train", module=MODULE, limits=limits, **job)
    check(results)
    even = {matrix.side for *_, matrix in low_rank_matrices(results).values() if matrix.evenly_sharded}
    assert even == ({"left"} if limits == MANY else {"left", "right"})


@pytest.mark.parametrize(("before", "after"), [({}, MANY), (MANY, {})], ids=["to an even plan", "from one"])
def test_a_checkpoint_of_another_plan_goes_on(
    ranks: Pools, tmp_path: Path, before: dict[str, int], after: dict[str, int]
) -> None:
    """The states of a matrix with one keeper become those of a matrix with many, and the other way round."""
    params = {"rank": 2, "update_proj_gap": 2, "lr": 0.01, "weight_decay": 0.05}
    job = {"module": MODULE, "ds_config": config(2, "fp32", params), "shapes": [(8, 6)] * 2 + [(6, 40)] * 2}

    def run(limits: dict[str, int], **given: Any) -> dict[str, Any]:
        (first, *_) = ranks.run(3, "run", limits=limits, **job, **given)
        assert first["error"] == ""
        return first

    whole = run(before, first=0, last=5, save=str(tmp_path), save_at=3)
    found = run(after, first=3, last=5, load=str(tmp_path), seed=7)
    for name, weight in whole["weights"].items():
        difference = (found["weights"][name] - weight).float().norm()
        assert difference <= 1e-5 * torch.as_tensor(weight).float().norm(), name
