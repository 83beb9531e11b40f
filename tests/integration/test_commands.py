"""Commands as programs of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_fira import run as runner
from ds_fira.__main__ import main
from tests.programs import ROOT, Forked, run_command

QUIET: dict[str, str | None] = {"DS_ACCELERATOR": None}


def test_estimate_as_a_program(tmp_path: Path) -> None:
    """The table and the JSON of the clause's example, in a process of its own."""
    file = tmp_path / "deep" / "estimate.json"
    command = ["estimate", "--model", "llama_1b", "--rank", "512", "--gpus", "8"]
    command += ["--zero-stage", "2", "--gpu-memory", "a100-40", "--batch-size", "16", "--seq-length", "256"]
    done = run_command([*command, "--json", str(file)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "61.1% less than AdamW's" in done.stdout
    for word in ("AdamW", "GaLore", "LoRA", "Fira", "optimizer states", "fits 40 GiB", "largest micro-batch"):
        assert word in done.stdout
    written = json.loads(file.read_text())
    assert written["methods"]["Fira"]["fits"] is True
    assert len(written["methods"]["Fira"]["by_rank"]) == 8
    assert written["state_saving"] == pytest.approx(0.611, abs=5e-4)


def test_standard_output_is_data(tmp_path: Path) -> None:
    """On a machine that says nothing of its accelerator, where libraries talk: one JSON document and no more."""
    told = run_command(["doctor", "llama_60m", "--model", "llama_60m", "--gpus", "2", "--json"], tmp_path, QUIET)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["trains"] is True
    refused = run_command(["doctor", "zero3_auto", "--model", "llama_60m", "--gpus", "2", "--json"], tmp_path, QUIET)
    assert refused.returncode == 2
    assert "for the Hugging Face Trainer" in json.loads(refused.stdout)["refusals"][0]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["estimate", "--model"],
        ["report", "nowhere"],
        ["checkpoint", "nowhere"],
        ["config", "nothing"],
        ["doctor", "zero2", "--model", "llama_60m"],
    ],
    ids=" ".join,
)
def test_wrong_input_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of every command; nothing is on standard output."""
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith("ds-fira")


@pytest.mark.parametrize("arguments", [[], ["nothing.py"]])
def test_a_script_that_is_not_there_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`ds_fira.run`: launch/run.sh starts nothing again on this status."""
    with pytest.raises(SystemExit) as ended:
        runner.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("pretrain_llama.py", ["--steps", "0"], "--steps"),
        ("hf_trainer.py", ["--model", "none.json", "--output_dir", "out"], "model config none.json does not exist"),
        ("hf_trainer.py", ["--max_steps", "many"], "invalid int value"),
        ("accelerate_train.py", ["--deepspeed-config", "none.json"], "none.json does not exist"),
        ("finetuning/commonsense.py", ["--model", "none", "--train", "none.json"], "none.json"),
        ("memory_savings.py", ["--seq-length", "1"], "--seq-length must be at least 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_options_of_examples_exit_2(script: str, arguments: list[str], sentence: str, tmp_path: Path) -> None:
    """With one sentence, whether argparse, the example or a library finds them."""
    (done,) = Forked(str(ROOT / "examples" / script), arguments, tmp_path).wait()
    assert done.returncode == 2, done.stderr[-2000:]
    assert sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
