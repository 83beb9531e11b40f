"""DeepSpeed's pipelines: each stage's matrices are stepped by the ranks of the stage, as one process steps them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.adam_jobs import adam_config
from tests.distributed.pipe_jobs import STEPS
from tests.distributed.pipe_reference import reference
from tests.distributed.universal_jobs import UNIVERSAL, convert, damaged, inject
from tests.distributed.zero_jobs import config
from tests.grids import full_if
from tests.ranks import Pools

MODULE = "tests.distributed.pipe_jobs"
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3, "alpha": 0.5, "weight_decay": 0.1}
# Ranks, stages of the pipeline, of ZeRO, whether the head is the embedding, further settings, clipping, the ways in
# which matrices are cut.
CASES = {
    "two stages, tied": (2, 2, 1, True, {}, 0.3, []),
    "two stages at ZeRO stage 0": (2, 2, 0, True, {}, 0.3, []),
    "a head of its own, an object, staggered": (2, 2, 1, False, {"way": "object", "stagger": True}, 0.3, []),
    "one stage": (2, 1, 1, True, {}, 0.3, []),
    "two stages of two ranks": (4, 2, 1, True, {}, 0.3, ["low_rank"]),
    "two stages of two ranks, gathered": (4, 2, 1, False, {"exact_cuts": True}, 0.3, ["gathered"]),
    "two stages of two ranks at ZeRO stage 0": (4, 2, 0, True, {}, 0.3, []),
}
IN_EVERY_RUN = ("two stages, tied", "two stages at ZeRO stage 0")


@pytest.mark.parametrize("name", full_if(lambda name: name not in IN_EVERY_RUN, CASES))
def test_a_pipeline_trains_as_one_process(ranks: Pools, name: str) -> None:
    """The gradients, the losses and the weights of a process that has all layers and no DeepSpeed."""
    size, stages, zero, tied, extra, clip, ways = CASES[name]
    way = {"way": extra["way"]} if "way" in extra else {}
    params = {**PARAMS, **{key: value for key, value in extra.items() if key not in way}}
    ds_config = config(zero, "fp32", params, gradient_clipping=clip)
    runs = ranks.run(size, "train", MODULE, ds_config=ds_config, stages=stages, tied=tied, **way)
    expected, losses, apart = reference(runs, ds_config, size // stages, tied)
    assert apart < 1e-6
    seen: dict[str, Tensor] = {}
    for run in runs:
        assert run["losses"] == pytest.approx(losses, abs=1e-5)
        for weight_name, weight in run["after"].items():
            assert (weight - expected[weight_name]).abs().max() < 1e-5, weight_name
            assert torch.equal(weight, seen.setdefault(weight_name, weight)), weight_name
    assert seen.keys() == expected.keys()
    assert [run["stage"] for run in runs] == sorted(run["stage"] for run in runs)
    # What is told is of all stages, on every rank.
    matrices = {f"{block}.{key}.weight" for block in range(1, 5) for key in ("up", "down")}
    assert {each for run in runs for each in run["ranked"]} == matrices
    for run in runs:
        assert sorted(run["listed"]) == sorted(expected)
        assert run["ways"] == ways
        assert run["metrics"]["matrix_steps"] == STEPS * len(matrices)
        assert run["metrics"]["projected_matrices"] == len(matrices)
        assert run["report"] == runs[0]["report"]


def equal(runs: list[dict[str, Any]], others: list[dict[str, Any]], key: str = "weights") -> bool:
    """Whether every rank has the same weights to the bit."""
    return all(
        run[key].keys() == other["weights"].keys()
        and all(torch.equal(run[key][name], other["weights"][name]) for name in run[key])
        for run, other in zip(runs, others, strict=True)
    )


def difference(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """The largest between the weights of two runs, whoever holds them."""
    first, second = ({name: w for run in each for name, w in run["weights"].items()} for each in (runs, others))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# Ranks and stages, of ZeRO, dtype; ranks, stages, of ZeRO, of a run that takes it up elsewhere; whether that is by a
# universal checkpoint.
RESUMES = {
    "to one stage": ((2, 2, 1, "fp32"), (1, 1, 1), True),
    "to one stage, as it is": ((2, 2, 1, "fp32"), (1, 1, 1), False),
    "from one stage": ((1, 1, 1, "fp32"), (2, 2, 1), True),
    "to ZeRO stage 0": ((2, 2, 1, "fp32"), (2, 2, 0), False),
    "to ZeRO stage 0, universal": ((2, 2, 1, "fp32"), (2, 2, 0), True),
    "from ZeRO stage 0": ((2, 2, 0, "fp32"), (1, 1, 1), False),
    "to two ranks a stage": ((2, 2, 1, "fp32"), (4, 2, 1), False),
    "from two ranks a stage": ((4, 2, 1, "fp32"), (2, 2, 1), False),
    "from two ranks a stage, universal": ((4, 2, 1, "fp32"), (2, 2, 1), True),
    "to four stages": ((4, 2, 1, "fp32"), (4, 4, 1), False),
    "to four stages, universal": ((4, 2, 1, "bf16"), (4, 4, 1), True),
    "bf16": ((2, 2, 1, "bf16"), (1, 1, 1), False),
}


@pytest.mark.parametrize("name", full_if(lambda name: name not in ("to one stage", "from ZeRO stage 0"), RESUMES))
def test_a_resumed_pipeline_is_the_same(ranks: Pools, name: str, tmp_path: Path) -> None:
    """To the bit on the same ranks, also by way of other stages; trained elsewhere up to rounding."""
    (size, stages, zero, dtype), (others, other_stages, other_zero), universal = RESUMES[name]
    saved, moved, at = str(tmp_path / "saved"), str(tmp_path / "moved"), 4

    def run(count: int, pipeline: int, stage: int, norms: float = 0.25, **kwargs: Any) -> list[dict[str, Any]]:
        # As many rows a step, from one pipeline or two, only where there are as many pipelines: then no training.
        ds_config = config(stage, dtype, PARAMS) | kwargs.pop("extra", {})
        kwargs |= {"frozen": norms} if universal else {}
        return ranks.run(count, "run", MODULE, ds_config=ds_config, stages=pipeline, tied=True, **kwargs)

    whole = run(size, stages, zero, steps=(0, at), save=saved, norms=0.5)
    resumed = run(size, stages, zero, steps=(at, at), load=saved)
    assert "message" not in resumed[0], resumed[0]["message"]
    assert equal(resumed, whole)
    assert [each["losses"] for each in resumed] == [each["losses"][at:] for each in whole]
    assert resumed[0]["metrics"]["matrix_steps"] == whole[0]["metrics"]["matrix_steps"]
    load, extra = saved, {}
    if universal:
        (load, done), extra = convert(Path(saved), f"global_step{at}", tmp_path), UNIVERSAL
        assert done.returncode == 0, done.stderr[-2000:]
    there = run(others, other_stages, other_zero, steps=(at, at), load=str(load), save=moved, extra=extra)
    assert "message" not in there[0], there[0]["message"]
    assert equal(run(size, stages, zero, steps=(at, at), load=moved), whole)
    if others // other_stages == size // stages:
        assert difference(there, whole) < (1e-5 if dtype == "fp32" else 3e-2)


def test_stages_share_a_weight_and_not_what_is_beside_it(ranks: Pools, tmp_path: Path) -> None:
    """The weight of a tied linear layer is alike and not projected; each stage's bias has a name of its own."""
    runs = ranks.run(2, "tell_of_ties", MODULE, ds_config=config(1, "fp32", PARAMS), folder=str(tmp_path))
    weight, bias = "tied_modules.tie.weight", "tied_modules.tie.bias"
    for run in runs:
        assert {each for each in run["listed"] if "tie" in each} == {weight, bias, "tied_modules.tie@1.bias"}
        assert run["projected"] == ["2.up.weight", "2.down.weight", "3.up.weight", "3.down.weight"]
    assert [run["own"] for run in runs] == [sorted([weight, bias]), sorted([weight, "tied_modules.tie@1.bias"])]
    first, last = (run["weights"] for run in runs)
    assert torch.equal(first[weight], last[weight])
    assert not torch.equal(first[bias], last[bias])
    assert equal(runs, runs, "resumed")


