"""A training on one card: `launch/llama_7b_one_gpu.sh`, and what it starts, on a model of a few thousand weights."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.hf_jobs import EXAMPLES, write_inputs
from tests.integration.test_hf_trainer import curve
from tests.programs import ROOT, Forked, run

SCRIPT = ROOT / "launch" / "llama_7b_one_gpu.sh"


def line(folder: Path, name: str, **changes: object) -> list[str]:
    """Options behind those of the script."""
    values = {
        "model": folder / "model.json",
        "text": folder / "text.txt",
        "cache_dir": folder / "cache",
        "output_dir": folder / name,
        "seq_length": 32,
        "max_steps": 4,
        "save_steps": 2,
        "warmup_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "optim_args": "preset=recommended,rank=8,update_proj_gap=2,state_dtype=int8,weight_rounding=stochastic,"
        "step_in_backward=true",
        **changes,
    }
    return [item for key, value in values.items() for item in (f"--{key}", str(value))]


def of_the_script(folder: Path, name: str, **changes: object) -> list[str]:
    """The options that the script hands over, those of a test behind them."""
    command = SCRIPT.read_text().replace("\\\n", " ").splitlines()[-1]
    own = shlex.split(command.partition('hf_trainer.py"')[2].replace('"$@"', ""))
    assert own[:2] == ["--model", "llama_7b"]
    return [*own, *line(folder, name, **changes)]


def test_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    example = str(EXAMPLES / "hf_trainer.py")
    (done,) = Forked(example, of_the_script(tmp_path, "whole"), tmp_path, "whole").wait()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    options = of_the_script(tmp_path, "resumed", resume_from_checkpoint="last")
    (again,) = Forked(example, options, tmp_path, "resumed").wait()
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-4000:]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("resumed", "whole"))
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, ours[name]) for name, value in theirs.items())
    histories = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("resumed", "whole")
    ]
    assert curve(histories[0]) == curve(histories[1])
    states = torch.load(tmp_path / "whole" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert any(state.get("basis") is not None and state["exp_avg"].dtype == torch.int8 for state in states.values())


@pytest.mark.full
def test_the_command(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    done = run(["bash", str(SCRIPT), *line(tmp_path, "out")], tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    figures = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert figures["optimizer_state_bytes"] > 0
    assert figures["perplexity"] > 1
