"""ZeRO-3: every matrix cut over all ranks, the weights of one process, and no state held twice."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_fira
from benchmarks.partition import meta_llama
from ds_fira.binding import Binding
from ds_fira.memory import formula_bytes
from ds_fira.plan import plan_run
from ds_fira.settings import check_params
from ds_fira.shard import matrices_of
from tests.distributed import Pools
from tests.zero_jobs import config

MODULE = "tests.zero3_jobs"
# Both sides, rows cut anywhere, three rows, one row, fewer elements than four ranks.
SHAPES = [(12, 40), (40, 12), (13, 37), (12, 40), (31, 17), (3, 50), (2, 300), (1, 3)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 4, "alpha": 0.5, "weight_decay": 0.1}
STEPS = 10  # refreshes at 0, 4 and 8
# Of the weight change. R is summed over the ranks in another order than in one product: float32 rounding, grown by the
# moments of a few steps. A forgotten row or a limiter that differs shows at 1e-2 and more.
TOLERANCE = 1e-5


def run(ranks: Pools, world_size: int, dtype: str = "fp32", **changed: Any) -> list[dict[str, Any]]:
    """Train with some settings changed; what is no setting goes to the job, or to the config."""
    job = {"shapes": SHAPES, "steps": STEPS}
    for key in ("shapes", "steps", "kind", "frozen", "init", "as_object", "faults", "limits"):
        if key in changed:
            job[key] = changed.pop(key)
    extra = {k: changed.pop(k) for k in list(changed) if k.startswith(("zero_", "gradient_", "csv_", "steps_"))}
    ds_config = config(3, dtype, {**PARAMS, **changed}, **extra)
    if "as_object" in job:
        del ds_config["optimizer"]
    return ranks.run(world_size, "train", module=MODULE, ds_config=ds_config, **job)


def alone(results: list[dict[str, Any]]) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Weights and states by name of one process that makes the same steps with the gradients that the ranks saw."""
    shapes, params = results[0]["shapes"], {}
    for name, weight in results[0]["start"].items():
        params[name] = torch.nn.Parameter(weight.view(shapes[name]).clone())
    optimizer = ds_fira.FiraAdam(
        [{**settings, "params": [params[name] for name in names]} for settings, names in results[0]["groups"]]
    )
    # `stagger` goes by the matrices' order in the module, which that of the groups is not.
    projected = {name for settings, names in results[0]["groups"] for name in names if "rank" in settings}
    first = 0
    for name in (name for name in results[0]["module"] if name in projected):
        whole = tuple(matrices_of(name, shapes[name]))
        indices = tuple(range(first, first + len(whole)))
        optimizer.bind(params[name], Binding(whole, indices, batched=params[name].ndim == 3))
        first += len(whole)
    for step, seen in enumerate(results[0]["gradients"]):
        for name in seen:
            slices = torch.cat([result["gradients"][step][name] for result in results])
            params[name].grad = slices[: params[name].numel()].view(shapes[name]).float()
        if seen:  # the engine skips a step that overflows in fp16
            optimizer.step()
    return {name: (param.detach(), optimizer.state[param]) for name, param in params.items()}


def cuts(results: list[dict[str, Any]]) -> dict[str, tuple[int, int, Any]]:
    """The cut matrices by name, with the sub-group they are in and their position."""
    projected = [i for i, (settings, _) in enumerate(results[0]["groups"]) if "rank" in settings]
    return {
        matrix.name: (i, position, matrix)
        for i, layout in zip(projected, results[0]["layouts"], strict=True)
        for position, matrix in enumerate(layout.cuts)
    }


