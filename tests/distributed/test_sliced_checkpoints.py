"""Checkpoints of what AutoTP slices: the same run goes on with as many slices, other ones or none, universal or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fira.checkpoint.atomic_save import reseal
from tests.distributed.tensor_parallel_jobs import STEPS
from tests.distributed.tensor_parallel_reference import together
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


_made: dict[str, tuple[list[Any], Path]] = {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def run_on(ranks: Pools, name: str, place: tuple[int, int, int], universal: bool = False, **kwargs: Any) -> list[Any]:
    """Run a case of `WAYS` on ranks with so many slices at a stage."""
    (*_, dtype, model, extra, _), (size, slices, stage) = WAYS[name], place
    params = {key: value for key, value in extra.items() if key not in ("whole", "type")}
    ds_config = fused(tp_config(stage, slices, dtype, **params), model)
    if "whole" in extra and slices > 1:
        ds_config = left_whole(ds_config, extra["whole"])
    ds_config["optimizer"]["type"] = extra.get("type", "FiraAdam")
    ds_config |= UNIVERSAL if universal else {}
    found = ranks.run(size, "run", MODULE, ds_config=ds_config, model=model, **kwargs)
    assert all("message" not in each for each in found), found[0].get("message")
    return found


def made(ranks: Pools, folders: Path, name: str) -> tuple[list[Any], Path]:
    """The uninterrupted run, and the folder of what the converter has made of its checkpoint; made once."""
    if name not in _made:
        straight = run_on(ranks, name, WAYS[name][:3], steps=(0, SAVED), save=str(folders / name))
        universal, done = convert(folders / name, TAG, folders / f"of {name}")
        assert done.returncode == 0, done.stderr[-2000:]
        _made[name] = straight, universal
    return _made[name]


@pytest.mark.parametrize("name", full_if(lambda name: name != "no slices", WAYS))
def test_a_universal_one_goes_on_to_the_bit(ranks: Pools, folders: Path, name: str, tmp_path: Path) -> None:
    """DeepSpeed's converter reads it unedited; there and back again, the run is the one that was not interrupted."""
    (*place, dtype, model, _, by_way_of), moved = WAYS[name], str(tmp_path)
    straight, universal = made(ranks, folders, name)
    there = run_on(ranks, name, by_way_of, True, steps=(SAVED, SAVED), load=str(universal), save=moved)
    assert equal(straight, run_on(ranks, name, tuple(place), steps=(SAVED, STEPS), load=moved))
    if dtype == "fp32" and by_way_of[1] == 1 and model != "frozen":
        # What the converter has put together is what there is without slices.
        for each, weight in there[0]["loaded"].items():
            found = torch.load(universal / TAG / "zero" / each / "fp32.pt", weights_only=True)
            assert torch.equal(found["param"], weight), each


# Of which case of `WAYS`, what is harmed, how; what the sentence says.
DAMAGE = [
    ("no slices", "ds_fira_states/1/exp_avg.00", "gone", "of ranks [0] of the 1 that saved it, which had slice 1"),
    ("no slices", "mp_rank_01_model_states.pt", "gone", "lacks mp_rank_01_model_states.pt, the model's states"),
    ("no slices", "zero/lm_head.weight/fp32.pt", "flipped", "zero/lm_head.weight/fp32.pt: its content has changed"),
    ("no slices", "zero/lm_head.weight/exp_avg.pt", "gone", "lacks zero/lm_head.weight/exp_avg.pt"),
    ("two copies at stage 3", "zero_pp_rank_1_mp_rank_01_model_states.pt", "gone", "[1] of the 2 that saved it, which"),
    ("two copies at stage 3", "zero/lm_head.weight/fp32.pt", "truncated", "lm_head.weight/fp32.pt: it cannot be read"),
]


@pytest.mark.parametrize("name", full_if(lambda name: name != "no slices", dict.fromkeys(case[0] for case in DAMAGE)))
def test_damage_is_refused_by_name_on_every_rank(ranks: Pools, folders: Path, name: str, tmp_path: Path) -> None:
    cases, universal = [case[1:] for case in DAMAGE if case[0] == name], made(ranks, folders, name)[1]
    loads = [str(damaged(universal, tmp_path / str(number), *case[:2])) for number, case in enumerate(cases)]
    ds_config = tp_config(1, 2, WAYS[name][3]) | UNIVERSAL
    for answers in ranks.run(2, "told", MODULE, ds_config=ds_config, model=WAYS[name][4], loads=loads):
        for (*_, message), answer in zip(cases, answers, strict=True):
            assert answer.startswith("FiraAdam: ")
            assert message in answer


