"""ZeRO-3: every matrix split over all ranks, the weights of one process, and no state held twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_fira
from ds_fira.sharding.geometry import matrices_of
from ds_fira.sharding.local_matrices import LocalMatrices
from tests.distributed.zero_jobs import config
from tests.grids import once, widest
from tests.ranks import Pools

MODULE = "tests.distributed.zero3_jobs"
# Both sides, rows split anywhere, three rows, one row, fewer elements than four ranks.
SHAPES = [(12, 40), (40, 12), (13, 37), (12, 40), (31, 17), (3, 50), (2, 300), (1, 3)]
FEW = SHAPES[:4]  # both sides, rows split anywhere
# Thin matrices are projected at a rank above their smaller side too, as the released code does.
PARAMS = {
    "lr": 0.01,
    "rank": 3,
    "update_proj_gap": 3,
    "alpha": 0.5,
    "weight_decay": 0.1,
    "project_full_rank": True,
}
STEPS = 6  # refreshes at 0 and 3
SHORT = {"update_proj_gap": 2, "steps": 4}  # at 0 and 2
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
        optimizer.bind(params[name], LocalMatrices(whole, indices, batched=params[name].ndim == 3))
        first += len(whole)
    for step, seen in enumerate(results[0]["gradients"]):
        for name in seen:
            slices = torch.cat([result["gradients"][step][name] for result in results])
            params[name].grad = slices[: params[name].numel()].view(shapes[name]).float()
        if seen:  # the engine skips a step that overflows in fp16
            optimizer.step()
    return {name: (param.detach(), optimizer.state[param]) for name, param in params.items()}


def split_matrices(results: list[dict[str, Any]]) -> dict[str, tuple[int, int, Any]]:
    """The split matrices by name, with the sub-group they are in and their position."""
    projected = [i for i, (settings, _) in enumerate(results[0]["groups"]) if "rank" in settings]
    return {
        matrix.name: (i, position, matrix)
        for i, layout in zip(projected, results[0]["layouts"], strict=True)
        for position, matrix in enumerate(layout.split)
    }


def check(results: list[dict[str, Any]], tolerance: float = TOLERANCE, ways: str = "low_rank") -> None:
    """Weights as in one process, of low-rank matrices but for rounding; states put together are its states.

    Args:
        results: of all ranks.
        tolerance: of the weight change and of the moments.
        ways: "low_rank" where most matrices, all but thin ones, are stepped where they lie; "gathered" where none is.
    """
    expected, found = alone(results), split_matrices(results)
    low_rank = [name for name, (*_, matrix) in found.items() if matrix.way == "low_rank"]
    gathered = [name for name, (*_, matrix) in found.items() if matrix.way == "gathered"]
    assert (ways == "low_rank") == bool(low_rank)
    assert not low_rank or len(low_rank) >= len(gathered)
    ways_by_param = {name.partition("[")[0]: matrix.way for name, (_, _, matrix) in found.items()}
    for name, (weight, _) in expected.items():
        for result in results:
            ended = result["end"][name].view_as(weight)
            assert torch.equal(ended, results[0]["end"][name].view_as(weight))
            assert torch.equal(result["module"][name], ended.to(result["module"][name].dtype)), name
        change = (weight - results[0]["start"][name].view_as(weight)).norm()
        assert change > 0.0, name
        if ways_by_param.get(name) == "low_rank":
            assert (weight - ended).norm() <= tolerance * change, name
        else:
            assert torch.equal(weight, ended), name
    for name, (group, position, matrix) in found.items():
        if matrix.way == "low_rank" and name in expected:
            check_state(results, group, position, matrix, expected[name][1], tolerance)


def check_state(
    results: list[dict[str, Any]], group: int, position: int, matrix: Any, expected: Any, tolerance: float
) -> None:
    """The parts of a low-rank matrix's state that ranks hold make up the whole one; nothing but |S| is held twice."""
    mark, left = f".cut{position}", matrix.side == "left"
    states = {rank: results[rank]["states"][group] for rank, _ in matrix.fragments}
    for rank, state in states.items():
        for key in ("step", "refresh_step"):
            assert torch.equal(state[key + mark], expected[key])
        torch.testing.assert_close(state["residual_norm" + mark], expected["residual_norm"], rtol=1e-4, atol=0.0)
        if "residual_avg_sq" in expected and expected["residual_avg_sq"].numel() == 1:
            torch.testing.assert_close(
                state["residual_avg_sq" + mark], expected["residual_avg_sq"], rtol=1e-4, atol=0.0
            )
        rows = matrix.basis_rows(rank)
        assert torch.equal(state["basis" + mark], expected["basis"][rows.start : rows.stop])
        assert ("exp_avg" + mark in state) == (len(matrix.kept(rank)) > 0)
    for key in ("exp_avg", "exp_avg_sq"):
        parts = [state[key + mark] for state in states.values() if key + mark in state]
        whole = torch.cat(parts, 1 if left else 0)
        assert (whole - expected[key]).norm() <= tolerance * expected[key].norm()
    if "residual_avg_sq" in expected and expected["residual_avg_sq"].numel() > 1:
        parts = [state["residual_avg_sq" + mark] for state in states.values() if "residual_avg_sq" + mark in state]
        torch.testing.assert_close(torch.cat(parts), expected["residual_avg_sq"], rtol=1e-4, atol=0.0)