def check(results: list[dict[str, Any]], tolerance: float = TOLERANCE, ways: str = "lean") -> None:
    """Weights as in one process, of lean matrices but for rounding; states put together are its states.

    Args:
        results: of all ranks.
        tolerance: of the weight change and of the moments.
        ways: "lean" where most matrices, all but thin ones, are stepped where they lie; "base" where none is.
    """
    expected, found = alone(results), cuts(results)
    lean = [name for name, (*_, matrix) in found.items() if matrix.way == "lean"]
    base = [name for name, (*_, matrix) in found.items() if matrix.way == "base"]
    assert (ways == "lean") == bool(lean)
    assert not lean or len(lean) >= len(base)
    ways_by_param = {name.partition("[")[0]: matrix.way for name, (_, _, matrix) in found.items()}
    for name, (weight, _) in expected.items():
        for result in results:
            ended = result["end"][name].view_as(weight)
            assert torch.equal(ended, results[0]["end"][name].view_as(weight))
            assert torch.equal(result["module"][name], ended.to(result["module"][name].dtype)), name
        change = (weight - results[0]["start"][name].view_as(weight)).norm()
        assert change > 0.0, name
        if ways_by_param.get(name) == "lean":
            assert (weight - ended).norm() <= tolerance * change, name
        else:
            assert torch.equal(weight, ended), name
    for name, (group, position, matrix) in found.items():
        if matrix.way == "lean" and name in expected:
            check_state(results, group, position, matrix, expected[name][1], tolerance)


def check_state(
    results: list[dict[str, Any]], group: int, position: int, matrix: Any, expected: Any, tolerance: float
) -> None:
    """The parts of a lean matrix's state that ranks hold make up the whole one; nothing but |S| is held twice."""
    mark, left = f".cut{position}", matrix.side == "left"
    states = {rank: results[rank]["states"][group] for rank, _ in matrix.fragments}
    for rank, state in states.items():
        for key in ("step", "refresh_step"):
            assert torch.equal(state[key + mark], expected[key])
        torch.testing.assert_close(state["residual_norm" + mark], expected["residual_norm"], rtol=1e-4, atol=0.0)
        rows = matrix.basis_rows(rank)
        assert torch.equal(state["basis" + mark], expected["basis"][rows.start : rows.stop])
        assert ("exp_avg" + mark in state) == (len(matrix.kept(rank)) > 0)
    for key in ("exp_avg", "exp_avg_sq"):
        parts = [state[key + mark] for state in states.values() if key + mark in state]
        whole = torch.cat(parts, 1 if left else 0)
        assert (whole - expected[key]).norm() <= tolerance * expected[key].norm()


def check_balance(results: list[dict[str, Any]]) -> None:
    """No rank holds more than 1.25 of an even share of the state."""
    held = [result["held"] for result in results]
    assert results[0]["memory"]["optimizer_state_bytes"] == held
    assert max(held) * len(held) <= 1.25 * sum(held)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("changed", [{}, {"formulation": "paper", "proj_type": "right"}], ids=str)
def test_one_process_s_weights(ranks: Pools, world_size: int, changed: dict[str, Any]) -> None:
    """Both sides, cuts in and between rows, refreshes and the limiter, every matrix stepped where it lies."""
    results = run(ranks, world_size, **changed)
    assert results[0]["wrapper"] == "DeepSpeedZeroOptimizer_Stage3"
    check(results)
    assert 0 < results[0]["metrics"]["limiter_activations"] < results[0]["metrics"]["matrix_steps"]
    assert results[0]["metrics"]["matrix_steps"] == STEPS * len(SHAPES)
    lean = [matrix for *_, matrix in cuts(results).values() if matrix.way == "lean"]
    assert {matrix.side for matrix in lean} == ({"right"} if changed else {"left", "right"})
    assert max(len(matrix.fragments) for matrix in lean) == world_size


@pytest.mark.parametrize(
    ("dtype", "extra"),
    [
        ("bf16", {"gradient_accumulation_steps": 3}),
        ("fp16", {"gradient_clipping": 0.05}),
        ("bf16", {"zero_offload_optimizer": {"device": "cpu"}, "zero_offload_param": {"device": "cpu"}}),
        ("fp32", {"zero_reduce_scatter": False, "zero_overlap_comm": True, "zero_contiguous_gradients": False}),
        ("bf16", {"zero_zero_hpz_partition_size": 3}),
    ],
    ids=str,
)
def test_engines(ranks: Pools, dtype: str, extra: dict[str, Any]) -> None:
    """Low precision, accumulation, clipping, offload of states and parameters, several sub-groups, frozen weights."""
    frozen = ("layers.3.weight", "norm.bias")
    results = run(ranks, 3, dtype, steps=9, frozen=frozen, zero_sub_group_size=150, **extra)
    check(results)
    assert len(results[0]["groups"]) > 4
    check_balance(results)
    named = {name: (shape, rank) for name, shape, rank in results[0]["inventory"]}
    assert named["layers.2.weight"] == ((13, 37), 3)
    assert named["embedding.weight"] == ((11, 6), None)
    assert not named.keys() & set(frozen)


