"""AutoTP: the slices of a matrix are stepped as the whole is in one process, with its basis, and states kept once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_fira.optim.registry import TYPES
from tests.distributed.tensor_parallel_jobs import STEPS
from tests.distributed.tensor_parallel_reference import combined, given, in_order, reference, whole_of
from tests.distributed.zero_jobs import config
from tests.grids import full_if
from tests.ranks import Pools

MODULE = "tests.distributed.tensor_parallel_jobs"
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3, "alpha": 0.5, "weight_decay": 0.1}
MATRICES = 7  # of a layer


def tp_config(stage: int, size: int, dtype: str = "fp32", clip: float = 0.0, **params: Any) -> dict[str, Any]:
    """A config with AutoTP over `size` ranks."""
    given = {**PARAMS, **params}
    return config(stage, dtype, given, gradient_clipping=clip, tensor_parallel={"autotp_size": size})


ROTATED, PAPER = (
    {"proj_type": "reverse_std", "refresh_moments": "rotate"},
    {"formulation": "paper", "scaling": "matrix"},
)
# Ranks, autotp_size, stage, model, clipping, settings, the ways in which matrices are stepped.
CASES = {
    "rows and columns": (2, 2, 1, "llama", 0.5, {}, {"low_rank"}),
    "stage 0": (2, 2, 0, "llama", 0.0, {}, {"low_rank"}),
    "stage 2, slices of unequal width": (2, 2, 2, "uneven", 0.5, {}, {"low_rank"}),
    "stage 3, slices of unequal width": (2, 2, 3, "uneven", 0.5, {}, {"low_rank"}),
    "stage 3, gathered": (2, 2, 3, "llama", 0.5, {"exact_cuts": True}, {"gathered"}),
    "the other side, rotated": (
        2,
        2,
        2,
        "llama",
        0.5,
        ROTATED,
        {"low_rank"},
    ),
    "gathered": (2, 2, 1, "llama", 0.5, {"exact_cuts": True}, {"gathered"}),
    "gathered at stage 0": (2, 2, 0, "llama", 0.0, {"exact_cuts": True}, {"gathered"}),
    "the paper's formulation, one factor": (
        2,
        2,
        1,
        "llama",
        0.0,
        PAPER,
        {"low_rank"},
    ),
    "ApolloAdam": (2, 2, 1, "llama", 0.5, {"type": "ApolloAdam"}, {"low_rank"}),
    "ApolloAdam, two copies, cut slices": (4, 2, 2, "uneven", 0.5, {"type": "ApolloAdam"}, {"low_rank"}),
    "randomized": (2, 2, 1, "llama", 0.0, {"subspace": "randomized"}, {"low_rank"}),
    "biases": (2, 2, 1, "biases", 0.5, {}, {"low_rank"}),
    "fused queries, keys and values": (2, 2, 1, "gpt_neox", 0.5, {}, {"low_rank"}),
    "an object": (2, 2, 1, "llama", 0.5, {"way": "object"}, {"low_rank"}),
    "an object at stage 0": (2, 2, 0, "llama", 0.0, {"way": "object"}, {"low_rank"}),
    "layers that are left whole": (2, 2, 1, "llama", 0.5, {"whole": "mlp"}, {"low_rank"}),
    "layers that are left whole, stage 0": (2, 2, 0, "llama", 0.0, {"whole": "mlp"}, {"low_rank"}),
    "staggered at stage 0": (2, 2, 0, "llama", 0.0, {"whole": "mlp", "stagger": True}, {"low_rank"}),
    "two copies": (4, 2, 1, "llama", 0.5, {}, {"low_rank"}),
    "two copies, cut slices": (4, 2, 2, "uneven", 0.5, {}, {"low_rank"}),
    "two copies, cut slices, gathered": (4, 2, 2, "uneven", 0.5, {"exact_cuts": True}, {"gathered"}),
    "two copies, cut slices, the other side": (4, 2, 1, "uneven", 0.5, {"proj_type": "reverse_std"}, {"low_rank"}),
    "two copies at stage 3": (4, 2, 3, "uneven", 0.5, {}, {"low_rank"}),
    "two copies at stage 3, layers that are left whole": (4, 2, 3, "uneven", 0.5, {"whole": "mlp"}, {"low_rank"}),
    "two copies at stage 3, gathered": (4, 2, 3, "uneven", 0.5, {"exact_cuts": True}, {"gathered"}),
    "two copies at stage 0": (4, 2, 0, "llama", 0.5, {"whole": "mlp"}, {"low_rank"}),
    "two copies, layers that are left whole": (4, 2, 1, "uneven", 0.5, {"whole": "mlp"}, {"low_rank"}),
    "four slices": (4, 4, 1, "llama", 0.5, {}, {"low_rank"}),
}
IN_EVERY_RUN = (
    "rows and columns",
    "stage 0",
    "stage 2, slices of unequal width",
    "stage 3, slices of unequal width",
    "gathered",
    "the other side, rotated",
    "layers that are left whole, stage 0",
)


def left_whole(ds_config: dict[str, Any], layer: str) -> dict[str, Any]:
    """A config in which AutoTP leaves layers alone: their matrices are replicated."""
    rows, columns = [".*o_proj.weight$", ".*down_proj.weight$"], [".*[qkv]_proj.weight$", ".*(up|gate)_proj.weight$"]
    specs = [
        {"patterns": [f".*{layer}.*"], "partition_type": "skip"},
        {"patterns": rows, "partition_type": "row"},
        {"patterns": columns, "partition_type": "column"},
    ]
    parallel = {**ds_config["tensor_parallel"], "partition_config": {"use_default_specs": False, "layer_specs": specs}}
    return {**ds_config, "tensor_parallel": parallel}


@pytest.mark.parametrize("name", full_if(lambda name: name not in IN_EVERY_RUN, CASES))
def test_slices_train_as_in_one_process(ranks: Pools, name: str) -> None:
    """Weights and norms of one process with the same whole gradients; replicated weights the same bits."""
    size, tp, stage, model, clip, settings, ways = CASES[name]
    params = {key: value for key, value in settings.items() if key not in ("way", "whole", "type")}
    ds_config, way = tp_config(stage, tp, clip=clip, **params), settings.get("way", "json")
    ds_config = left_whole(ds_config, settings["whole"]) if "whole" in settings else ds_config
    ds_config["optimizer"]["type"] = kind = settings.get("type", "FiraAdam")
    runs = ranks.run(size, "train", MODULE, ds_config=ds_config, model=model, way=way)
    expected = reference(runs, {**PARAMS, **params}, clip, STEPS, TYPES[kind])
    shapes = {each: weight.shape for each, weight in runs[0]["whole"].items()}
    copies = [whole_of([run["after"] for run in row], shapes) for row in in_order(runs)]
    for copy in copies:
        for each, weight in copy.items():
            assert (weight - expected[each]).abs().max() < 1e-6, each
            assert torch.equal(weight, copies[0][each]), each
    for each, shape in shapes.items():
        whole = [run["after"][each] for run in runs if run["after"][each].shape == shape]
        assert all(torch.equal(weight, whole[0]) for weight in whole), each
    for step in range(STEPS):
        right, had = combined(runs, step, clip), given(runs, step)
        assert all((had[each] - grad).abs().max() < 1e-6 for each, grad in right.items())
    for step, norm in enumerate(runs[0]["norms"]):
        if norm is not None:  # nobody keeps it at stage 0 in float32
            total = torch.stack([grad.norm() for grad in combined(runs, step, 0.0).values()]).norm()
            assert norm == pytest.approx(float(total), rel=1e-5)
    found = runs[0]
    assert set(found["ways"].values()) == ways
    assert {each: tuple(shape) for each, shape in found["shapes"].items()} == {k: tuple(v) for k, v in shapes.items()}
    matrices = len(found["projected"])
    assert matrices >= 8
    assert found["metrics"]["matrix_steps"] == STEPS * matrices
    assert found["metrics"]["refreshes"] == 2 * matrices or "stagger" in settings
    if "whole" in settings:
        assert all(settings["whole"] not in each for each in found["ways"]) or size > 2


def test_the_same_norms_as_adamw(ranks: Pools) -> None:
    """The norm of the first gradients is the one that DeepSpeed has for torch's AdamW."""
    for stage, dtype in ((1, "fp32"), (0, "bf16")):
        ds_config = tp_config(stage, 2, dtype, clip=0.5)
        plain = {**ds_config, "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}
        ours, theirs = (ranks.run(2, "train", MODULE, ds_config=each, model="llama")[0] for each in (ds_config, plain))
        assert ours["norms"][0] == pytest.approx(theirs["norms"][0], rel=1e-6)
        assert ours["losses"][0] == theirs["losses"][0]


def test_counted_bytes(ranks: Pools) -> None:
    """Two ranks, by hand, r = 3, two layers; a refresh every four steps.

    Between refreshes: 2 and 3 sums of 8 bytes of 14 matrices. Of all other numbers of 4 bytes only those of `o_proj`,
    16 x 16 on the right, sliced by columns: R has 16 rows, to which each rank adds, and of which each keeps 8. So r + 1
    up for each of 8 rows, and 2 (r + 1) down: N and R, and phi in float64. The rows of R of all that is sliced by rows
    and projected on the right, and the columns of `down_proj`, 16 x 20 on the left, stay where they are.
    A refresh, of both ranks: half of every gradient to its owner; 1 and half of the 16 rows of P back. Then P's rows to
    the rank that lacks them, of five matrices that are sliced by rows and of `down_proj`; R of `o_proj` once more.
    """
    runs = ranks.run(2, "train", MODULE, ds_config=tp_config(1, 2, update_proj_gap=4), model="llama")
    r, layers = 3, 2
    between = MATRICES * layers * 5 * 8 + 4 * layers * 8 * 3 * (r + 1)
    assert [run["sent"][1:4] + run["sent"][5:] for run in runs] == [[between] * 4] * 2
    gradients = 4 * 16 * 16 // 2 + 3 * 16 * 20 // 2
    refresh = gradients + MATRICES * (1 + 8 * r) + 2 * 6 * 8 * r + 2 * 8 * (r + 1)
    assert sum(run["sent"][4] for run in runs) == 2 * between + 4 * layers * refresh
    # The gathered way sends a slice of gradients and weights, and takes one of weights.
    gathered = ranks.run(2, "train", MODULE, ds_config=tp_config(1, 2, exact_cuts=True), model="llama")
    assert sum(run["sent"][1] for run in gathered) == 4 * layers * 3 * gradients


def test_states_are_kept_once(ranks: Pools) -> None:
    """Each of two ranks holds half of what one would, beside what is replicated: norms and the embedding."""
    runs = ranks.run(2, "train", MODULE, ds_config=tp_config(1, 2), model="llama")
    first, second = runs[0]["memory"]["optimizer_state_bytes"]
    replicated = 8 * sum(
        weight.numel() for name, weight in runs[0]["whole"].items() if runs[0]["after"][name].shape == weight.shape
    )
    counters = 14 * 2 * 8 + 14 * 4 + 4 * 8
    assert first == second
    assert abs(2 * (first - replicated) - (runs[0]["memory"]["paper_formula_bytes"] - replicated)) <= 2 * counters


@pytest.mark.parametrize("stage", full_if(lambda stage: stage == 0, [0, 1]))
def test_states_that_a_script_reads_and_sets(ranks: Pools, stage: int) -> None:
    """Low-rank states are those of the whole matrix on every rank, and the comparison of weights knows slices."""
    found = ranks.run(2, "states", MODULE, ds_config=tp_config(stage, 2), model="llama")
    runs = ranks.run(2, "train", MODULE, ds_config=tp_config(stage, 2), model="llama")
    shapes = {name: weight.shape for name, weight in runs[0]["whole"].items()}
    assert len(found[0]["states"]) == 2 * MATRICES
    for name, state in found[0]["states"].items():
        m, n = shapes[name]
        rows, columns = ((m, 3), (3, n)) if state["side"] == "left" else ((n, 3), (m, 3))
        assert state["shape"] == (m, n)
        assert (state["basis"].shape, state["moments"]["exp_avg"].shape) == (rows, columns)
        identity = state["basis"].T @ state["basis"]
        assert (identity - torch.eye(3)).abs().max() < 1e-5
        for other in found[1:]:
            assert torch.equal(state["basis"], other["states"][name]["basis"])
            assert torch.equal(state["moments"]["exp_avg"], other["states"][name]["moments"]["exp_avg"])
        assert torch.equal(found[0]["set"][name], 2 * state["residual_norm"])
    for name, moment in found[0]["moments"].items():
        if not name.startswith("set "):
            doubled: Tensor = found[0]["moments"][f"set {name}"]
            assert torch.equal(doubled, 2 * moment)
            assert moment.abs().max() > 0
    assert all("model.norm.weight" in each["message"] and "rank" in each["message"] for each in found)


def test_what_is_refused(ranks: Pools) -> None:
    """Before training, on every rank, with the setting and the remedy."""
    plain, grouped = config(1, "fp32", PARAMS), tp_config(3, 2)
    grouped["zero_optimization"]["sub_group_size"] = 300
    cases = [
        (grouped, "uneven", False),
        (plain, "llama", True),
        (tp_config(1, 2, record_scaling_factors=2), "llama", False),
        (tp_config(1, 2), "multi_query", False),
    ]
    wanted = (
        "zero_optimization.sub_group_size puts slices of the same matrix into other groups on each rank",
        "an mpu with tensor parallelism of size 2 is not supported, because its parameters do not say which slice",
        "record_scaling_factors is not supported with tensor_parallel.autotp_size = 2; set it to 0",
        "which has to be some of its rows or some of its columns; set it to a smaller size, or leave the layer whole",
    )
    for answers in ranks.run(2, "refusals", MODULE, cases=cases):
        for sentence, answer in zip(wanted, answers, strict=True):
            assert answer.startswith(("ValueError: FiraAdam: ", "DeviatingRank: FiraAdam: ")), answer
            assert sentence in answer, answer