def check_balance(results: list[dict[str, Any]]) -> None:
    """No rank holds more than 1.25 of an even share of the state."""
    held = [result["held"] for result in results]
    assert results[0]["memory"]["optimizer_state_bytes"] == held
    assert max(held) * len(held) <= 1.25 * sum(held)


@pytest.mark.parametrize(
    ("world_size", "changed"), once([2, 3, 4], [{}, {"formulation": "paper", "proj_type": "right"}]), ids=str
)
def test_one_process_s_weights(ranks: Pools, world_size: int, changed: dict[str, Any]) -> None:
    """Both sides, splits in and between rows, refreshes and the limiter, every matrix stepped where it lies."""
    results = run(ranks, world_size, **SHORT, **changed)
    assert results[0]["wrapper"] == "DeepSpeedZeroOptimizer_Stage3"
    check(results)
    assert 0 < results[0]["metrics"]["limiter_activations"] < results[0]["metrics"]["matrix_steps"]
    assert results[0]["metrics"]["matrix_steps"] == SHORT["steps"] * len(SHAPES)
    low_rank = [matrix for *_, matrix in split_matrices(results).values() if matrix.way == "low_rank"]
    assert {matrix.side for matrix in low_rank} == ({"right"} if changed else {"left", "right"})
    assert max(len(matrix.fragments) for matrix in low_rank) == world_size