@pytest.mark.parametrize(
    "changed",
    [
        {"subspace": "randomized", "refresh_moments": "rotate", "stagger": True},
        {"subspace": "gram", "refresh_moments": "reset", "proj_type": "reverse_std"},
        {"refresh_moments": "rotate", "scaling": "matrix", "formulation": "paper"},
        {"limiter": "none", "scaling": "none", "residual_scale": 0.5},
    ],
    ids=str,
)
def test_settings(ranks: Pools, changed: dict[str, Any]) -> None:
    """Settings that a step or a refresh reads; all matrices in turns of one."""
    limits = {"ds_fira.lean.MAX_STEP_NUMEL": 1}
    check(run(ranks, 3, limits=limits, **changed))


@pytest.mark.parametrize("changed", [{}, {"state_dtype": "int8"}, {"state_dtype": "bfloat16"}], ids=str)
def test_exact_cuts(ranks: Pools, changed: dict[str, Any]) -> None:
    """Stepped whole on their owners, in several turns: equal to the bit."""
    limits = {"ds_fira.layout.MAX_TURN_NUMEL": 500}
    changed = {**changed, "exact_cuts": True, "subspace": "randomized", "refresh_moments": "rotate"}
    results = run(ranks, 3, "bf16", limits=limits, **changed)
    check(results, ways="base")
    assert max(len(layout.base_turns) for layout in results[0]["layouts"]) == 1  # with the limit of this process
    assert results[0]["turns"] > 1


@pytest.mark.parametrize("state_dtype", ["int8", "bfloat16"])
def test_compressed_states(ranks: Pools, state_dtype: str) -> None:
    """Where matrices lie: the noise of rounding differs from one process's, the weights do by as little."""
    results = run(ranks, 3, "bf16", state_dtype=state_dtype)
    expected = alone(results)
    for name, (weight, _) in expected.items():
        ended, start = (results[0][key][name].view_as(weight) for key in ("end", "start"))
        assert (weight - ended).norm() <= 0.1 * (weight - start).norm(), name
    bits = {"int8": torch.int8, "bfloat16": torch.bfloat16}[state_dtype]
    assert {v.dtype for s in results[0]["states"] for k, v in s.items() if k.startswith("exp_avg.cut")} == {bits}


def test_zero_init_and_an_optimizer_object(ranks: Pools) -> None:
    """Parameters that have no data before the optimizer is built: the same groups, the same run to the bit."""
    expected = run(ranks, 3)
    for changed in ({}, {"as_object": PARAMS}):
        found = run(ranks, 3, init=True, **changed)
        check(found)
        assert [len(names) for _, names in found[0]["groups"]] == [8, 2, 2] if changed else [8, 4]
        if not changed:
            for name, weight in expected[0]["end"].items():
                assert torch.equal(weight, found[0]["end"][name]), name


def test_experts(ranks: Pools) -> None:
    """Experts of a 3-D tensor are matrices of their own, some whole on a rank, some cut."""
    results = run(ranks, 3, kind="experts", shapes=[], exact_cuts=True, steps=6)
    (layout,) = results[0]["layouts"]
    assert any(layout.whole)
    assert {matrix.name for matrix in layout.cuts} == {"experts.weight[1]", "experts.weight[3]"}
    check(results, ways="base")
    check(run(ranks, 3, kind="experts", shapes=[], rank=1, update_proj_gap=100), ways="lean")


