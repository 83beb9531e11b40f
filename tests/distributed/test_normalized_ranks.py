"""`residual = "normalized"` under ZeRO: the run of one process, what crosses ranks, and checkpoints for other ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fira.checkpoint.named_state import SavedState
from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles
from ds_fira.optim.state_size import formula_bytes
from ds_fira.tools.dry_run import plan_run
from tests.distributed import test_low_rank_exchange as exchange
from tests.distributed import test_resize as resize
from tests.distributed import test_zero3 as zero3
from tests.distributed import test_zero_parity as parity
from tests.distributed.zero_jobs import Net, config
from tests.grids import full_if, once
from tests.ranks import Pools

NORMALIZED = {"residual": "normalized"}
MATRIX = {**NORMALIZED, "scaling": "matrix", "limiter": "growth"}
# No p, and a residual that grows; as the preset has it.
GROWING = {**NORMALIZED, "residual_beta": 0.0, "residual_warmup": 5}
WAYS = {"column": NORMALIZED, "matrix": MATRIX}
ALL_WAYS = {**WAYS, "growing": GROWING}


@pytest.mark.parametrize(("stage", "way", "dtype"), once([1, 2, 3], ALL_WAYS, ["fp32", "bf16"]))
def test_two_ranks_make_one_process_s_steps(ranks: Pools, stage: int, way: str, dtype: str) -> None:
    """Split matrices stepped where they lie, but for rounding; those that lie whole to the bit."""
    module = zero3 if stage == 3 else exchange
    options = {} if stage == 3 else {"stage": stage}
    module.check(module.run(ranks, 2, dtype, shapes=exchange.FEW, **options, **ALL_WAYS[way]))


@pytest.mark.parametrize(("stage", "way"), once([1, 2], WAYS))
def test_exact_cuts_are_equal_to_the_bit(ranks: Pools, stage: int, way: str) -> None:
    params = {**parity.EXACT, **WAYS[way]}
    results = ranks.run(2, "train", ds_config=config(stage, "bf16", params), shapes=parity.SHAPES, steps=5)
    assert any(matrix.way == "gathered" for layout in results[0]["layouts"] for matrix in layout.split)
    parity.check(results)


@pytest.mark.parametrize(
    ("stage", "changed"), once([2, 3], [NORMALIZED, MATRIX, {**NORMALIZED, "state_dtype": "bfloat16"}]), ids=str
)
def test_memory_is_reported_estimated_and_measured_alike(ranks: Pools, stage: int, changed: dict[str, Any]) -> None:
    """The averages are in the planned bytes and in the formula: one number a column or row, or a matrix."""
    params, shapes = {**exchange.PARAMS, **changed}, exchange.FEW
    job = {"ds_config": config(stage, "fp32", params), "shapes": shapes, "steps": 2}
    memory = ranks.run(2, "train", **job, **({"module": zero3.MODULE} if stage == 3 else {}))[0]["memory"]
    planned, scaled = plan_run(Net(shapes), 2, stage, **params), plan_run(Net(shapes), 2, stage, **exchange.PARAMS)
    assert memory["optimizer_state_bytes"] == [planned.state_bytes(rank, torch.float32) for rank in range(2)]
    more = memory["paper_formula_bytes"] - formula_bytes(scaled.records)
    assert more == 4 * sum(1 if "scaling" in changed else max(shape) for shape in shapes)


def test_experts(ranks: Pools) -> None:
    """Of a 3-D tensor, cut between ranks, some without a gradient in some steps."""
    params = {**exchange.PARAMS, **NORMALIZED, "rank": 1, "update_proj_gap": 100}
    results = ranks.run(3, "train_experts", ds_config=config(2, "fp32", params), steps=5)
    exchange.check(results, sides="left")


def answers_in_parts(results: list[dict[str, Any]], rank: int, steps: int) -> int:
    """Bytes by which answers that a rank sends in parts are larger than C and phi: r + 1 elements an entry."""
    right = [matrix for *_, matrix in exchange.low_rank_matrices(results).values() if matrix.side == "right"]
    lent = [(m.rank + 1) * len(t.entries) for m in right for t in m.transfers(rank) if t.keeper == rank]
    return 4 * steps * sum(lent)


@pytest.mark.parametrize("changed", [NORMALIZED, MATRIX], ids=["column", "matrix"])
def test_no_further_collectives_and_bytes(ranks: Pools, changed: dict[str, Any]) -> None:
    """As many as of a scaled residual, and none more where the residual is rounding, which is damped on every rank."""
    job = {"alpha": 1.0, "steps": 4, "shapes": exchange.FEW}
    scaled, ordinary = exchange.run(ranks, 3, **job), exchange.run(ranks, 3, **job, **changed)
    faulty = exchange.run(ranks, 3, **job, **changed, faults={3: ("layers.2.weight", "rank 1")})
    exchange.check(ordinary)
    for rank, (before, after, rounding) in enumerate(zip(scaled, ordinary, faulty, strict=True)):
        # Fewer where nothing limits the residual: keepers on the right need not send N and R in place of C.
        limited = changed.get("limiter") == "growth"
        assert before["bytes_sent"] - after["bytes_sent"] == (0 if limited else answers_in_parts(scaled, rank, steps=4))
        assert after["bytes_sent"] == rounding["bytes_sent"]
        assert after["collectives"] == before["collectives"] == rounding["collectives"]
    for name, parts in exchange.replay(faulty).items():
        assert parts["sharded"].isfinite().all()
        change = (parts["weight"] - exchange.starts(faulty)[name]).norm()
        # A residual that is rounding is each run's own; what it makes of it is a share of sqrt(tau).
        assert (parts["weight"] - parts["sharded"]).norm() <= 1e-4 * change, name


@pytest.mark.parametrize(("fault", "way"), once([(0, math.nan), (2, math.inf)], WAYS))
def test_one_rank_s_gradient_is_not_finite(ranks: Pools, fault: tuple[int, float], way: str) -> None:
    """Neither p nor the count of steps moves, on any rank."""
    when, value = fault
    faults = {when: ("layers.2.weight", (5, value))}
    results = exchange.run(
        ranks, 3, "bf16", bf16={"check_grad_overflow": False}, faults=faults, shapes=exchange.FEW, **WAYS[way]
    )
    exchange.check(results)
    group, position, matrix = exchange.low_rank_matrices(results)["layers.2.weight"]
    counts = {int(results[rank]["state"][group][0][f"step.cut{position}"]) for rank, _ in matrix.fragments}
    assert counts == {exchange.STEPS - 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


ELSEWHERE: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    # ranks and stage before and after
    "more ranks": (2, 2, 3, 2, NORMALIZED),
    "fewer ranks": (3, 1, 2, 2, MATRIX),
    # Of rank 1: of (3, 40) at rank 2 the residual is near rounding, which each run has for itself.
    "growing, to stage 3": (2, 2, 3, 3, {**GROWING, "rank": 1}),
    "to stage 3": (3, 2, 2, 3, NORMALIZED),
    "from stage 3": (3, 3, 2, 1, NORMALIZED),
    "to stage 3, matrix": (1, 2, 3, 3, MATRIX),
    "from stage 0, whole steps": (2, 0, 3, 2, {**NORMALIZED, "exact_cuts": True}),
}
# Each stage, scaling and number of ranks that these have is before and after a resume in another case.
FULL = {"to stage 3, matrix", "more ranks", "to stage 3"}


@pytest.mark.parametrize("case", full_if(FULL.__contains__, ELSEWHERE))
def test_a_run_goes_on_elsewhere(ranks: Pools, folders: Path, case: str) -> None:
    before, stage, after, new_stage, params = ELSEWHERE[case]
    folder = resize.saved(ranks, folders, before, stage, params=params)
    found = resize.job(ranks, after, new_stage, first=resize.SAVED, last=resize.END, load=str(folder), params=params)
    resize.assert_same_run(found, resize.whole(ranks, params=params))


def averages(folder: Path) -> list[torch.Tensor]:
    saved: SavedState = CheckpointFiles.find(folder / f"global_step{resize.SAVED}").read()
    return [state.residual_avg_sq for parts in saved.matrices.values() for place, state in parts if len(place.kept)]


@pytest.mark.parametrize(("way", "world_size"), once(WAYS, [2, 3]))
def test_a_scaled_run_goes_on_normalized_and_back(
    ranks: Pools, folders: Path, tmp_path: Path, way: str, world_size: int
) -> None:
    """On as many ranks, and on others: the first step is from the same weights, the averages begin with it."""
    folder, there = resize.saved(ranks, folders, 2, 2), tmp_path / "there"
    job = {"load": str(folder), "save": str(there), "seed": 7, "params": WAYS[way]}
    unstepped = resize.job(ranks, world_size, 2, first=resize.SAVED, last=resize.SAVED, **job)
    assert unstepped["settings"]["residual"] == "normalized"
    assert all(float(part.max()) < 0.0 for part in averages(there))
    found = resize.job(ranks, world_size, 2, first=resize.SAVED, last=resize.END, **job)
    assert found["losses"][0] == pytest.approx(resize.whole(ranks)["losses"][resize.SAVED], rel=1e-5)
    assert all(torch.isfinite(weight).all() for weight in found["weights"].values())
    back = resize.job(ranks, world_size, 2, first=resize.SAVED, last=resize.END, load=str(folder), seed=7)
    resize.assert_same_run(back, resize.whole(ranks))