@pytest.mark.parametrize(
    ("dtype", "extra"),
    [
        ("bf16", {"gradient_accumulation_steps": 2}),
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
    world_size = extra.get("zero_zero_hpz_partition_size", 2)
    results = run(ranks, world_size, dtype, shapes=SHAPES[:5], frozen=frozen, zero_sub_group_size=150, **SHORT, **extra)
    check(results)
    assert len(results[0]["groups"]) > 4
    check_balance(results)
    named = {name: (shape, rank) for name, shape, rank in results[0]["inventory"]}
    assert named["layers.2.weight"] == ((13, 37), 3)
    assert named["embedding.weight"] == ((11, 6), None)
    assert not named.keys() & set(frozen)


@pytest.mark.parametrize(
    "changed",
    widest(
        [
            {"subspace": "randomized", "refresh_moments": "rotate", "stagger": True},
            {"subspace": "gram", "refresh_moments": "reset", "proj_type": "reverse_std"},
            {"refresh_moments": "rotate", "scaling": "matrix", "formulation": "paper"},
            {"limiter": "none", "scaling": "none", "residual_scale": 0.5},
            {"residual": "none"},
            {"residual": "normalized"},
            {"residual": "normalized", "scaling": "matrix", "limiter": "growth", "refresh_moments": "rotate"},
        ],
    ),
    ids=str,
)
def test_settings(ranks: Pools, changed: dict[str, Any]) -> None:
    """Settings that a step or a refresh reads; all matrices in turns of one."""
    limits = {"ds_fira.sharding.lowrank.step.MAX_STEP_NUMEL": 1}
    check(run(ranks, 2, limits=limits, shapes=FEW, **SHORT, **changed))


@pytest.mark.parametrize(
    "changed",
    widest(
        [{}, {"state_dtype": "int8"}, {"state_dtype": "bfloat16"}, {"residual": "normalized", "state_dtype": "int8"}],
    ),
    ids=str,
)
def test_exact_cuts(ranks: Pools, changed: dict[str, Any]) -> None:
    """Stepped whole on their owners, in several turns: equal to the bit."""
    limits = {"ds_fira.sharding.plan.MAX_TURN_NUMEL": 500}
    changed = {**changed, "exact_cuts": True, "subspace": "randomized", "refresh_moments": "rotate"}
    results = run(ranks, 3, "bf16", limits=limits, shapes=FEW, **{**SHORT, **changed})
    check(results, ways="gathered")
    assert max(len(layout.gathered_turns) for layout in results[0]["layouts"]) == 1  # with the limit of this process
    assert results[0]["turns"] > 1


@pytest.mark.parametrize("state_dtype", ["int8", "bfloat16"])
def test_compressed_states(ranks: Pools, state_dtype: str) -> None:
    """Where matrices lie: the noise of rounding differs from one process's, the weights do by as little."""
    results = run(ranks, 2, "bf16", shapes=FEW, state_dtype=state_dtype, **SHORT)
    expected = alone(results)
    for name, (weight, _) in expected.items():
        ended, start = (results[0][key][name].view_as(weight) for key in ("end", "start"))
        assert (weight - ended).norm() <= 0.1 * (weight - start).norm(), name
    bits = {"int8": torch.int8, "bfloat16": torch.bfloat16}[state_dtype]
    assert {v.dtype for s in results[0]["states"] for k, v in s.items() if k.startswith("exp_avg.cut")} == {bits}


def test_zero_init_and_an_optimizer_object(ranks: Pools) -> None:
    """Parameters that have no data before the optimizer is built: the same groups, the same run to the bit."""
    expected = run(ranks, 2, shapes=FEW, **SHORT)
    for changed in ({}, {"as_object": {**PARAMS, "update_proj_gap": 2}}):
        found = run(ranks, 2, init=True, shapes=FEW, **SHORT, **changed)
        check(found)
        assert [len(names) for _, names in found[0]["groups"]] == ([4, 2, 2] if changed else [4, 4])
        if not changed:
            for name, weight in expected[0]["end"].items():
                assert torch.equal(weight, found[0]["end"][name]), name


def test_experts(ranks: Pools) -> None:
    """Experts of a 3-D tensor are matrices of their own, some whole on a rank, some split."""
    results = run(ranks, 3, kind="experts", shapes=[], exact_cuts=True, steps=6)
    (layout,) = results[0]["layouts"]
    assert any(layout.unsplit)
    assert {matrix.name for matrix in layout.split} == {"experts.weight[1]", "experts.weight[3]"}
    check(results, ways="gathered")
    check(run(ranks, 3, kind="experts", shapes=[], rank=1, update_proj_gap=100), ways="low_rank")


def test_a_residual_that_is_rounding(ranks: Pools) -> None:
    """A gradient inside its new basis: the residual is summed itself, in one more collective, and is no history.

    R of borrowed entries has come with N already: the turn is short.
    """
    job = {"alpha": 1.0, "steps": 4, "shapes": FEW}  # of the thin ones the basis spans all, always
    ordinary, faulty = (run(ranks, 3, **job, faults=faults) for faults in ({}, {3: ("layers.2.weight", "rank 1")}))
    check(faulty)
    assert faulty[0]["collectives"] == ordinary[0]["collectives"] + 1
    group, position, matrix = split_matrices(faulty)["layers.2.weight"]
    for rank, _ in matrix.fragments:
        assert ordinary[rank]["states"][group][f"residual_norm.cut{position}"] > 0.0
        assert faulty[rank]["states"][group][f"residual_norm.cut{position}"] == 0.0


def test_one_rank(ranks: Pools) -> None:
    """Nothing is split, nothing is sent, and nothing differs."""
    results = run(ranks, 1, "bf16", steps=5)
    assert sum(len(layout.unsplit[0]) for layout in results[0]["layouts"]) == len(SHAPES)
    assert results[0]["sent"][-1] == 0
    check(results, ways="gathered")
