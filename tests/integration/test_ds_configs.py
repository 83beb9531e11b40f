"""Every file in ds_configs: DeepSpeed reads all of it, it trains, and what it says is what the engine does.

The tests go by the files' content, so a new file is tested without being named here.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from ds_fira.engine.deepspeed.config_keys import NotedConfig
from ds_fira.optim.presets import PRESETS, ModelSize, transferred_scale
from ds_fira.optim.registry import TYPES
from ds_fira.optim.settings import check_params
from tests.ranks import Pools

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))}
FOR_THE_TRAINER = [name for name, content in FILES.items() if "auto" in json.dumps(content)]
COMPLETE = [name for name in FILES if name not in FOR_THE_TRAINER]
STEPS = 3
MODULE = "tests.integration.config_jobs"


def unread_keys(content: dict[str, Any]) -> list[str]:
    """Keys of a config that DeepSpeed never reads, and so silently ignores."""
    noted = NotedConfig(content)
    DeepSpeedConfig(noted)
    return sorted(noted.unread())


def shrunk(content: dict[str, Any]) -> dict[str, Any]:
    """A file fitted to a model of 16 by 16 matrices and three steps: rank, batch and warm-up; nothing else changes."""
    content = copy.deepcopy(content)
    params = content["optimizer"]["params"]
    params["rank"] = min(params["rank"], 4)
    # At a rate for fine-tuning three steps would not move a norm's bf16 weights of 1.
    params |= {"lr": max(params["lr"], 0.005)} if "lr" in params else {}
    content.pop("train_batch_size", None)
    content["train_micro_batch_size_per_gpu"] = 2
    # The recipes set the total instead, and accumulate what the processes leave.
    accumulation = content.get("gradient_accumulation_steps", 2)
    content["gradient_accumulation_steps"] = 2 if accumulation == "auto" else min(accumulation, 2)
    schedule = content.get("scheduler", {}).get("params", {})
    schedule.update({key: value for key, value in (("warmup_num_steps", 1), ("total_num_steps", 9)) if key in schedule})
    return content


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_left_to_silent_defaults(name: str) -> None:
    """Clipping (1.0 where it is missing), batch sizes, the printing interval and the stage are in every file."""
    content = FILES[name]
    for key in ("gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert key in content, key
    assert {"gradient_accumulation_steps", "train_batch_size"} & content.keys()
    if name != "zero2_bf16":  # the quickstart's, whose script sets the interval
        assert "steps_per_print" in content
    assert "stage" in content["zero_optimization"]
    assert content["optimizer"]["type"] in TYPES


@pytest.mark.parametrize("name", COMPLETE)
def test_deepspeed_reads_every_key(name: str) -> None:
    assert unread_keys(shrunk(FILES[name])) == []
    optimizer = FILES[name]["optimizer"]
    check_params(optimizer["params"], algorithm=TYPES[optimizer["type"]].algorithm)


def test_the_preset_takes_the_place_of_its_settings() -> None:
    """Nothing else differs from the usual file."""
    usual, preset = copy.deepcopy(FILES["zero2"]), copy.deepcopy(FILES["zero2_recommended"])
    name = preset["optimizer"]["params"].pop("preset")
    own = usual["optimizer"]["params"]
    usual["optimizer"]["params"] = {key: value for key, value in own.items() if key not in PRESETS[name].rows}
    assert usual == preset


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"gradient_cliping": 1.0}, ["gradient_cliping"]),
        ({"activation_checkpointing": {"cpu_checkpoint": True}}, ["activation_checkpointing.cpu_checkpoint"]),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, ["data_types.grad_acum_dtype"]),
        ({"optimizer": {"type": "FiraAdam", "parameters": {}}}, ["optimizer.parameters"]),
    ],
    ids=str,
)
def test_a_misspelt_key_would_be_found(change: dict[str, Any], expected: list[str]) -> None:
    """DeepSpeed raises for these no more than for the right ones."""
    assert unread_keys({**shrunk(FILES["zero2"]), **change}) == expected


def test_a_misspelt_key_of_the_offload_block_is_refused() -> None:
    """Which `unread_keys` passes over, because pydantic reads it where no recorder sees it."""
    content = shrunk(FILES["zero2_offload"])
    content["zero_optimization"]["offload_optimizer"]["pin_memry"] = True
    with pytest.raises(ValueError, match="pin_memry"):
        unread_keys(content)


def expected_wrapper(content: dict[str, Any]) -> str:
    stage = content["zero_optimization"]["stage"]
    if stage == 0:
        return "FP16_UnfusedOptimizer"
    if stage == 3:
        return "DeepSpeedZeroOptimizer_Stage3"
    fp32_accumulation = content.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if stage == 1 and fp32_accumulation and content.get("bf16", {}).get("enabled"):
        return "BF16_Optimizer"
    return "DeepSpeedZeroOptimizer"


def check_engine(seen: dict[str, Any], content: dict[str, Any]) -> None:
    """What the engine does is what a (resolved) config says."""
    zero, bf16, fp16 = content["zero_optimization"], content.get("bf16", {}), content.get("fp16", {})
    low = torch.bfloat16 if bf16.get("enabled") else torch.float16 if fp16.get("enabled") else torch.float32
    assert seen["module_dtypes"] == {low}
    assert seen["stage"] == zero["stage"]
    assert seen["wrapper"] == expected_wrapper(content)
    assert seen["gradient_clipping"] == content["gradient_clipping"]
    low_master = bf16.get("bf16_master_weights_and_grads", False)
    assert seen["master_dtypes"] == {torch.bfloat16 if low_master else torch.float32}
    assert seen["cpu_offload"] == (zero.get("offload_optimizer", {}).get("device") == "cpu")
    if seen["wrapper"] == "DeepSpeedZeroOptimizer":
        for option, value in seen["options"].items():
            assert option not in zero or value == zero[option], option
    params = content["optimizer"]["params"]
    moments = {
        "float32": {torch.float32},
        "bfloat16": {torch.bfloat16},
        "int8": {torch.int8, torch.uint8},
    }[params.get("state_dtype", "float32")]
    assert seen["moment_dtypes"] == moments
    for key, value in params.items():
        if key in seen["settings"] and key not in ("lr", "preset"):
            assert seen["settings"][key] == (tuple(value) if isinstance(value, list) else value), key
    assert seen["settings"].get("preset", {}).get("name") == params.get("preset")
    if "preset" in params:
        assert seen["lr"] == {PRESETS[params["preset"]].settings["lr"]}
        assert seen["settings"]["residual_scale"] == transferred_scale(ModelSize(width=16, depth=2, rank=4))
    assert seen["metrics"]["projected_matrices"] == 14
    assert seen["metrics"]["refreshes"] == 14
    assert sum(seen["memory"]["optimizer_state_bytes"]) > 0


@pytest.mark.parametrize("name", COMPLETE)
def test_a_file_trains_and_is_in_effect(ranks: Pools, name: str) -> None:
    """Three steps of a small LLaMA on two ranks: the loss falls, and the engine does what the file says."""
    content = shrunk(FILES[name])
    results = ranks.run(2, "step", module=MODULE, ds_config=content, steps=STEPS)
    for seen in results:
        check_engine(seen, content)
        assert seen["losses"][-1] < seen["losses"][0], seen["losses"]
        assert seen["moved"]
        assert seen["batch"] == (2, content["gradient_accumulation_steps"])
        assert seen["forwards_per_micro_step"] == (2 if "activation_checkpointing" in content else 1)
        assert seen["skipped_steps"] == 0
        if content.get("fp16", {}).get("enabled"):
            assert seen["loss_scale"] == 2.0 ** content["fp16"]["initial_scale_power"]
        accumulation = content.get("data_types", {}).get("grad_accum_dtype")
        if accumulation is not None and content["gradient_accumulation_steps"] > 1:
            assert seen["accumulated_dtypes"] == {{"fp32": torch.float32, "bf16": torch.bfloat16}[accumulation]}
        for parameter, weight in seen["module"].items():
            assert torch.equal(weight, results[0]["module"][parameter]), "the ranks drifted apart"


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero3"])
def test_a_preset_is_the_same_at_every_stage(ranks: Pools, name: str) -> None:
    """On every rank: the alpha of the whole model, also where ZeRO holds its weights; stage 2 has a file of its own."""
    content = shrunk(FILES[name])
    kept = {key: v for key, v in content["optimizer"]["params"].items() if key not in PRESETS["recommended"].rows}
    content["optimizer"]["params"] = {**kept, "preset": "recommended"}
    for seen in ranks.run(2, "step", module=MODULE, ds_config=content, steps=STEPS):
        check_engine(seen, content)


def test_activation_checkpointing_changes_no_number(ranks: Pools) -> None:
    """The block recomputes activations; losses and weights are those of the file without it, to the bit."""
    with_block, without = (shrunk(FILES[name]) for name in ("zero2_activation_checkpointing", "zero2"))
    assert {**with_block, "activation_checkpointing": None} == {**without, "activation_checkpointing": None}
    found, expected = (
        ranks.run(2, "step", module=MODULE, ds_config=content, steps=STEPS)[0] for content in (with_block, without)
    )
    assert found["losses"] == expected["losses"]
    assert all(torch.equal(found["module"][name], weight) for name, weight in expected["module"].items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in COMPLETE if "offload_optimizer" in FILES[name]["zero_optimization"]])
def test_offloaded_states_leave_the_gpu(ranks: Pools, name: str) -> None:
    """Every file steps on a CPU; only where master weights and states lie under offload needs a GPU to be seen."""
    (seen,) = ranks.run(1, "step", module=MODULE, ds_config=shrunk(FILES[name]), steps=STEPS)
    assert seen["module_devices"] == {"cuda"}
    assert seen["master_devices"] == seen["state_devices"] == {"cpu"}
    assert seen["losses"][-1] < seen["losses"][0]


def test_bf16_masters_combine_with_offload(ranks: Pools) -> None:
    """As docs/configs.md says: DeepSpeed stops, and names the one optimizer that it lets step them; ours does."""
    content = shrunk(FILES["zero2_bf16_master"])
    (expected,) = ranks.run(1, "step", module=MODULE, ds_config=content, steps=STEPS)
    content["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    (found,) = ranks.run(1, "step", module=MODULE, ds_config=content, steps=STEPS)
    assert found["master_dtypes"] == {torch.bfloat16}
    assert found["losses"] == expected["losses"]


ARGUMENTS = {
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "adam_beta2": 0.98,
    "max_grad_norm": 0.7,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "lr_scheduler_type": "constant",
}


@pytest.mark.parametrize("name", FOR_THE_TRAINER)
@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}, {}], ids=str)
def test_auto_is_resolved_by_the_trainer(ranks: Pools, tmp_path: Path, name: str, precision: dict[str, bool]) -> None:
    """A real Trainer fills every "auto" from its arguments, trains, and reaches FiraAdam."""
    content = copy.deepcopy(FILES[name])
    content["optimizer"]["params"]["rank"] = 4
    results = ranks.run(
        2,
        "step_with_trainer",
        module=MODULE,
        ds_config=content,
        folder=str(tmp_path),
        arguments={**ARGUMENTS, **precision},
    )
    for seen in results:
        resolved = seen["resolved"]
        assert "auto" not in json.dumps(resolved)
        check_engine(seen, resolved)
        assert resolved["gradient_clipping"] == 0.7
        assert seen["lr"] == {0.02}
        assert seen["settings"]["weight_decay"] == 0.1
        assert seen["settings"]["betas"] == (0.9, 0.98)
        assert seen["batch"] == (2, 2)
        assert resolved["train_batch_size"] == 8
        assert seen["losses"][-1] < seen["losses"][0]


def test_auto_without_a_trainer_is_refused(ranks: Pools) -> None:
    """DeepSpeed would take the first two for false, and train in float32 without a word."""
    places = ["bf16.enabled", "fp16.enabled", "gradient_clipping", "optimizer.params.lr"]
    cases = []
    for place in places:
        content = shrunk(FILES["zero2"])
        *blocks, key = place.split(".")
        parent = content
        for block in blocks:
            parent = parent.setdefault(block, {})
        parent[key] = "auto"
        cases.append((content, None))
    for answers in ranks.run(2, "try_to_build", cases=cases, shapes=[(8, 6), (8, 6)]):
        for place, (kind, text) in zip(places, answers, strict=True):
            assert kind == "ValueError"
            assert f"{place.removeprefix('optimizer.params.')} = 'auto'" in text
            assert "give" in text