def test_a_residual_that_is_rounding(ranks: Pools) -> None:
    """A gradient inside its new basis: the residual is summed itself, in two more collectives, and is no history."""
    job = {"alpha": 1.0, "steps": 5, "shapes": SHAPES[:4]}  # of the thin ones the basis spans all, always
    ordinary, faulty = (run(ranks, 3, **job, faults=faults) for faults in ({}, {4: ("layers.2.weight", "rank 1")}))
    check(faulty)
    assert faulty[0]["collectives"] == ordinary[0]["collectives"] + 2
    group, position, matrix = cuts(faulty)["layers.2.weight"]
    for rank, _ in matrix.fragments:
        assert ordinary[rank]["states"][group][f"residual_norm.cut{position}"] > 0.0
        assert faulty[rank]["states"][group][f"residual_norm.cut{position}"] == 0.0


def test_counted_bytes(ranks: Pools) -> None:
    """Three ranks, by hand, r = 2: both matrices have 280 elements in slices of 94, 94 and 92.

    (7, 40), left, owner 0: columns 0 to 13, 13 to 26 and 26 to 40 of R are kept by ranks 0, 1 and 2. A rank sends
    r + 1 for every column that another keeps, and again for every column that it keeps to each of the two others. All
    touch all columns. A refresh: 94 and 92 to rank 0, and 1 + 3 x r back to each.
    (40, 7), right, owner 1: rows 13 and 26 are cut, kept by ranks 0 and 1: r + 1 up and down for each. 2, 2 and 3 rows
    of P are held, and sent to two others. A refresh: 94 and 92 to rank 1, and 1 + 2 x r, 1 + 3 x r back.
    Sums: 2 and 3 numbers of 8 bytes for each matrix on every rank.
    """
    results = run(ranks, 3, shapes=[(7, 40), (40, 7)], rank=2, update_proj_gap=6, steps=7)
    lean = [matrix for *_, matrix in cuts(results).values()]
    assert [(matrix.side, matrix.owner, matrix.way) for matrix in lean] == [("left", 0, "lean"), ("right", 1, "lean")]
    left = [3 * (27 + 2 * 13), 3 * (27 + 2 * 13), 3 * (26 + 2 * 14)]
    right = [3 + 2 * 2 * 2, 3 + 3 + 2 * 2 * 2, 3 + 2 * 3 * 2]
    refresh = [2 * (1 + 3 * 2) + 94, 94 + (1 + 2 * 2) + (1 + 3 * 2), 92 + 92]
    sums = 2 * (2 + 3) * 8
    settings = check_params({**PARAMS, "rank": 2})
    for rank, result in enumerate(results):
        step = 4 * (left[rank] + right[rank]) + sums
        steps = [after - before for before, after in zip(result["sent"], result["sent"][1:], strict=False)]
        assert steps == [step + 4 * refresh[rank], *[step] * 5, step + 4 * refresh[rank]]
        assert 4 * sum(matrix.lean_elements(rank) for matrix in lean) == step
        assert sum(matrix.refresh_elements(rank, settings) for matrix in lean) == refresh[rank]


def test_measured_state(ranks: Pools) -> None:
    """The state of all ranks is the paper's formula, but for counters, |S|, padding and rows of P that are cut."""
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
            for matrix in group.layout.cuts if group.layout is not None else ():
                assert matrix.way == matrix.cheaper_way(ranks, group.settings)
                assert len(matrix.fragments) == ranks


def test_few_matrices_are_spread(ranks: Pools) -> None:
    """Where owners of whole matrices would hold most of the state, matrices are stepped where they lie instead."""
    changed = {"shapes": [(3, 50), (3, 50)], "rank": 3, "steps": 5}
    exact, spread = (run(ranks, 3, **changed, exact_cuts=exact) for exact in (True, False))
    for results, way in ((exact, "base"), (spread, "lean")):
        assert {matrix.way for *_, matrix in cuts(results).values()} == {way}
        check(results, ways=way)
    (matrix, _) = (matrix for *_, matrix in cuts(spread).values())
    assert matrix.cheaper_way(3, check_params({**PARAMS, "rank": 3})) == "base"


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
    for covered in ranks.run(3, "look_at_pieces", module=MODULE, **job):
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
