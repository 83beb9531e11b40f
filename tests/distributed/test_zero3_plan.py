"""ZeRO-3: who holds what, what a step sends, where parameters lie, and what reports say of it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks.communication.partition import meta_llama
from ds_fira.core.settings import GroupSettings
from ds_fira.optim.settings import check_params
from ds_fira.optim.state_size import formula_bytes
from ds_fira.sharding.lowrank.answer_form import basis_rows_lent, low_rank_elements
from ds_fira.tools.dry_run import plan_run
from tests.distributed.test_zero3 import MODULE, PARAMS, SHAPES, check, check_balance, run, split_matrices
from tests.distributed.zero_jobs import config
from tests.ranks import Pools


def test_counted_bytes(ranks: Pools) -> None:
    """Three ranks, by hand, r = 2: both matrices have 280 elements in slices of 94, 94 and 92.

    (7, 40), left, owner 0: columns 0 to 13, 13 to 26 and 26 to 40 of R are kept by ranks 0, 1 and 2. A rank sends
    r + 1 for every column that another keeps, and N, R and a float64 for every column that it keeps to each of the two
    others: the turn is short. All touch all columns. A refresh: 94 and 92 to rank 0, and 1 + 3 x r back to each.
    (40, 7), right, owner 1: rows 13 and 26 are split, kept by ranks 0 and 1: r + 1 up and 2 (r + 1) down for each. 2,
    2, 3 rows of P are held, sent to two others in the first step, and kept there. A refresh: 94 and 92 to rank 1, and
    1 + 2 x r, 1 + 3 x r back; then the rows of P. The parts of R are sent with the old basis too.
    Sums: 2 and 3 numbers of 8 bytes for each matrix on every rank.
    """
    results = run(ranks, 3, shapes=[(7, 40), (40, 7)], rank=2, update_proj_gap=6, steps=7)
    low_rank = [matrix for *_, matrix in split_matrices(results).values()]
    assert [(matrix.side, matrix.owner, matrix.way) for matrix in low_rank] == [
        ("left", 0, "low_rank"),
        ("right", 1, "low_rank"),
    ]
    left = [3 * 27 + 6 * 2 * 13, 3 * 27 + 6 * 2 * 13, 3 * 26 + 6 * 2 * 14]
    rows = [2 * 2 * 2, 2 * 2 * 2, 2 * 3 * 2]
    again = [3 * 27, 3 * 27 + 3, 3 * 26 + 3]
    right = [6, 3 + 6, 3]
    refresh = [2 * (1 + 3 * 2) + 94, 94 + (1 + 2 * 2) + (1 + 3 * 2), 92 + 92]
    sums = 2 * (2 + 3) * 8
    settings = GroupSettings.of(check_params({**PARAMS, "rank": 2}))
    for rank, result in enumerate(results):
        step = 4 * (left[rank] + right[rank]) + sums
        steps = [after - before for before, after in zip(result["sent"], result["sent"][1:], strict=False)]
        refreshing = step + 4 * (refresh[rank] + again[rank] + rows[rank])
        assert steps == [refreshing + 4 * rows[rank], *[step] * 5, refreshing]
        sent = [low_rank_elements(matrix, rank, settings, short=True, keeps_rows=True) for matrix in low_rank]
        assert 4 * sum(sent) == step
        assert [matrix.rank * basis_rows_lent(matrix, rank) for matrix in low_rank] == [0, rows[rank]]
        assert sum(matrix.refresh_elements(rank, settings) for matrix in low_rank) == refresh[rank]


def test_measured_state(ranks: Pools) -> None:
    """The state of all ranks is the paper's formula, but for counters, |S|, padding and rows of P that are split."""
    for world_size in (2, 3, 4):
        results = run(ranks, world_size, shapes=[(32, 96), (96, 32), (32, 32)], rank=8, steps=1)
        check_balance(results)
        memory = results[0]["memory"]
        extra = sum(memory["optimizer_state_bytes"]) - memory["paper_formula_bytes"]
        assert 0 <= extra <= 0.02 * memory["paper_formula_bytes"]


