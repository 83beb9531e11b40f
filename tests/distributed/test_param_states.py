"""States, weights and gradients of single parameters: DeepSpeed's functions as with AdamW, and this package's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.state_jobs import PROJECTED, SHAPES

JOBS, LOW_RANK = "tests.distributed.state_jobs", "tests.distributed.low_rank_state_jobs"


@pytest.mark.parametrize(
    ("stage", "dtype", "extra"),
    [
        pytest.param(1, "fp32", {}, marks=pytest.mark.full),
        (1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}),
        pytest.param(2, "fp32", {}, marks=pytest.mark.full),
        (2, "bf16", {}),
        (2, "fp32", {"zero_offload_optimizer": {"device": "cpu"}}),
        pytest.param(3, "fp32", {}, marks=pytest.mark.full),
        (3, "bf16", {}),
        (2, "fp16", {"fp16": {"loss_scale_window": 100}}),  # with AdamW the step in which it grows is another one
        (3, "fp32", {"zero_offload_optimizer": {"device": "cpu"}}),
    ],
)
def test_deepspeeds_functions_answer_as_with_adamw(ranks, stage, dtype, extra):
    """Read, set, read again, and what the next step makes of it; moments of what is not projected."""
    for answers in ranks.run(2, "beside_adamw", JOBS, stage=stage, dtype=dtype, **extra):
        assert {"grad embedding.weight", "exp_avg lm_head.weight", f"next weight {PROJECTED[0]}"} <= answers.keys()
        for what, (ours, theirs) in answers.items():
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), what
            torch.testing.assert_close(
                ours, theirs, rtol=1e-5, atol=1e-7, msg=lambda text, what=what: f"{what}: {text}"
            )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_rank_says_what_there_is_not(ranks, stage):
    """The ranks go on together: none waits for one that has raised."""
    said = ranks.run(2, "refusals", JOBS, stage=stage)
    assert said[0] == said[1]
    for name, expected in {
        "norm": "norm.weight is not projected",
        "stranger": "a parameter of shape (3, 4) is not trained by this FiraAdam",
        "name": "'layers.9.weight' is not trained by this FiraAdam",
        "other shape": "has to be",
        "no moment": "the shape of exp_avg of the state for layers.0.weight is None",
        "get": "ds_fira.low_rank_state(engine, param)",
        "set": "ds_fira.set_low_rank_state",
        "key": "norm.weight has no state 'momentum'; ask for 'exp_avg' and 'exp_avg_sq'",
        "size": "48 values for norm.weight of shape (6,)",
        "get local": "ds_fira.low_rank_state(engine, param)",
        "set local": "ds_fira.set_low_rank_state",
        "size local": "48 values for norm.weight, of which this rank holds 3",
    }.items():
        assert expected in said[0].get(name, expected)
    assert len(said[0]) == {0: 5, 1: 9, 2: 9, 3: 12}[stage]


@pytest.mark.parametrize(("stage", "extra"), [(1, {"zero_round_robin_gradients": True}), (3, {})])
def test_where_parameters_lie_otherwise(ranks, stage, extra):
    """In another order, and with padding: 5 and 55 elements on two ranks."""
    assert ranks.run(2, "odd_places", JOBS, stage=stage, **extra) == [True, True]


def test_states_before_the_first_step(ranks):
    for stage in (0, 2, 3):
        assert ranks.run(2, "before_the_first_step", JOBS, stage=stage) == [True, True]


# By ranks: the stage, and whether a split matrix is gathered for its step; else its ranks exchange low-rank data.
GATHERED = {2: [(1, False), (2, True), (3, False)], 3: [(2, False), (3, True)]}


@pytest.mark.parametrize("experts", [False, True], ids=["matrices", "experts"])
@pytest.mark.parametrize("world", GATHERED)
def test_every_stage_and_exchange_gathers_the_same(ranks, world, experts):
    """The states of stage 0, which are read as they are kept; on every rank."""
    whole = ranks.run(world, "gathered", LOW_RANK, stage=0, experts=experts)[0]
    assert experts or [whole[name]["shape"] for name in PROJECTED] == SHAPES
    for stage, exact_cuts in GATHERED[world]:
        for found in ranks.run(world, "gathered", LOW_RANK, stage=stage, experts=experts, exact_cuts=exact_cuts):
            assert found.keys() == whole.keys()
            for name, state in found.items():
                exact = ("name", "shape", "side", "rank")
                assert [state[key] for key in exact] == [whole[name][key] for key in exact]
                assert all(torch.equal(state[key], whole[name][key]) for key in ("step", "refresh_step"))
                for ours, theirs in pairs_of(state, whole[name]):
                    assert ours.abs().sum() > 0
                    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def pairs_of(state: dict[str, Any], other: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Bases, moments and norms; a column of a basis may point the other way, and the first moment of its entry too."""
    signs = (state["basis"] * other["basis"]).sum(-2).sign()
    average = signs.unsqueeze(-1 if state["side"] == "left" else -2) * other["moments"]["exp_avg"]
    return [
        (state["basis"], other["basis"] * signs.unsqueeze(-2)),
        (state["residual_norm"], other["residual_norm"]),
        (state["moments"]["exp_avg"], average),
        (state["moments"]["exp_avg_sq"], other["moments"]["exp_avg_sq"]),
    ]


@pytest.mark.parametrize(
    ("stages", "params"),
    [
        ((2, 2), ({}, {"exact_cuts": True})),
        ((2, 3), ({"exact_cuts": True}, {})),
        ((3, 0), ({}, {})),
        ((0, 1), ({}, {})),
    ],
)
def test_a_state_carried_by_hand_steps_alike(ranks, stages, params):
    for pairs in ranks.run(2, "transplant", LOW_RANK, stages=stages, params=params):
        assert pairs.keys() >= set(PROJECTED)
        for what, (ours, theirs) in pairs.items():
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, what=what: f"{what}: {text}"
            )


def test_a_module_with_secondary_partitions_takes_the_weights_over(ranks):
    """Under ZeRO++'s `zero_hpz_partition_size` a forward pass read the weights from before, of a copy within a node."""
    hpz = {"zero_zero_hpz_partition_size": 2}
    for pairs in ranks.run(2, "transplant", LOW_RANK, stages=(2, 3), params=({}, {}), second_extra=hpz):
        for ours, theirs in pairs.values():
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "dtype", "experts", "extra"),
    [
        (0, "bf16", False, {}),
        (1, "bf16", False, {"data_types": {"grad_accum_dtype": "fp32"}}),
        (2, "fp32", True, {"zero_offload_optimizer": {"device": "cpu"}}),
        (3, "bf16", True, {"zero_offload_optimizer": {"device": "cpu"}}),
    ],
)
def test_what_is_set_is_read_again(ranks, stage, dtype, experts, extra):
    """In every wrapper of DeepSpeed's, and with the states on the CPU."""
    assert all(ranks.run(2, "round_trip", LOW_RANK, stage=stage, dtype=dtype, experts=experts, **extra))


def test_states_of_fewer_bits(ranks):
    for state_dtype, most in (("bfloat16", 2**-8), ("int8", 0.02)):
        for off in ranks.run(2, "rounded", LOW_RANK, state_dtype=state_dtype):
            assert off["exp_avg"] <= most
            assert off["exp_avg_sq"] <= most
            assert off["head"] <= most
