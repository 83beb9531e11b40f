"""One rank that is given something else than the others is named on every rank, before anything is communicated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_fira.engine.deepspeed.description import describe_difference, plain
from tests.distributed.crash_jobs import Run
from tests.grids import once
from tests.ranks import Pools

LIMIT = 10.0  # seconds for every rank to answer
# What the odd rank has otherwise, and what the sentence says of it.
SETTINGS: dict[str, Any] = {
    "lr": 0.02,
    "betas": [0.8, 0.99],
    "eps": 1e-5,
    "weight_decay": 0.1,
    "rank": 2,
    "update_proj_gap": 4,
    "alpha": 0.7,
    "proj_type": "left",
    "gamma": 1.1,
    "residual": "normalized",
    "residual_beta": 0.5,
    "residual_scale": 0.5,
    "scaling": "matrix",
    "limiter": "none",
    "formulation": "paper",
    "subspace": "gram",
    "refresh_moments": "rotate",
    "refresh_limiter": "reset",
    "stagger": True,
    "state_dtype": "bfloat16",
    "matmul_precision": "float32",
    "exact_cuts": True,
    "max_group_bytes": 4096,
    "record_scaling_factors": 5,
    "kernels": "off",
    "target_modules": ["layers"],
    "preset": "recommended",
}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    name: ({"params": {name: value}}, f"optimizer.params.{name} is {plain(value)!r} on rank")
    for name, value in SETTINGS.items()
}
CASES |= {
    "type": ({"optimizer": {"type": "GaLoreAdam", "params": {"rank": 3}}}, "optimizer.type is 'GaLoreAdam' on rank"),
    "clipping": ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0 on rank"),
    "micro batch": ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4 on rank"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2 on rank"),
    "dtype": ({"bf16": {"enabled": True}}, "bf16.enabled is True on rank"),
    "schedule": ({"scheduler": {"type": "WarmupLR", "params": {}}}, "scheduler.type is 'WarmupLR' on rank"),
    "bucket": ({"zero_optimization": {"reduce_bucket_size": 1000}}, "zero_optimization.reduce_bucket_size is 1000 on"),
    "order": ({"model": "order"}, "the given parameter 0 is lm_head.weight on rank"),
    "missing": ({"model": "missing"}, "of the given parameters rank {odd} lacks layers.1.weight, which rank 0 has"),
    "shape": ({"model": "shape"}, "the model's parameter 5 is layers.2.weight (7, 5) float32 on rank"),
    "more": ({"model": "more"}, "of the model's parameters rank {odd} has layers.3.weight, which rank 0 lacks"),
    "module order": ({"model": "module order"}, "the model's parameter 3 is layers.0.weight (6, 9) float32 on rank"),
    "frozen": ({"model": "frozen"}, "embedding.weight (11, 6) float32, frozen on rank"),
    "parameter dtype": ({"model": "dtype"}, "the model's parameter 0 is embedding.weight (11, 6) float64 on rank"),
    "group": ({"model": "group"}, "param group 0: lr is 0.5 on rank"),
    "wrong value": (
        {"params": {"rank": 0}},
        "rank {odd} refused what it was given {others}: FiraAdam in the DeepSpeed",
    ),
    "unknown": ({"params": {"alfa": 1}}, "rank {odd} refused what it was given {others}: FiraAdam in the DeepSpeed"),
    "option": (
        {"zero_optimization": {"zenflow": {}}},
        "rank {odd} refused what it was given {others}: FiraAdam: zero_optimization.zenflow is not supported",
    ),
    "config": ({"zero_optimization": {"stage": 5}}, "rank {odd} refused what it was given {others}: 1 validation"),
    "batch": ({"train_batch_size": 7}, "rank {odd} refused what it was given {others}: Check batch related"),
    "same": ({}, ""),
}
OTHERS = "and the others cannot go on without it"


FAST = [(0, 3, 0), (1, 2, 1), (2, 3, 2), (3, 3, 0)]


@pytest.mark.parametrize(
    ("stage", "world_size", "odd"),
    [
        pytest.param(stage, *ranks, marks=() if (stage, *ranks) in FAST else pytest.mark.full)
        for stage in (0, 1, 2, 3)
        for ranks in ((2, 1), (3, 0), (3, 2))
    ],
)
def test_every_rank_names_the_one_that_differs(ranks: Pools, stage: int, world_size: int, odd: int) -> None:
    """In any setting, option, parameter or order; the same processes train well afterwards."""
    changes = {name: change for name, (change, _) in CASES.items()}
    changes["another stage"] = {"zero_optimization": {"stage": (stage + 1) % 4}}
    if stage < 3:
        changes["check_sync_every"] = {"params": {"check_sync_every": 7}}
    results = ranks.run(
        world_size, "deviate", "tests.distributed.agreement_jobs", stages=[stage], odd=odd, cases=changes
    )
    for name in changes:
        answers = [result[f"{stage}: {name}"] for result in results]
        assert max(seconds for *_, seconds in answers) < LIMIT, name
        ((kind, text),) = {answer[:2] for answer in answers}
        if name == "same":
            assert text == ""
            continue
        expected = CASES[name][1] if name in CASES else {"another stage": "zero_optimization.stage is"}.get(name, name)
        if odd == 0:
            expected = expected.replace("which rank 0", "which rank 1")
        assert expected.format(odd=odd, others=OTHERS) in text, text
        assert kind == "DeviatingRank"
        assert f"rank {odd}" in text or f"ranks {odd}" in text, text
        assert "\n" not in text
        refused = "refused" in text
        assert refused or text.endswith("; give every rank the same DeepSpeed config, model and parameters."), text


@pytest.mark.parametrize(("stage", "how"), once([0, 2, 3], ["object", "function", "hidden"]))
def test_optimizers_that_the_user_makes(ranks: Pools, stage: int, how: str) -> None:
    """Settings and parameters of an object, and of what a function returns, whether or not its code names FiraAdam."""
    changes = [{"alpha": 0.7}, {"lr": 0.3}, {"drop": True}, {"state_dtype": "int8"}, {"DS_FIRA_KERNELS": "0"}, {}]
    results = ranks.run(
        2, "objects", "tests.distributed.agreement_jobs", stages=[stage], odd=1, how=how, changes=changes
    )
    for change in changes:
        answers = [result[f"{stage}: {change}"] for result in results]
        ((_, text),) = {answer[:2] for answer in answers}
        if not change:
            assert text == ""
        elif "drop" in change:
            assert "rank 1 lacks norm.weight, which rank 0 has" in text, text
        elif "DS_FIRA_KERNELS" in change:
            assert "kernels (DS_FIRA_KERNELS) is 'off' on rank 1 and 'auto' on rank 0; give" in text, text
        else:
            ((key, value),) = change.items()
            assert f"{key} is {value!r} on rank 1 and " in text, text


def test_no_rank_uses_the_kernels_where_one_cannot(ranks: Pools) -> None:
    """Replicas would drift apart by their rounding; the first rank says so, and which rank it is about."""
    pytest.importorskip("triton")
    found = ranks.run(3, "kernels_on_some", "tests.distributed.agreement_jobs", stages=[0, 2], odd=2)
    for rank, result in enumerate(found):
        for could, uses, said in result.values():
            assert (could, uses) == (rank != 2, False)
            assert len(said) == (rank == 0)
            assert all("FiraAdam: on rank 2 the kernels are not for cpu. Torch functions compute" in x for x in said)


def test_a_rank_with_a_foreign_optimizer_is_named(tmp_path: Path) -> None:
    """AdamW on rank 2 of 3, which joins no agreement of ours; processes of their own, since that rank then waits."""
    run = Run(
        tmp_path,
        world_size=3,
        function="tests.distributed.agreement_jobs.build_with",
        kinds=["FiraAdam", "FiraAdam", "AdamW"],
    )
    statuses, _ = run.wait(60)
    assert statuses[:2] == [1, 1]
    assert statuses[2] != 0
    for rank in range(2):
        assert (
            "DeviatingRank: FiraAdam: the ranks would not train the same: rank 2 builds an engine with adamw, and "
            "ranks [0, 1] build one with FiraAdam; give every rank the same DeepSpeed config, model and parameters."
        ) in run.log(rank)
        assert float(run.log(rank).partition("seconds: ")[2].split()[0]) < LIMIT


def test_engines_of_other_optimizers_are_left_alone(ranks: Pools) -> None:
    """Their ranks may differ as they please, agree on nothing, and engines of ours come before and after."""
    results = ranks.run(2, "foreign_in_between", "tests.distributed.agreement_jobs")
    assert [result["errors"] for result in results] == [["", "", ""]] * 2
    assert [result["agreements"] for result in results] == [[2, 2, 4]] * 2


def test_values_that_two_processes_print_differently_are_the_same() -> None:
    """An object's address, the order of a set, a tensor's device are no differences."""
    assert plain(object()) == plain(object()) == "object"
    assert plain({"b", "a"}) == ["a", "b"]
    assert plain((1, (2.5, None))) == [1, [2.5, None]]
    empty = {"settings": {}, "stage": 0, "group_settings": {}, "parameters": [], "groups": []}
    assert describe_difference({0: empty, 1: empty}) is None
    long = {**empty, "settings": {"x": "a" * 200}}
    other = {**empty, "settings": {"x": "a" * 199 + "b"}}
    assert "x is " in describe_difference({0: long, 1: other, 2: long})


@pytest.mark.parametrize(
    ("odd", "params", "sentence"),
    [
        (1, {"alpha": 0.7}, "DeviatingRank: FiraAdam: the ranks would not train the same: optimizer.params.alpha is"),
        (-1, {"rank": 0}, "ValueError: FiraAdam in the DeepSpeed config: rank = 0 is not legal"),
    ],
    ids=["one", "all"],
)
def test_processes_that_the_sentence_ends(odd: int, params: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """Rank 0 holds the store that the others read: each has its sentence, and nobody lost contact."""
    run = Run(
        tmp_path, world_size=3, function="tests.distributed.agreement_jobs.build_uncaught", odd=odd, params=params
    )
    statuses, waited = run.wait(60)
    assert statuses == [1, 1, 1]
    assert waited < LIMIT
    for rank in range(3):
        assert sentence in run.log(rank)
        assert "ended or did not answer" not in run.log(rank)
