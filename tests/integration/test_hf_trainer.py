"""The Hugging Face Trainer with FiraAdam from a DeepSpeed JSON: examples/hf_trainer.py on two real ranks."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_fira.checkpoint.atomic_save import reseal
from ds_fira.checkpoint.payload import PAYLOAD, unfold
from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles
from tests.integration.hf_jobs import EXAMPLES, MATRICES, optimizer_states, states_files, write_config, write_inputs
from tests.programs import Forked, run
from tests.ranks import Pools, free_port

LR, WARMUP, STEPS, HALF = 0.005, 2, 6, 3
JOBS = "tests.integration.hf_jobs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text and DeepSpeed configs."""
    folder = tmp_path_factory.mktemp("trainer")
    write_inputs(folder)
    write_config(folder / "ds.json", "zero2_auto.json")
    return folder


def arguments(folder: Path, output: str, config: str = "ds.json", **changes: Any) -> list[str]:
    """A command line of examples/hf_trainer.py: bf16, accumulation, weight decay, activation checkpointing, cosine."""
    values = {
        "model": folder / "model.json",
        "text": folder / "text.txt",
        "seq_length": 32,
        "cache_dir": folder / "cache",
        "output_dir": folder / output,
        "deepspeed": folder / config,
        "bf16": True,
        "max_steps": STEPS,
        "save_steps": HALF,
        "eval_strategy": "steps",
        "eval_steps": HALF,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "activation_checkpointing": True,
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "weight_decay": 0.1,
        "adam_beta2": 0.99,
        "disable_tqdm": True,
        **changes,
    }
    return [item for name, value in values.items() if value is not None for item in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def whole(ranks: Pools, folder: Path) -> dict[str, Any]:
    """Six steps in one go, with a checkpoint after three."""
    return ranks.run(2, "train", JOBS, arguments=arguments(folder, "whole"))[0]


@pytest.fixture(scope="module", params=["forks", pytest.param("deepspeed", marks=pytest.mark.full)])
def resumed(request: pytest.FixtureRequest, whole: dict[str, Any], folder: Path) -> Path:
    """New processes go on from the checkpoint after three steps: forks, or those of the deepspeed launcher."""
    name = f"resumed-{request.param}"
    output, script = folder / name, str(EXAMPLES / "hf_trainer.py")
    shutil.copytree(folder / "whole" / f"checkpoint-{HALF}", output / f"checkpoint-{HALF}")
    options = arguments(folder, name, resume_from_checkpoint="last")
    if request.param == "forks":
        processes = Forked(script, options, folder, name, ranks=2).wait()
    else:
        launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
        processes = [run([*launcher, script, *options], folder)]
    for done in processes:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "perplexity" in processes[0].stdout
    return output


def curve(history: list[dict[str, Any]]) -> list[tuple]:
    """Step, losses, gradient norm and learning rate of a log, without times."""
    keys = ("step", "loss", "eval_loss", "grad_norm", "learning_rate")
    return [tuple(entry.get(key) for key in keys) for entry in history if "loss" in entry or "eval_loss" in entry]


def test_a_resumed_run_is_equal_to_the_bit(whole: dict[str, Any], resumed: Path, folder: Path) -> None:
    history = json.loads((resumed / "trainer_state.json").read_text())["log_history"]
    reference = json.loads((folder / "whole" / "trainer_state.json").read_text())["log_history"]
    assert curve(history) == curve(reference)
    ours, theirs = load_file(resumed / "model.safetensors"), load_file(folder / "whole" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    last = f"checkpoint-{STEPS}/global_step{STEPS}"
    found, wanted = (CheckpointFiles.find(run / last) for run in (resumed, folder / "whole"))
    for rank in range(2):
        (ours, mine), (theirs, other) = found.optimizer_state(rank), wanted.optimizer_state(rank)
        masters = "single_partition_of_fp32_groups"
        assert all(torch.equal(one, two) for one, two in zip(ours[masters], theirs[masters], strict=True))
        states, expected = mine["state"], other["state"]
        assert any("basis" in state for state in states.values())
        for index, state in states.items():
            assert state.keys() == expected[index].keys()
            assert all(torch.equal(value, expected[index][name]) for name, value in state.items())


def test_resuming_restores_the_optimizers_state(ranks: Pools, whole: dict[str, Any], folder: Path) -> None:
    """The same resumed run with FiraAdam's state at zero goes another way, so the state matters and comes back."""
    checkpoint = folder / "dropped" / f"checkpoint-{HALF}"
    shutil.copytree(folder / "whole" / f"checkpoint-{HALF}", checkpoint)
    for path in states_files(checkpoint / f"global_step{HALF}"):
        content = torch.load(path, weights_only=False)
        base = content["optimizer_state_dict"]["base_optimizer_state"]
        for state in unfold(base[PAYLOAD], base["state"])["state"].values():
            for value in state.values():
                value.zero_()
        torch.save(content, path)
    reseal(checkpoint, f"global_step{HALF}")  # the checksums would not fit
    dropped = ranks.run(2, "train", JOBS, arguments=arguments(folder, "dropped", resume_from_checkpoint=checkpoint))[0]
    ours, theirs = curve(dropped["history"]), curve(whole["history"])
    first = next(index for index, entry in enumerate(theirs) if entry[0] == HALF + 1)
    assert ours[: first + 1] == theirs[: first + 1], "the weights, the data and the schedule are restored"
    assert all(one[1] != two[1] for one, two in zip(ours[first + 1 :], theirs[first + 1 :], strict=True) if one[1])


def test_arguments_reach_fira_through_auto(whole: dict[str, Any], folder: Path) -> None:
    """The Trainer gives one flat list of parameters; FiraAdam makes groups of it, and all follow one schedule."""
    for state in optimizer_states(folder / "whole" / f"checkpoint-{HALF}" / f"global_step{HALF}"):
        groups = state["base_optimizer_state"]["param_groups"]
        assert len(groups) > 2
        assert [group["rank"] for group in groups if "rank" in group] == [8] * (len(groups) - 1)
        for group in groups:
            assert (group["weight_decay"], tuple(group["betas"])) == (0.1, (0.9, 0.99))
            assert group["initial_lr"] == LR
    rates = [entry["learning_rate"] for entry in whole["history"] if "loss" in entry]
    # The Trainer logs the rate of the next step.
    share = [(step - WARMUP) / (STEPS - WARMUP) for step in range(1, STEPS + 1)]
    expected = [LR / 2 if part < 0 else LR * 0.5 * (1 + math.cos(math.pi * part)) for part in share]
    assert rates == pytest.approx(expected)
    assert whole["lrs"] == pytest.approx([0.0])
    assert whole["metrics"]["projected_matrices"] == MATRICES
    assert whole["metrics"]["refreshes"] == MATRICES * STEPS // 2
    assert whole["steps"] == [STEPS]


def test_the_model_opens_and_can_be_gone_on_from(ranks: Pools, whole: dict[str, Any], folder: Path) -> None:
    """`save_model` leaves a checkpoint that transformers opens, with the weights that were validated."""
    figures = json.loads((folder / "whole" / "eval_results.json").read_text())
    assert figures["perplexity"] == pytest.approx(math.exp(figures["eval_loss"]))
    model = AutoModelForCausalLM.from_pretrained(folder / "whole")
    ids = AutoTokenizer.from_pretrained(folder / "whole")("what the matrices need", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    more = arguments(folder, "more", model=folder / "whole", max_steps=1, eval_strategy="no", learning_rate=0.0)
    more = ranks.run(2, "train", JOBS, arguments=more)[0]
    losses = [entry["loss"] for entry in whole["history"] if "loss" in entry]
    assert more["history"][0]["loss"] < losses[0] - 0.1, "the weights of the checkpoint were not the start"


def test_best_model_and_offload(ranks: Pools, whole: dict[str, Any], folder: Path) -> None:
    """`load_best_model_at_end` puts an earlier checkpoint back, optimizer and all, with states in host memory."""
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    write_config(folder / "offload.json", "zero2_auto.json", {"zero_optimization": offload})
    choice = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    result = ranks.run(2, "train", JOBS, arguments=arguments(folder, "best", "offload.json", **choice))[0]
    assert result["best"] == str(folder / "best" / f"checkpoint-{HALF}"), "the highest loss is the earliest"
    validations = [entry["eval_loss"] for entry in result["history"] if "eval_loss" in entry]
    assert validations[0] == validations[-1] > validations[1]
    assert result["steps"] == [HALF]
    assert result["devices"] == ["cpu"]
    assert curve(result["history"])[0][1] == curve(whole["history"])[0][1]


def test_accumulation_is_one_large_batch(ranks: Pools, whole: dict[str, Any], folder: Path) -> None:
    """Two micro-batches of two rows give the first step of four rows: loss, and gradient norm through DeepSpeed."""
    single = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "activation_checkpointing": False}
    wide = arguments(folder, "wide", **single, max_steps=1, eval_strategy="no")
    first = ranks.run(2, "train", JOBS, arguments=wide)[0]["history"][0]
    reference = whole["history"][0]
    assert first["loss"] == pytest.approx(reference["loss"], rel=1e-3)
    assert first["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0.02)  # bf16


def test_wrong_settings_stop_on_every_rank_with_one_sentence(ranks: Pools, folder: Path) -> None:
    write_config(folder / "eps.json", "zero2_auto.json", eps=1e-5)
    write_config(folder / "no_rank.json", "zero2_auto.json", rank=None)
    write_config(folder / "auto_rank.json", "zero2_auto.json", rank="auto")
    write_config(folder / "typo.json", "zero2_auto.json", update_proj_gpa=5)
    clip = write_config(folder / "clip.json", "zero2_auto.json", {"gradient_clipping": 0.5})
    (folder / "lines.txt").write_text("".join(f"document {number} in a line of its own\n" for number in range(40)))
    cases = {
        "lines.txt holds 1 documents, and at least two are needed: in a txt file a blank line ends a document; for one "
        'document a line, write a jsonl file of {"text": "..."}': {"text": folder / "lines.txt"},
        "eps.json contradicts the arguments (ds optimizer.params.eps=1e-05 vs hf adam_epsilon=1e-08)": {
            "config": "eps.json"
        },
        "clip.json contradicts the arguments (ds gradient_clipping=0.5 vs hf max_grad_norm=1.0)": {"config": clip.name},
        "--adam_epsilon 1e-07 does nothing": {"adam_epsilon": 1e-7},
        "--optim adafactor does nothing here": {"optim": "adafactor"},
        "--ddp_timeout 60 does nothing here; set DEEPSPEED_TIMEOUT": {"ddp_timeout": 60},
        "optimizer.params.rank is missing": {"config": "no_rank.json"},
        'optimizer.params.rank = "auto" is filled in by nobody': {"config": "auto_rank.json"},
        "did you mean 'update_proj_gap'": {"config": "typo.json"},
        "none.json": {"config": "none.json"},
        "found no checkpoint": {"resume_from_checkpoint": "last"},
        "the model config none.json does not exist": {"model": "none.json"},
        f"--text {folder}/none.txt does not exist": {"text": folder / "none.txt"},
        "exceed the 32 positions": {"seq_length": 64},
    }
    lines = [arguments(folder, "nothing", **changes) for changes in cases.values()]
    for said in ranks.run(2, "complaints", JOBS, command_lines=lines):
        for expected, sentence in zip(cases, said, strict=True):
            assert expected in sentence
            assert "\n" not in sentence


def test_what_the_engine_refuses_ends_every_rank_with_one_sentence(folder: Path) -> None:
    """Inside `Trainer.train`: status 2, with which launch/run.sh starts nothing again, and no traceback."""
    write_config(folder / "sync.json", "zero2_auto.json", {"zero_optimization": {"stage": 3}}, check_sync_every=7)
    options = arguments(folder, "refused", "sync.json", eval_strategy="no", activation_checkpointing=False)
    for done in Forked(str(EXAMPLES / "hf_trainer.py"), options, folder, "refused", ranks=2).wait():
        assert done.returncode == 2, done.stderr[-4000:]
        assert "Traceback" not in done.stderr
        assert re.search(
            r"^hf_trainer\.py: error: FiraAdam: check_sync_every = 7 .*stage 0, 1 or 2\.$", done.stderr, re.M
        )
    assert not (folder / "refused" / "model.safetensors").exists()


def test_an_error_of_the_training_itself_is_no_wrong_option(ranks: Pools, folder: Path) -> None:
    """It keeps its traceback, and so status 1: a run that may be started again."""
    said = ranks.run(1, "fails_in_training", JOBS, arguments=arguments(folder, "fails", max_steps=2))[0]
    assert said == "ValueError: the data broke in step 1"
