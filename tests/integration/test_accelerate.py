"""accelerate with FiraAdam from a DeepSpeed JSON: examples/accelerate_train.py on two real ranks."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integration.hf_jobs import EXAMPLES, MATRICES, ROOT, optimizer_states, write_config, write_inputs
from tests.programs import Forked, run, run_code
from tests.ranks import Pools

# An epoch is four steps, the last of them of one micro-batch.
STEPS, SAVED = 7, 5
JOBS = "tests.integration.hf_jobs"
TOP = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as a user's: a model, a text and, where the YAML looks for it, a DeepSpeed config."""
    folder = tmp_path_factory.mktemp("accelerate")
    write_inputs(folder, letters=150)
    (folder / "ds_configs").mkdir()
    write_config(folder / "ds_configs" / "zero2_bf16.json", "zero2_bf16.json", TOP)
    return folder


def arguments(folder: Path, output: str, **changes: Any) -> list[str]:
    """A command line of examples/accelerate_train.py."""
    values = {
        "model": folder / "model.json",
        "text": folder / "text.txt",
        "seq-length": 32,
        "cache-dir": folder / "cache",
        "output-dir": folder / output,
        "steps": STEPS,
        "warmup-steps": 2,
        "save-every": SAVED,
        **changes,
    }
    return [item for name, value in values.items() if value is not None for item in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def whole(ranks: Pools, folder: Path) -> dict[str, Any]:
    """Seven steps in one go, the JSON given to the plugin by the script; its figures."""
    config = {"deepspeed-config": folder / "ds_configs" / "zero2_bf16.json"}
    ranks.run(2, "accelerate_train", JOBS, arguments=arguments(folder, "whole", **config))
    return json.loads((folder / "whole" / "figures.json").read_text())


LAUNCH = ["launch", "--config_file", str(ROOT / "ds_configs" / "accelerate_zero2.yaml"), "--main_process_port", "0"]
TELLS_WHERE_IT_IS = """
import json, os, pathlib
pathlib.Path(f"place-{os.environ['RANK']}.json").write_text(json.dumps(dict(os.environ)))
"""
# What the launcher's processes meet by, and its forks by other means.
MEETING = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")


def told_by_the_launcher(folder: Path) -> dict[str, str]:
    """What `accelerate launch` with the repository's YAML puts into the environment of both its processes."""
    script = folder / "tells.py"
    script.write_text(TELLS_WHERE_IT_IS)
    code = "from accelerate.commands.accelerate_cli import main; main()"
    done = run_code(code, [*LAUNCH, str(script)], folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    places = [json.loads((folder / f"place-{rank}.json").read_text()) for rank in range(2)]
    assert [place["WORLD_SIZE"] for place in places] == ["2", "2"]
    told = [
        {name: value for name, value in place.items() if os.environ.get(name) != value and not name.startswith(MEETING)}
        for place in places
    ]
    assert told[0] == told[1]
    assert told[0]["ACCELERATE_USE_DEEPSPEED"] == "true"
    return told[0]


@pytest.fixture(scope="module", params=["forks", pytest.param("launcher", marks=pytest.mark.full)])
def resumed(request: pytest.FixtureRequest, whole: dict[str, Any], folder: Path) -> Path:
    """Other processes go on from step five: forks with the launcher's environment, or those of `accelerate launch`."""
    name, script = f"resumed-{request.param}", str(EXAMPLES / "accelerate_train.py")
    state = {"resume": folder / "whole" / f"step_{SAVED}", "save-every": STEPS}
    options = arguments(folder, name, **state)
    if request.param == "forks":
        processes = Forked(script, options, folder, name, ranks=2, variables=told_by_the_launcher(folder)).wait()
    else:
        processes = [run(["accelerate", *LAUNCH, script, *options], folder)]
    for done in processes:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = "".join(done.stdout for done in processes)
    assert said.count("validation loss") == 1, "each process took itself for the only one"
    return folder / name


def test_a_resumed_run_is_equal_to_the_bit(whole: dict[str, Any], resumed: Path, folder: Path) -> None:
    """Weights, losses and what the optimizer holds, from the middle of the second epoch on."""
    figures = json.loads((resumed / "figures.json").read_text())
    assert whole["losses"][SAVED:] == figures["losses"]
    assert len(figures["losses"]) == STEPS - SAVED
    assert whole["val_loss"] == figures["val_loss"]
    weights = [load_file(run / "model" / "model.safetensors") for run in (folder / "whole", resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_json_decides_the_optimizer(whole: dict[str, Any], folder: Path) -> None:
    """DeepSpeed builds FiraAdam on two ranks from the parameters of accelerate's stand-in, under one schedule."""
    assert whole["projected_matrices"] == MATRICES
    assert whole["matrix_steps"] == MATRICES * STEPS
    assert whole["refreshes"] == MATRICES * math.ceil(STEPS / 2)
    states = optimizer_states(folder / "whole" / f"step_{SAVED}" / "pytorch_model")
    assert len(states) == 2
    for state in states:
        groups = state["base_optimizer_state"]["param_groups"]
        assert [group["rank"] for group in groups if "rank" in group] == [8] * (len(groups) - 1)
        rate = 0.005 * 0.5 * (1 + math.cos(math.pi * (SAVED - 2) / (STEPS - 2)))
        assert [group["lr"] for group in groups] == pytest.approx([rate] * len(groups))


def test_the_model_opens(whole: dict[str, Any], folder: Path) -> None:
    """`save_pretrained` of the unwrapped model leaves a checkpoint that transformers opens, and it has learned."""
    model = AutoModelForCausalLM.from_pretrained(folder / "whole" / "model")
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    assert whole["val_perplexity"] == pytest.approx(math.exp(whole["val_loss"]))
    assert whole["losses"][-1] < whole["losses"][0] - 0.1


def test_wrong_settings_stop_on_every_rank_with_one_sentence(ranks: Pools, folder: Path) -> None:
    write_config(folder / "no_rank.json", "zero2_bf16.json", TOP, rank=None)
    write_config(folder / "auto_lr.json", "zero2_bf16.json", TOP, lr="auto")
    write_config(folder / "auto_betas.json", "zero2_bf16.json", TOP, betas="auto")
    cases = {
        "none.json does not exist": {"deepspeed-config": folder / "none.json"},
        "no_state does not exist": {"resume": folder / "no_state"},
        "optimizer.params.rank is missing": {"deepspeed-config": folder / "no_rank.json"},
        'has "auto" for lr; give --lr': {"deepspeed-config": folder / "auto_lr.json"},
        'optimizer.params.betas = "auto" is filled in by nobody': {"deepspeed-config": folder / "auto_betas.json"},
        "--lr 0.1 contradicts lr = 0.005": {"lr": 0.1},
        "--batch-size 3 contradicts train_micro_batch_size_per_gpu": {"batch-size": 3},
    }
    lines = [arguments(folder, "nothing", **changes) for changes in cases.values()]
    for said in ranks.run(2, "accelerate_complaints", JOBS, command_lines=lines):
        for expected, sentence in zip(cases, said, strict=True):
            assert expected in sentence
            assert "\n" not in sentence


def test_what_the_engine_refuses_ends_every_rank_with_one_sentence(folder: Path) -> None:
    """As DeepSpeed builds it: status 2, with which launch/run.sh starts nothing again, and no traceback."""
    config = write_config(
        folder / "sync.json", "zero2_bf16.json", TOP | {"zero_optimization": {"stage": 3}}, check_sync_every=7
    )
    options = arguments(folder, "refused", **{"deepspeed-config": config})
    for done in Forked(str(EXAMPLES / "accelerate_train.py"), options, folder, "refused", ranks=2).wait():
        assert done.returncode == 2, done.stderr[-4000:]
        assert "Traceback" not in done.stderr
        assert "accelerate_train.py: error: FiraAdam: check_sync_every = 7 " in done.stderr
