"""Trainings of the Trainer and of accelerate go on on another number of processes, at the same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.grids import full_if
from tests.integration.hf_jobs import EXAMPLES, write_config, write_inputs
from tests.integration.test_hf_trainer import curve
from tests.programs import ROOT, Forked, run
from tests.ranks import free_port

# Rows of a micro-batch over all processes, of which two make a step.
ROWS, STEPS, SAVED = 4, 6, 3
TOLERANCE = 1e-5
_wholes: dict[Any, Path] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text and DeepSpeed configs in float32."""
    folder = tmp_path_factory.mktemp("resized")
    write_inputs(folder, letters=150)
    for stage in range(4):
        write_config(folder / f"zero{stage}.json", "zero2_auto.json", {"zero_optimization": zero(stage)})
    return folder


def zero(stage: int) -> dict[str, Any]:
    return {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3}


def trainer_line(folder: Path, output: str, stage: int, ranks: int, **changes: Any) -> list[str]:
    values = {
        "model": folder / "model.json",
        "text": folder / "text.txt",
        "seq_length": 32,
        "cache_dir": folder / "cache",
        "output_dir": folder / output,
        "deepspeed": folder / f"zero{stage}.json",
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "per_device_train_batch_size": ROWS // ranks,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.005,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "disable_tqdm": True,
        **changes,
    }
    return [item for name, value in values.items() for item in (f"--{name}", str(value))]


def train(script: str, line: list[str], folder: Path, name: str, ranks: int) -> None:
    for done in Forked(str(EXAMPLES / script), line, folder, name, ranks=ranks).wait():
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def whole(folder: Path, stage: int, ranks: int) -> Path:
    if (key := (stage, ranks)) not in _wholes:
        name = f"whole-{stage}-{ranks}"
        train("hf_trainer.py", trainer_line(folder, name, stage, ranks), folder, name, ranks)
        _wholes[key] = folder / name
    return _wholes[key]


def assert_same(found: Path, expected: Path) -> None:
    """The loss curve and the weights, of a run in one go and of one that was taken up elsewhere."""
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (found, expected)]
    for ours, theirs in zip(*map(curve, logs), strict=True):
        assert [value or 0.0 for value in ours] == pytest.approx([value or 0.0 for value in theirs], rel=TOLERANCE)
    weights, others = (load_file(path / "model.safetensors") for path in (found, expected))
    for name, weight in weights.items():
        assert (weight - others[name]).norm() / others[name].norm().clamp(min=1e-30) < TOLERANCE, name


# Stage, and processes before and after.
WAYS = [(2, 2, 1), (3, 1, 2), (0, 2, 1), (1, 1, 2), (2, 4, 2), (3, 2, 1), (0, 1, 2), (1, 2, 1), (3, 4, 2)]