def test_what_is_refused(ranks: Pools) -> None:
    """On every rank, in one sentence."""
    told = []
    for found in ranks.run(2, "refusals", MODULE, ds_config=config(1, "fp32", PARAMS)):
        assert "tied_modules.tie.weight is tied over stages of the PipelineModule" in found["tied"]
        assert (
            "zero_optimization.stage = 0 is not supported with bfloat16 in a PipelineModule; set it to 1"
            in found["stage 0"]
        )
        assert "ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism" in found["stage 2"]
        assert "is of a DeepSpeed MoE layer, which is not supported inside a PipelineModule" in found["experts"]
        assert "optimizer.params.alpha is 0.5 on rank 1 and 0.25 on rank 0" in found["ranks"]
        told.append(found["meta"])
    # The stage that holds the layer builds it on its device.
    assert told[0] == ""
    assert "layer 0 of the PipelineModule (Unmeasurable) cannot be built on the meta device" in told[1]


# What is harmed, how; what the sentence says.
DAMAGE = [
    ("ds_fira_states/stage_01/0/exp_avg.00", "gone", "lacks the states of ranks [1] of the 2 that saved it"),
    ("ds_fira_states/stage_00/0/exp_avg.00", "truncated", "stage_00/0/exp_avg.00: it cannot be read"),
    ("mp_rank_01_model_states.pt", "gone", "lacks mp_rank_01_model_states.pt, the model's states"),
    ("zero/4.up.weight/fp32.pt", "gone", "lacks zero/4.up.weight/fp32.pt; convert the checkpoint again"),
]


