"""Checkpoints of what AutoTP slices: the same run goes on with as many slices, other ones or none, universal or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.tensor_parallel_jobs import STEPS
from tests.distributed.test_tensor_parallel import MODULE, left_whole, tp_config
from tests.distributed.universal_jobs import UNIVERSAL, convert, damaged
from tests.grids import full_if
from tests.ranks import Pools

SAVED = 4
TAG = f"global_step{SAVED}"


def equal(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether every rank has the same weights to the bit."""
    return all(
        run["weights"].keys() == other["weights"].keys()
        and all(torch.equal(run["weights"][name], other["weights"][name]) for name in run["weights"])
        for run, other in zip(runs, others, strict=True)
    )


def fused(ds_config: dict[str, Any], model: str) -> dict[str, Any]:
    """A config in which two slices have other rows of some matrices than one half: of either half a half."""
    if model != "fused" or ds_config["tensor_parallel"]["autotp_size"] == 1:
        return ds_config
    halves = {"partition_type": "column", "shape": [2, -1], "partition_dim": 0}
    specs = [
        {"patterns": [".*q_proj.weight$"], **halves},
        {"patterns": [".*o_proj.weight$", ".*down_proj.weight$"], "partition_type": "row"},
        {"patterns": [".*[kv]_proj.weight$", ".*(up|gate)_proj.weight$"], "partition_type": "column"},
    ]
    parallel = {**ds_config["tensor_parallel"], "partition_config": {"use_default_specs": False, "layer_specs": specs}}
    return {**ds_config, "tensor_parallel": parallel}


# Ranks, slices, stage, dtype, model; the ranks, slices and stage by way of which it goes once more, None for none.
RESUMES = {
    "stage 1, by way of no slices": (2, 2, 1, "fp32", "uneven", (2, 1, 2)),
    "stage 0 in bf16": (2, 2, 0, "bf16", "llama", None),
    "stage 1, by way of stage 2": (2, 2, 1, "fp32", "uneven", (2, 2, 2)),
    "stage 0, by way of stage 2": (2, 2, 0, "fp32", "llama", (2, 2, 2)),
    "stage 2 in bf16": (2, 2, 2, "bf16", "biases", (1, 1, 2)),
    "stage 3": (2, 2, 3, "fp32", "uneven", (2, 2, 1)),
    "stage 3 in bf16": (2, 2, 3, "bf16", "llama", (2, 2, 2)),
    "two copies at stage 3, by way of one": (4, 2, 3, "fp32", "uneven", (2, 2, 3)),
    "stage 1, by way of two copies at stage 3": (2, 2, 1, "fp32", "uneven", (4, 2, 3)),
    "two copies, by way of one": (4, 2, 1, "fp32", "uneven", (2, 2, 1)),
    "two copies, by way of stage 0": (4, 2, 2, "fp32", "uneven", (4, 2, 0)),
    "no slices, by way of two": (2, 1, 1, "fp32", "gpt_neox", (2, 2, 3)),
    "two slices at stage 3, by way of four": (2, 2, 3, "fp32", "llama", (4, 4, 1)),
    "four slices, by way of stage 0 without": (4, 4, 2, "fp32", "biases", (2, 1, 0)),
    "rows in another order, by way of no slices": (2, 2, 1, "fp32", "fused", (1, 1, 3)),
    "frozen slices, by way of no slices": (2, 2, 2, "fp32", "frozen", (2, 1, 3)),
    "frozen slices at stage 3, by way of none": (2, 2, 3, "bf16", "frozen", (1, 1, 0)),
}


@pytest.mark.parametrize("name", full_if(lambda name: name not in [*RESUMES][:2], RESUMES))
def test_a_resumed_run_is_the_same_to_the_bit(ranks: Pools, name: str, tmp_path: Path) -> None:
    """On the same grid, and by way of another number of copies, of slices, or another stage."""
    size, slices, stage, dtype, model, by_way_of = RESUMES[name]
    saved, moved = str(tmp_path / "saved"), str(tmp_path / "moved")

    def run(ranks_now: int, slices_now: int, stage_now: int, **kwargs: Any) -> list[dict[str, Any]]:
        ds_config = fused(tp_config(stage_now, slices_now, dtype), model)
        found = ranks.run(ranks_now, "run", MODULE, ds_config=ds_config, model=model, **kwargs)
        assert all("message" not in each for each in found), found[0].get("message")
        return found

    straight = run(size, slices, stage, steps=(0, 4), save=saved)
    resumed = run(size, slices, stage, steps=(4, STEPS), load=saved)
    assert equal(straight, resumed)
    assert straight[0]["metrics"]["refreshes"] == resumed[0]["metrics"]["refreshes"]
    if by_way_of is not None:
        run(*by_way_of, steps=(4, 4), load=saved, save=moved)
        assert equal(straight, run(size, slices, stage, steps=(4, STEPS), load=moved))


