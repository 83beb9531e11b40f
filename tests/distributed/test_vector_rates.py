"""`vector_lr_scale` where others hold the parameters: norms in flat partitions, in shards, and in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import test_fsdp as fsdp
from tests.distributed import test_low_rank_exchange as exchange
from tests.distributed import test_resize as resize
from tests.distributed import test_zero3 as zero3
from tests.grids import once
from tests.ranks import Pools

SCALED = {"vector_lr_scale": 0.1}


def norms_change(results: list[dict[str, Any]], name: str) -> float:
    """How far ranks of ZeRO moved a parameter."""
    return float((exchange.replay(results)[name]["sharded"] - exchange.starts(results)[name]).norm())


@pytest.mark.parametrize(("stage", "dtype"), once([1, 2, 3], ["fp32", "bf16"]))
def test_ranks_make_one_process_s_steps(ranks: Pools, stage: int, dtype: str) -> None:
    """Who steps each parameter as it is, and so knows its dimensions."""
    if stage == 3:
        zero3.check(zero3.run(ranks, 2, dtype, shapes=exchange.FEW, **SCALED))
        return
    scaled = exchange.run(ranks, 2, dtype, stage=stage, shapes=exchange.FEW, **SCALED)
    exchange.check(scaled)
    plain = exchange.run(ranks, 2, dtype, stage=stage, shapes=exchange.FEW)
    assert norms_change(scaled, "norm.weight") < 0.2 * norms_change(plain, "norm.weight")


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_shards_of_fsdp2(ranks: Pools, world_size: int) -> None:
    """Where an embedding's shard is flat as a norm's is."""
    results = fsdp.run(ranks, world_size, SCALED)
    fsdp.check(results)


@pytest.mark.parametrize(
    ("before", "after"), [(2, 3), (0, 2), *(pytest.param(*two, marks=pytest.mark.full) for two in ((3, 0), (1, 1)))]
)
def test_a_run_goes_on_at_another_stage(ranks: Pools, tmp_path: Path, before: int, after: int) -> None:
    folder = resize.saved(ranks, tmp_path, 2, before, params=SCALED)
    found = resize.job(ranks, 3, after, first=resize.SAVED, last=resize.END, load=str(folder), seed=7, params=SCALED)
    resize.assert_same_run(found, resize.whole(ranks, params=SCALED))


def test_norms_may_get_a_rate_of_their_own_over_a_resume(ranks: Pools, tmp_path: Path) -> None:
    """So norms leave the group of the embeddings: at stage 2 and 3 as at stage 0."""
    folder = resize.saved(ranks, tmp_path, 2, 2)
    first, *others = (
        resize.job(ranks, 2, stage, first=resize.SAVED, last=resize.END, load=str(folder), seed=7, params=SCALED)
        for stage in (0, 2, 3)
    )
    plain = resize.whole(ranks)["weights"]
    for found in others:
        resize.assert_same_run(found, {**first, "losses": [0.0] * resize.SAVED + first["losses"]})
    difference = {name: (weight - plain[name]).norm() / plain[name].norm() for name, weight in first["weights"].items()}
    assert difference["norm.weight"] > 1e-3


def test_where_a_scheduler_counts_the_groups_it_is_said(ranks: Pools) -> None:
    """Then norms lie in one flat tensor with the embedding, and all of it steps at the learning rate."""
    arguments = {"stage": 2, "about": "vector_lr_scale", "scheduled": "parts"}
    results = ranks.run(2, "train_object", "tests.distributed.full_rank_jobs", **arguments, **SCALED)
    assert [len(result["warned"]) for result in results] == [1, 0]
    assert "vector_lr_scale = 0.1 has no effect in param group 1" in results[0]["warned"][0]
    plain = ranks.run(2, "train_object", "tests.distributed.full_rank_jobs", **arguments)
    assert not plain[0]["warned"]
    for name, weight in plain[0]["weights"].items():
        assert torch.equal(results[0]["weights"][name], weight), name
    apart = ranks.run(
        2, "train_object", "tests.distributed.full_rank_jobs", **{**arguments, "scheduled": None}, **SCALED
    )
    assert not apart[0]["warned"]
    assert not torch.equal(apart[0]["weights"]["norm.weight"], plain[0]["weights"]["norm.weight"])