@pytest.mark.full
def test_a_damaged_universal_one_is_refused_by_name_on_every_rank(ranks: Pools, tmp_path: Path) -> None:
    given = {"ds_config": config(1, "fp32", PARAMS), "stages": 2, "tied": True}
    ranks.run(2, "run", MODULE, steps=(0, 1), save=str(tmp_path / "saved"), **given)
    universal, done = convert(tmp_path / "saved", "global_step1", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    given["ds_config"] |= UNIVERSAL
    for name, how, message in DAMAGE:
        load = str(damaged(universal, tmp_path, name, how))
        for answer in ranks.run(2, "run", MODULE, steps=(1, 1), load=load, **given):
            assert answer["message"].startswith("FiraAdam: ")
            assert message in answer["message"]


@pytest.mark.parametrize(("size", "stages"), [pytest.param(*way, marks=pytest.mark.full) for way in ((2, 2), (1, 1))])
def test_a_universal_one_of_adamw_goes_on_in_fira(ranks: Pools, size: int, stages: int, tmp_path: Path) -> None:
    """Its moments are projected as those of one stage are."""
    adamw, ours = adam_config(config(1, "fp32", PARAMS)), config(1, "fp32", PARAMS)
    after = {"steps": (4, 4), "tied": False}
    folders = [tmp_path / str(pipeline) for pipeline in (1, 2)]
    for pipeline, folder in enumerate(folders, 1):
        before = {"stages": pipeline, "tied": False, "steps": (0, 4), "save": str(folder)}
        ranks.run(pipeline, "run", MODULE, ds_config=adamw, **before)
        inject(folder, "global_step4")
    loads = [convert(folder, "global_step4", tmp_path / f"of {folder.name}") for folder in folders]
    assert [done.returncode for _, done in loads] == [0, 0]
    runs = [
        ranks.run(count, "run", MODULE, ds_config=ours | UNIVERSAL, load=str(load), stages=pipeline, **after)
        for (load, _), count, pipeline in zip(loads, (1, size), (1, stages), strict=True)
    ]
    assert "message" not in runs[1][0], runs[1][0]["message"]
    assert difference(*runs) < 1e-5
    refused = ranks.run(2, "run", MODULE, ds_config=ours, load=str(folders[1]), stages=2, **after)
    assert {"convert it by ds_to_universal" in each["message"] for each in refused} == {True}


@pytest.mark.full
def test_a_universal_one_goes_on_in_adamw(ranks: Pools, tmp_path: Path) -> None:
    """The weights, with as many stages or one."""
    given, adamw = {"tied": True, "steps": (STEPS, STEPS)}, adam_config(config(1, "fp32", PARAMS))
    before = {"ds_config": config(1, "fp32", PARAMS), "stages": 2, "save": str(tmp_path), "steps": (0, STEPS)}
    ours = ranks.run(2, "run", MODULE, **{**given, **before})
    universal, done = convert(tmp_path, f"global_step{STEPS}", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for stages in (1, 2):
        run = {"ds_config": adamw | UNIVERSAL, "stages": stages, "load": str(universal), **given}
        found = ranks.run(stages, "run", MODULE, **run)
        assert "message" not in found[0], found[0]["message"]
        assert difference([{"weights": each["loaded"]} for each in found], ours) == 0
        refused = ranks.run(stages, "run", MODULE, **{**run, "ds_config": adamw, "load": str(tmp_path)})
        assert {"set checkpoint.load_universal = true" in each["message"] for each in refused} == {True}


def test_a_changed_layer_is_found_before_training(ranks: Pools, tmp_path: Path) -> None:
    """On every rank, by its file."""
    ds_config = config(1, "fp32", PARAMS)
    ranks.run(2, "run", MODULE, ds_config=ds_config, stages=2, tied=True, steps=(0, 1), save=str(tmp_path))
    (file,) = tmp_path.glob("*/layer_04-model_states.pt")
    content = file.read_bytes()
    file.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    found = ranks.run(2, "run", MODULE, ds_config=ds_config, stages=2, tied=True, steps=(1, 1), load=str(tmp_path))
    assert {file.name in each.get("message", "") for each in found} == {True}