# Ranks, slices, stage, dtype, model, params; the ranks, slices and stage by way of which the universal one goes.
WAYS = {
    "no slices": (2, 2, 1, "fp32", "llama", {}, (2, 1, 2)),
    "other ranks": (2, 2, 2, "bf16", "uneven", {}, (4, 2, 1)),
    "slices that were not": (2, 1, 2, "fp32", "uneven", {}, (2, 2, 3)),
    "from stage 3": (2, 2, 3, "fp32", "uneven", {}, (2, 2, 0)),
    "to four slices": (2, 2, 2, "fp32", "llama", {}, (4, 4, 1)),
    "two copies in bf16": (4, 2, 1, "bf16", "uneven", {}, (2, 2, 2)),
    "two copies at stage 3": (4, 2, 3, "bf16", "uneven", {}, (2, 1, 1)),
    "two copies to one process": (4, 2, 2, "fp32", "gpt_neox", {}, (1, 1, 0)),
    "biases": (2, 2, 1, "fp32", "biases", {}, (2, 1, 1)),
    "layers that are left whole": (2, 2, 1, "fp32", "llama", {"whole": "mlp"}, (2, 1, 2)),
    "layers that are left whole, stage 3": (2, 2, 3, "fp32", "llama", {"whole": "mlp"}, (2, 2, 1)),
    "rows in another order": (2, 2, 1, "fp32", "fused", {}, (1, 1, 3)),
    "frozen slices": (2, 2, 2, "fp32", "frozen", {}, (2, 1, 3)),
    "int8 states": (2, 2, 2, "fp32", "biases", {"state_dtype": "int8"}, (4, 2, 2)),
    "the other side": (2, 2, 2, "fp32", "uneven", {"proj_type": "reverse_std"}, (2, 1, 2)),
    "ApolloAdam": (2, 2, 1, "fp32", "llama", {"type": "ApolloAdam"}, (2, 1, 3)),
}


@pytest.mark.parametrize("name", full_if(lambda name: name != "no slices", WAYS))
def test_a_universal_one_goes_on_to_the_bit(ranks: Pools, name: str, tmp_path: Path) -> None:
    """DeepSpeed's converter reads it unedited; there and back again, the run is the one that was not interrupted."""
    size, slices, stage, dtype, model, extra, by_way_of = WAYS[name]
    params = {key: value for key, value in extra.items() if key not in ("whole", "type")}
    folders = [str(tmp_path / name) for name in ("saved", "moved")]

    def run(ranks_now: int, slices_now: int, stage_now: int, universal: bool = False, **kwargs: Any) -> list[Any]:
        ds_config = fused(tp_config(stage_now, slices_now, dtype, **params), model)
        if "whole" in extra and slices_now > 1:
            ds_config = left_whole(ds_config, extra["whole"])
        ds_config["optimizer"]["type"] = extra.get("type", "FiraAdam")
        ds_config |= UNIVERSAL if universal else {}
        found = ranks.run(ranks_now, "run", MODULE, ds_config=ds_config, model=model, **kwargs)
        assert all("message" not in each for each in found), found[0].get("message")
        return found

    straight = run(size, slices, stage, steps=(0, SAVED), save=folders[0])
    universal, done = convert(Path(folders[0]), TAG, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    there = run(*by_way_of, universal=True, steps=(SAVED, SAVED), load=str(universal), save=folders[1])
    back = run(size, slices, stage, steps=(SAVED, STEPS), load=folders[1])
    assert equal(straight, back)
    if dtype == "fp32" and by_way_of[1] == 1:
        # What the converter has put together is what there is without slices.
        for each, weight in there[0]["loaded"].items():
            found = torch.load(universal / TAG / "zero" / each / "fp32.pt", weights_only=True)
            assert torch.equal(found["param"], weight) or model == "frozen", each


# What is harmed, how, at which stage it was saved; what the sentence says.
DAMAGE = {
    "a slice's states": ("ds_fira_states/1/exp_avg.00", "gone", 1, "of the 1 that saved it, which had slice 1"),
    "a slice of the model": ("mp_rank_01_model_states.pt", "gone", 1, "lacks mp_rank_01_model_states.pt, the model's"),
    "a whole weight": ("zero/lm_head.weight/fp32.pt", "flipped", 1, "lm_head.weight/fp32.pt: its content has changed"),
    "a whole moment": ("zero/lm_head.weight/exp_avg.pt", "gone", 1, "lacks zero/lm_head.weight/exp_avg.pt"),
    "a slice of stage 3": ("zero_pp_rank_0_mp_rank_01_model_states.pt", "gone", 3, "lacks mp_rank_01_model_states.pt"),
}


@pytest.mark.parametrize("stage", full_if(lambda stage: stage == 3, (1, 3)))
def test_damage_is_refused_by_name_on_every_rank(ranks: Pools, stage: int, tmp_path: Path) -> None:
    ds_config = tp_config(stage, 2)
    ranks.run(2, "run", MODULE, ds_config=ds_config, model="llama", steps=(0, 1), save=str(tmp_path / "saved"))
    universal, done = convert(tmp_path / "saved", "global_step1", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [case for case in DAMAGE.values() if case[2] == stage]
    loads = [str(damaged(universal, tmp_path / str(number), *case[:2])) for number, case in enumerate(cases)]
    for answers in ranks.run(2, "told", MODULE, ds_config=ds_config | UNIVERSAL, model="llama", loads=loads):
        for (*_, message), answer in zip(cases, answers, strict=True):
            assert answer.startswith("FiraAdam: ")
            assert message in answer


def test_from_and_to_adamw(ranks: Pools, tmp_path: Path) -> None:
    """AdamW takes the weights of a FiraAdam; of its own states under AutoTP no basis can be made."""
    ours, there, back = tp_config(1, 2), str(tmp_path / "there"), str(tmp_path / "back")
    plain = {**ours, "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}
    trained = ranks.run(2, "run", MODULE, ds_config=ours, model="llama", steps=(0, STEPS), save=there)
    given = ranks.run(2, "run", MODULE, ds_config=plain, model="llama", steps=(STEPS, STEPS), load=there, save=back)
    for ours_now, theirs in zip(trained, given, strict=True):
        assert all(torch.equal(weight, theirs["loaded"][name]) for name, weight in ours_now["weights"].items())
    answers = ranks.run(2, "run", MODULE, ds_config=ours, model="llama", steps=(STEPS, STEPS), load=back)
    assert {"made by AdamW with tensor parallelism" in each["message"] for each in answers} == {True}