@pytest.mark.parametrize("stage", full_if(lambda stage: stage == 3, (1, 3)))
def test_weights_alone_are_taken_of_a_universal_one(ranks: Pools, folders: Path, stage: int) -> None:
    """Without slices, and with another rank of the subspace; of the checkpoint itself DeepSpeed would merge them."""
    universal = made(ranks, folders, "no slices")[1]
    given = {"ds_config": tp_config(stage, 1, rank=4), "model": "llama"}
    (refused,) = ranks.run(1, "weights_alone", MODULE, **given, load=str(folders / "no slices"))
    assert "autotp_size = 1 cannot load what was saved with 2, since ranks had other slices" in refused["message"]
    given["ds_config"] |= UNIVERSAL
    (found,) = ranks.run(1, "weights_alone", MODULE, **given, load=str(universal))
    (expected,) = run_on(ranks, "no slices", (1, 1, 1), True, steps=(SAVED, SAVED), load=str(universal))
    assert all(torch.equal(weight, found["loaded"][name]) for name, weight in expected["loaded"].items())


@pytest.mark.full
def test_slices_that_deepspeed_does_not_describe_go_on_as_they_are(ranks: Pools, folders: Path, tmp_path: Path) -> None:
    """A checkpoint of an older DeepSpeed loads with as many slices, and not with others."""
    straight = made(ranks, folders, "no slices")[0]
    shutil.copytree(folders / "no slices", tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / TAG).glob("mp_rank_*_model_states.pt"):
        content = torch.load(path, weights_only=False)
        del content["universal_checkpoint_info"]["affine_map"]
        torch.save(content, path)
    reseal(tmp_path, TAG)
    for size in (1, 2):
        ds_config, load = tp_config(2, size), str(tmp_path)
        found = ranks.run(size, "run", MODULE, ds_config=ds_config, model="llama", steps=(SAVED, SAVED), load=load)
        if size == 1:
            message = (
                "tensor_parallel.autotp_size = 1 cannot load lm_head.weight of what was saved with 2, since DeepSpeed"
            )
            assert found[0]["message"].startswith(f"FiraAdam: {message} does not say which of its rows or columns")
        else:
            assert equal(straight, found)


def adamw(ds_config: dict[str, Any]) -> dict[str, Any]:
    """A config with torch's AdamW."""
    return {**ds_config, "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}


def in_one(runs: list[dict[str, Any]], key: str, alone: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole weights of two ranks that have the slices of one copy."""
    return {name: together([run[key][name] for run in runs], weight.shape) for name, weight in alone.items()}


# Whether by a universal checkpoint; the stages before and after, and the slices after.
TAKEOVERS = [(True, 1, 2, 2), (True, 3, 2, 2), (True, 1, 2, 1), (False, 0, 2, 2), (False, 3, 0, 2), (False, 2, 3, 1)]


@pytest.mark.parametrize(
    ("universal", "stage", "next_stage", "slices"),
    [(False, 1, 1, 2), *(pytest.param(*way, marks=pytest.mark.full) for way in TAKEOVERS)],
)
def test_adamw_goes_on_in_ours(
    ranks: Pools, universal: bool, stage: int, next_stage: int, slices: int, tmp_path: Path
) -> None:
    """Its moments are of slices, and are projected on the basis of the whole matrix: as on one process."""
    folders = {size: tmp_path / f"adam {size}" for size in (1, 2)}
    for size, folder in folders.items():
        before = adamw(tp_config(stage, size))
        ranks.run(size, "run", MODULE, ds_config=before, model="llama", steps=(0, SAVED), save=str(folder))
    after = {"model": "llama", "steps": (SAVED, STEPS)}
    alone = ranks.run(1, "run", MODULE, ds_config=tp_config(next_stage, 1), load=str(folders[1]), **after)[0]
    load, ds_config = folders[2], tp_config(next_stage, slices)
    if universal:
        (load, done), ds_config = convert(load, TAG, tmp_path), ds_config | UNIVERSAL
        assert done.returncode == 0, done.stderr[-2000:]
    found = ranks.run(slices, "run", MODULE, ds_config=ds_config, load=str(load), **after)
    assert "message" not in found[0], found[0]["message"]
    for name, weight in in_one(found, "weights", alone["weights"]).items():
        assert (weight - alone["weights"][name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("universal", full_if(bool, (False, True)))
def test_ours_goes_on_in_adamw(ranks: Pools, universal: bool, tmp_path: Path) -> None:
    """The weights, with as many slices or none."""
    load, extra = tmp_path / "ours", UNIVERSAL if universal else {}
    trained = ranks.run(2, "run", MODULE, ds_config=tp_config(1, 2), model="llama", steps=(0, STEPS), save=str(load))
    if universal:
        load, done = convert(load, f"global_step{STEPS}", tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    sliced, alone = (
        ranks.run(
            size,
            "run",
            MODULE,
            ds_config=adamw(tp_config(2, size)) | extra,
            model="llama",
            load=str(load),
            steps=(STEPS, STEPS),
        )
        for size in (2, 1)
    )
    whole = alone[0]["loaded"]
    for runs, key in ((trained, "weights"), (sliced, "loaded")):
        assert all(torch.equal(weight, whole[name]) for name, weight in in_one(runs, key, whole).items())