@pytest.mark.parametrize(("model", "rank"), [("60m", 128), ("7b", 1024)])
def test_planned_llamas(model: str, rank: int) -> None:
    """No rank holds more than 1.25 of an even share, nothing twice, and every matrix goes the way that sends less."""
    module = meta_llama(model)
    for ranks in (2, 3, 4, 8, 16):
        run = plan_run(module, ranks, zero_stage=3, rank=rank)
        held = [sum(group.state_elements(index) for group in run.groups) for index in range(ranks)]
        assert max(held) * ranks <= 1.25 * sum(held)
        assert 4 * sum(held) <= 1.001 * formula_bytes(run.records)
        for group in run.groups:
            for matrix in group.layout.split if group.layout is not None else ():
                assert matrix.way == matrix.cheaper_way(ranks, GroupSettings.of(group.settings))
                assert len(matrix.fragments) == ranks


def test_few_matrices_are_sharded_evenly(ranks: Pools) -> None:
    """Where owners of whole matrices would hold most of the state, matrices are stepped where they lie instead."""
    changed = {"shapes": [(3, 50), (3, 50)], "rank": 3, "steps": 5}
    exact, even = (run(ranks, 3, **changed, exact_cuts=exact) for exact in (True, False))
    for results, way in ((exact, "gathered"), (even, "low_rank")):
        assert {matrix.way for *_, matrix in split_matrices(results).values()} == {way}
        check(results, ways=way)
    (matrix, _) = (matrix for *_, matrix in split_matrices(even).values())
    assert matrix.cheaper_way(3, GroupSettings.of(check_params({**PARAMS, "rank": 3}))) == "gathered"


@pytest.mark.parametrize(
    ("stage", "dtype", "extra"),
    [
        (1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}),
        (2, "fp32", {"zero_round_robin_gradients": True}),
        (3, "bf16", {}),
        (3, "fp32", {"zero_sub_group_size": 100}),
    ],
    ids=str,
)
def test_pieces(ranks: Pools, stage: int, dtype: str, extra: dict[str, Any]) -> None:
    """Where the elements of every parameter lie, by what lies there: each once on some rank, whatever the wrapper."""
    job = {"ds_config": config(stage, dtype, PARAMS, **extra), "shapes": SHAPES}
    for covered in ranks.run(3, "look_at_slices", module=MODULE, **job):
        assert covered == {"all": True, "same": True}


def test_bytes_of_an_engine(ranks: Pools) -> None:
    """Slices of every parameter, rounded up: bf16 weights and gradients, float32 masters; and the bucket."""
    zero = {"zero_reduce_bucket_size": 700, "zero_stage3_param_persistence_threshold": 0, "zero_overlap_comm": False}
    ds_config = config(3, "bf16", PARAMS, **zero)
    numels = [m * n for m, n in SHAPES] + [66, 6, 6, 66]
    held = sum(-(-numel // 3) for numel in numels)
    for found, state in ranks.run(3, "bytes_of_engine", module=MODULE, ds_config=ds_config, shapes=SHAPES):
        assert found["master_weights"] == 4 * held
        assert found["parameters"] == found["gradients"] == 2 * held
        assert found["buffers"] == 2 * 700
        assert found["optimizer_states"] == state > 0


def test_monitor(ranks: Pools, tmp_path: Path) -> None:
    """The events of a run are those of ZeRO-2."""
    found = []
    for stage in (2, 3):
        monitor = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / str(stage)), "job_name": "run"}}
        options = {**monitor, "steps_per_print": 2, "gradient_clipping": 0.05}
        if stage == 3:
            run(ranks, 3, steps=4, **options)
        else:
            ranks.run(3, "train", ds_config=config(2, "fp32", PARAMS, **options), shapes=SHAPES, steps=4)
        events = {}
        for path in (tmp_path / str(stage) / "run").glob("*.csv"):
            with path.open() as file:
                events[path.stem] = [(int(x), float(value)) for x, value in list(csv.reader(file))[1:]]
        found.append(events)
    assert "Train_Fira_grad_norm" in found[0]
    for name in found[0].keys() - {"Train_Fira_refresh_seconds"}:
        assert [x for x, _ in found[0][name]] == [x for x, _ in found[1][name]]
        assert [v for _, v in found[1][name]] == pytest.approx([v for _, v in found[0][name]], rel=1e-3), name
