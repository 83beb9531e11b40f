"""Schedulers of two param groups inside DeepSpeed engines: by the groups that the user gave, as with torch's AdamW."""

from __future__ import annotations

import pytest

from tests.distributed.group_jobs import JSON, STEPS, TORCH
from tests.grids import half

JOBS = "tests.distributed.group_jobs"


ALL, SOME = [*JSON, *TORCH], ["WarmupLR", "OneCycle", "SequentialLR"]


@pytest.mark.parametrize(
    ("stage", "dtype", "schedulers"),
    [
        *((0, "fp32", SOME), (2, "bf16", SOME), pytest.param(2, "bf16", ALL, marks=pytest.mark.full)),
        *(pytest.param(*case, SOME, marks=pytest.mark.full) for case in ((0, "bf16"), (1, "fp32"))),
        (3, "fp32", SOME[:1]),
    ],
)
def test_every_parameter_has_the_rates_that_it_has_with_adamw(ranks, stage, dtype, schedulers):
    """Of each kind of scheduler, at every step: what steps it, and what the user is told."""
    for result in ranks.run(2, "compare_with_adamw", JOBS, stage=stage, dtype=dtype, schedulers=schedulers):
        for scheduler, both in result.items():
            assert len(both["FiraAdam"]) == STEPS + 1
            assert both["FiraAdam"] == both["AdamW"], scheduler
            assert both["parts"] > 2
            rates = {rates for used, _ in both["FiraAdam"] for rates in used.values()}
            assert len(rates) > 2


@pytest.mark.parametrize(
    ("scheduler", "saved", "resumed", "old"),
    [
        *(("LambdaLR", 2, 2, True), ("LambdaLR", 3, 1, True)),
        *(("SequentialLR", 2, 0, True), ("SequentialLR", 1, 1, False)),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (("LambdaLR", 0, 0, True), ("LambdaLR", 3, 3, False), ("OneCycleLR", 2, 3, False))
        ),
    ],
)
def test_a_schedule_goes_on(ranks, tmp_path, saved, resumed, scheduler, old):
    """Loaded at the same stage or another, also a state that has a value for every part of a group."""
    arguments = {"saved": saved, "resumed": resumed, "scheduler": scheduler, "old": old, "folder": str(tmp_path)}
    for result in ranks.run(2, "resume", JOBS, **arguments):
        for found, expected in zip(result["found"], result["expected"], strict=True):
            # How many elements a rank steps is the stage's.
            assert [found[0], {**found[1], "elements": 0}] == [expected[0], {**expected[1], "elements": 0}]
        assert result["parts"] > 2
        assert result["base_lrs"] is None or len(result["base_lrs"]) == 2


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        *((0, "fp32"), (2, "fp32"), (3, "bf16")),
        *(pytest.param(*case, marks=pytest.mark.full) for case in ((0, "bf16"), (1, "fp32"))),
    ],
)
def test_rates_set_by_hand(ranks, stage, dtype):
    """A group of `engine.optimizer.param_groups` is the user's: all of it stops, and nothing else."""
    for result in ranks.run(2, "by_hand", JOBS, stage=stage, dtype=dtype):
        assert result["frozen"]
        assert not set(result["moved"]) & set(result["frozen"])
        assert {"layers.0.weight", "layers.1.weight"} <= set(result["moved"])
        assert result["later"] == ([0.1, 0.2], [0.1, 0.2])
        assert ["cannot be set" in error for error in result["errors"]] == [True]


@pytest.mark.parametrize(("stage", "given"), half([0, 2, 3], ["object", "function"]))
def test_an_optimizer_object(ranks, stage, given):
    """A scheduler of its `user_groups`, or a function that makes one, has the groups that the user gave."""
    for result in ranks.run(2, "an_object", JOBS, stage=stage, given=given):
        assert [used for used, _ in result["found"]] == [used for used, _ in result["expected"]]
        assert result["parts"] > 2


@pytest.mark.parametrize("stage", [0, 3])
def test_a_group_of_which_nothing_is_trained(ranks, stage):
    for rates in ranks.run(2, "idle_group", JOBS, stage=stage):
        assert rates["FiraAdam"] == rates["AdamW"]
        assert [len(step) for step in rates["FiraAdam"]] == [2, 2]