def launched(launcher: str, script: str, line: list[str], folder: Path, ranks: int) -> None:
    """Run a script on new interpreters under a launcher."""
    commands = {
        "deepspeed": ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())],
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", str(ranks)],
        "accelerate": [
            "accelerate",
            "launch",
            "--config_file",
            str(folder / "launch.yaml"),
            "--main_process_port",
            "0",
        ],
    }
    done = run([*commands[launcher], str(EXAMPLES / script), *line], folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


# Stage, processes before and after, and what starts those after.
WAYS = [
    (2, 2, 1, "forks"),
    (3, 1, 2, "forks"),
    *[(0, 2, 1, "forks"), (1, 1, 2, "forks"), (2, 4, 2, "forks"), (3, 2, 1, "forks"), (0, 1, 2, "forks")],
    *[(1, 2, 1, "forks"), (3, 4, 2, "forks"), (2, 2, 1, "torchrun"), (2, 1, 2, "deepspeed")],
]


@pytest.mark.parametrize("way", full_if(lambda way: way not in WAYS[:1], WAYS), ids=str)
def test_the_trainer(folder: Path, way: tuple[int, int, int, str]) -> None:
    stage, before, after, launcher = way
    reference, name = whole(folder, stage, before), "-".join(map(str, ("resized", *way)))
    line = trainer_line(folder, name, stage, after, resume_from_checkpoint=reference / f"checkpoint-{SAVED}")
    if launcher == "forks":
        train("hf_trainer.py", line, folder, name, after)
    else:
        launched(launcher, "hf_trainer.py", line, folder, after)
    assert_same(folder / name, reference)


def accelerate_line(folder: Path, output: str, config: Path, **changes: Any) -> list[str]:
    values = {
        "model": folder / "model.json",
        "text": folder / "text.txt",
        "seq-length": 32,
        "cache-dir": folder / "cache",
        "output-dir": folder / output,
        "deepspeed-config": config,
        "steps": STEPS,
        "warmup-steps": 2,
        "save-every": SAVED,
        **changes,
    }
    return [item for name, value in values.items() if value for item in (f"--{name}", str(value))]


# Stage; processes and accumulation before and after, at micro-batches of two rows and one global batch; the launcher.
ACCELERATED = [
    (2, (2, 2), (1, 4), "forks"),
    (3, (1, 4), (2, 2), "forks"),
    (0, (1, 4), (2, 2), "forks"),
    (1, (4, 1), (2, 2), "forks"),
    (2, (2, 2), (1, 4), "accelerate"),
]


@pytest.mark.parametrize("way", full_if(lambda way: way not in ACCELERATED[:1], ACCELERATED), ids=str)
def test_accelerate(folder: Path, way: tuple[int, tuple[int, int], tuple[int, int], str]) -> None:
    """`accelerator.load_state`, and the rows that were seen are skipped; also with another accumulation."""
    stage, *runs, launcher = way
    figures, weights = [], []
    for number, (ranks, accumulation) in enumerate(runs):
        name = f"accelerated-{stage}-{launcher}-{number}"
        top = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulation}
        top |= {"bf16": {"enabled": False}, "zero_optimization": zero(stage)}
        config = write_config(folder / f"{name}.json", "zero2_bf16.json", top)
        state = folder / f"accelerated-{stage}-{launcher}-0" / f"step_{SAVED}"
        resume = {"resume": state, "save-every": STEPS} if number else {}
        if number and launcher == "accelerate":
            text = (ROOT / "ds_configs" / "accelerate_zero2.yaml").read_text()
            text = text.replace("num_processes: 2", f"num_processes: {ranks}")
            (folder / "launch.yaml").write_text(text.replace("ds_configs/zero2_bf16.json", str(config)))
            line = accelerate_line(folder, name, config, **resume, **{"deepspeed-config": None})
            launched(launcher, "accelerate_train.py", line, folder, ranks)
        else:
            train("accelerate_train.py", accelerate_line(folder, name, config, **resume), folder, name, ranks)
        figures.append(json.loads((folder / name / "figures.json").read_text()))
        weights.append(load_file(folder / name / "model" / "model.safetensors"))
    assert figures[1]["losses"] == pytest.approx(figures[0]["losses"][SAVED:], rel=TOLERANCE)
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).norm() / weight.norm().clamp(min=1e-30) < TOLERANCE, name


@pytest.mark.full
def test_the_trainer_changes_the_optimizer(folder: Path) -> None:
    """A run of AdamW on two processes goes on with FiraAdam on one, and FiraAdam's with AdamW."""
    adam = json.loads((folder / "zero2.json").read_text())
    adam["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
    (folder / "adam.json").write_text(json.dumps(adam))
    configs = {"FiraAdam": folder / "zero2.json", "AdamW": folder / "adam.json"}
    for before, after in (("FiraAdam", "AdamW"), ("AdamW", "FiraAdam")):
        losses = []
        for name, kind, ranks in ((f"first-{before}", before, 2), (f"then-{after}", after, 1)):
            start = folder / f"first-{before}" / f"checkpoint-{SAVED}"
            resume = {"resume_from_checkpoint": start} if kind == after else {}
            line = trainer_line(folder, name, 2, ranks, deepspeed=configs[kind], **resume)
            train("hf_trainer.py", line, folder, name, ranks)
            log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
            losses.append([entry["loss"] for entry in log if "loss" in entry])
        # The first loss behind the change is of the weights that were saved, on the rows that come next.
        assert losses[1][: SAVED + 1] == pytest.approx(losses[0][: SAVED + 1], rel=TOLERANCE)
        assert losses[1][SAVED + 1 :] != pytest.approx(losses[0][SAVED + 1 :], rel=TOLERANCE)
        assert losses[1][-1] < max(losses[1][: SAVED + 1])
        said = (folder / f"then-{after}-0.err").read_text()
        assert f"the checkpoint was made by {before}" in said
