"""Scaling factors recorded on several ranks are those of one process: every stage, matrices whole and split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ds_fira
from tests.distributed.scaling_jobs import train_plain
from tests.distributed.zero_jobs import config
from tests.grids import full_if, half
from tests.ranks import Pools

JOBS = "tests.distributed.scaling_jobs"
STEPS = 4  # refreshes at 0 and 2
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 2, "alpha": 0.5, "weight_decay": 0.1, "record_scaling_factors": 1}
# Above every side, so that nothing is projected.
ADAMW = {"lr": 0.01, "rank": 999, "weight_decay": 0.1, "record_scaling_factors": 2}
# R is summed in another order over ranks, and weights follow; 3e-6 was measured.
TOLERANCE = 1e-5
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


def assert_same(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]], rtol: float = TOLERANCE) -> None:
    """The same matrices in the same order, steps, sides, and factors."""
    assert list(found) == list(expected)
    for name, one in expected.items():
        mine = found[name]
        assert all(mine[key] == one[key] for key in ("steps", "side", "rank", "shape")), name
        assert torch.equal(mine["count"], one["count"]), name
        for key in ("matrix", "column"):
            torch.testing.assert_close(mine[key], one[key], rtol=rtol, atol=0, equal_nan=True, msg=f"{name} {key}")


# Ranks, stage, settings, what goes into the DeepSpeed config, model, and the ways of cutting that must occur.
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any], str, tuple[str, ...]]] = {
    "zero0": (2, 0, PARAMS, {}, "net", ()),
    "zero1, paper, per matrix": (
        4,
        1,
        {**PARAMS, "formulation": "paper", "scaling": "matrix"},
        {},
        "net",
        ("low_rank",),
    ),
    "zero2": (2, 2, PARAMS, {}, "net", ("low_rank", "gathered")),
    "zero2, exact cuts": (2, 2, {**PARAMS, "exact_cuts": True}, {}, "net", ("gathered",)),
    "zero2, round robin, accumulation": (
        2,
        2,
        {**PARAMS, "proj_type": "reverse_std"},
        {"zero_round_robin_gradients": True, "gradient_accumulation_steps": 2},
        "net",
        ("low_rank",),
    ),
    "zero2, offload": (2, 2, PARAMS, {"zero_offload_optimizer": {"device": "cpu"}}, "net", ("low_rank",)),
    "zero2, experts": (2, 2, PARAMS, {}, "experts", ("gathered",)),
    "zero3": (2, 3, PARAMS, {}, "net", ("low_rank",)),
    "zero3, exact cuts": (2, 3, {**PARAMS, "exact_cuts": True}, {}, "net", ("gathered",)),
    "zero0, full rank": (2, 0, ADAMW, {}, "net", ()),
    "zero1, full rank": (4, 1, ADAMW, {}, "net", ("adamw",)),
    "zero2, full rank, round robin": (2, 2, ADAMW, {"zero_round_robin_gradients": True}, "net", ("adamw",)),
    "zero3, full rank": (4, 3, ADAMW, {}, "net", ("adamw",)),
    "zero3, full rank, experts": (2, 3, ADAMW, {}, "experts", ("adamw",)),
}


# What each of them has, others have too.
FULL = {
    "zero2, exact cuts",
    "zero3, exact cuts",
    "zero0, full rank",
    "zero2, full rank, round robin",
    "zero3, full rank, experts",
}


@pytest.mark.parametrize("case", full_if(FULL.__contains__, CASES))
def test_ranks_record_what_one_process_does(ranks: Pools, case: str) -> None:
    """In float32, against plain torch with the same batches; every rank is told the same."""
    world_size, stage, params, extra, kind, ways = CASES[case]
    results = ranks.run(
        world_size, "train", JOBS, ds_config=config(stage, "fp32", params, **extra), steps=STEPS, kind=kind
    )
    # AdamW sends something only where it records a weight that is split.
    assert all(results[0]["collectives" if way == "adamw" else way] > 0 for way in ways)
    expected = train_plain(params, STEPS, kind, extra.get("gradient_accumulation_steps", 1))
    assert_same(results[0]["factors"], expected)
    for other in results[1:]:
        assert_same(other["factors"], results[0]["factors"], rtol=0.0)


def test_matrices_gathered_in_turns(ranks: Pools) -> None:
    """Every matrix keeps its own record where owners assemble one at a time."""
    params = {**PARAMS, "exact_cuts": True}
    results = ranks.run(2, "train", JOBS, ds_config=config(3, "fp32", params), steps=STEPS, turn_numel=500)
    assert results[0]["turns"] > 1
    assert_same(results[0]["factors"], train_plain(params, STEPS, "net", 1))


@pytest.mark.parametrize("params", full_if(ADAMW.__eq__, [PARAMS, ADAMW]), ids=["low rank", "full rank"])
def test_bf16_optimizer_wrapper(ranks: Pools, params: dict[str, Any]) -> None:
    """Another wrapper with other books: two ranks as one."""
    job = {"ds_config": config(1, "bf16", params, **FP32_SUMS), "steps": STEPS}
    (alone,) = ranks.run(1, "train", JOBS, **job)
    results = ranks.run(2, "train", JOBS, **job)
    assert len(alone["factors"]) == 7
    assert_same(results[0]["factors"], alone["factors"])


@pytest.mark.parametrize(("stage", "params"), half([2, 3], [PARAMS, ADAMW]))
def test_recording_changes_nothing_on_ranks(ranks: Pools, params: dict[str, Any], stage: int) -> None:
    """The same weights to the bit; nothing more is sent, but one sum a record for a tensor of split AdamW weights."""
    off = {**params, "record_scaling_factors": 0}
    (recorded, *_), (silent, *_) = (
        ranks.run(2, "train", JOBS, ds_config=config(stage, "fp32", chosen), steps=STEPS) for chosen in (params, off)
    )
    assert silent["factors"] is None
    for name, weight in silent["weights"].items():
        assert torch.equal(recorded["weights"][name], weight), name
    added = recorded["collectives"] - silent["collectives"]
    # At stage 2 three shapes have a matrix that both ranks share, each in a flat tensor of its own; at stage 3 in one.
    tensors = 0 if params is PARAMS else {2: 3, 3: 1}[stage]
    assert added == tensors * (STEPS // params["record_scaling_factors"])


@pytest.mark.parametrize(
    ("params", "stages", "world_sizes"),
    [
        (PARAMS, (2, 2), (2, 2)),
        pytest.param(PARAMS, (2, 3), (2, 4), marks=pytest.mark.full),
        (ADAMW, (3, 0), (2, 1)),
    ],
    ids=["the same ranks", "low rank, elsewhere", "full rank, elsewhere"],
)
def test_a_checkpoint_carries_the_record_on(
    ranks: Pools, tmp_path: Path, params: dict[str, Any], stages: tuple[int, int], world_sizes: tuple[int, int]
) -> None:
    """Also to other ranks and stages: as if there had been no pause. Rank 0 alone writes the file."""
    configs = [config(stage, "fp32", params) for stage in stages]
    job = {"steps": STEPS, "save_at": 3, "folder": str(tmp_path)}
    ranks.run(world_sizes[0], "train", JOBS, ds_config=configs[0], **job)
    results = ranks.run(world_sizes[1], "train", JOBS, ds_config=configs[1], load=True, **job)
    assert_same(results[0]["factors"], train_plain(params, STEPS, "net", 1))
    written = [path.name for path in tmp_path.glob("*.npz")]
    assert written == ["rank 0.npz"]
    assert_same(ds_fira.read_scaling_factors(tmp_path / written[0]), results[0]["factors"], rtol=0.0)
