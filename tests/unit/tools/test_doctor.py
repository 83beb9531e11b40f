"""`ds-fira doctor` and `ds-fira config`: what they print, their exit status, their errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_fira.__main__ import main
from ds_fira.tools.config_files import files
from ds_fira.tools.doctor import examine
from ds_fira.tools.doctor.trainer import places_of_auto
from ds_fira.version import __version__

ROOT = Path(__file__).resolve().parents[3]
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 500,
}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "FiraAdam", "params": {"rank": 16, "lr": 0.01}},
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A small LLaMA's config file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODEL))
    return str(path)


def changed(tmp_path: Path, change: dict[str, Any] | str) -> str:
    """A config file with other settings, or with this text."""
    path = tmp_path / "ds_config.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**CONFIG, **change}))
    return str(path)


def call(config: str, model: str, *more: str, gpus: int = 3) -> int:
    """The command."""
    return main(["doctor", config, "--model", model, "--gpus", str(gpus), *more])


def test_what_is_told_of_a_run_that_would_train(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of line; the bytes are compared with engines' in `tests/distributed/test_doctor_live.py`."""
    config = changed(tmp_path, {"gradient_cliping": 1.0, "activation_checkpointing": {"number_checkpoint": 1}})
    assert call(config, model) == 0
    said = capsys.readouterr()
    text = said.out
    for words in (
        r"deepspeed 0.",
        "CPU, ",
        "gloo (torch has gloo)",
        "off: the kernels are not for cpu",
        "FiraAdam at ZeRO stage 2, bfloat16 with float32 master weights",
        "6 sequences in a step: 2 in a micro-batch x 1 accumulated x ranks",
        "projected: 6 of 64 x 64 (right, rank 16)",
        "not projected: 2 of 500 x 64, 5 of 64; lr 0.01",
        "mlp.down_proj.weight 64 x 176 on ranks 0 to 1: ",
        "gradient_cliping: DeepSpeed reads no key of this name; did you mean gradient_clipping?",
        "activation_checkpointing.number_checkpoint: DeepSpeed reads no key of this name; did you mean "
        "activation_checkpointing.number_checkpoints?",
    ):
        assert words in text
    assert text.splitlines()[-1].split() == ["verdict", "would", "train"]
    assert call(config, model, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trains"] is True
    assert (len(found["state_bytes"]), len(found["memory"])) == (3, 3)
    assert [group["projected"] for group in found["groups"]].count(False) == 1
    assert found["groups"][0]["matrices"] == [{"shape": [64, 64], "count": 6, "side": "right", "rank": 16}]


def test_the_rate_of_norms_is_told(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the group that has them, which is one by itself."""
    config = changed(tmp_path, {"optimizer": {"type": "FiraAdam", "params": {"rank": 16, "preset": "recommended"}}})
    assert call(config, model) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "not projected:" in line]
    assert [line.partition("not projected: ")[2] for line in lines] == [
        "2 of 500 x 64; lr 0.01, weight_decay 0.0",
        "5 of 64; lr 0.01, weight_decay 0.0, vector_lr_scale 0.1",
    ]


def test_nobody_computes_a_basis_that_is_drawn(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = changed(tmp_path, {"optimizer": {"type": "ApolloAdam", "params": {"rank": 16, "lr": 0.01}}})
    assert call(config, model) == 0
    text = capsys.readouterr().out
    assert "ApolloAdam at ZeRO stage 2" in text
    assert "each steps its rows, and draws the basis" in text
    assert "computes the basis" not in text


@pytest.mark.parametrize(
    ("change", "more", "sentences"),
    [
        (
            {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2, "zenflow": {}}},
            [],
            [
                "FiraAdam: zero_optimization.zenflow is not supported, because it steps its own Adam; remove it.",
                "FiraAdam: zero_optimization.zero_hpz_partition_size = 2 has no effect at stage 2, since DeepSpeed "
                "reads it at stage 3 only; remove it.",
            ],
        ),
        ({"optimizer": {"type": "AdamW"}}, [], ["optimizer.type = 'adamw' is no optimizer of ds_fira"]),
        (
            {"optimizer": {"type": "FiraAdam", "params": {"rank": 0}}},
            [],
            ["rank = 0 is not legal; give a whole number"],
        ),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, [], ["DeepSpeed: DeepSpeedZeroConfig: overlap_com"]),
        ({"train_batch_size": 7}, [], ["DeepSpeed: Check batch related parameters"]),
        (
            {"train_batch_size": "auto"},
            [],
            ["train_batch_size = 'auto' in the DeepSpeed config is for the Hugging Face"],
        ),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            [],
            ["DeepSpeed keeps master weights below float32 with offload_optimizer alone"],
        ),
        ({}, ["--gpu-memory", "0.001"], ["use a smaller model, a smaller micro-batch"]),
    ],
    ids=["two settings", "type", "rank", "zero", "batch", "auto", "masters", "memory"],
)
def test_a_refusal_exits_2_with_every_sentence(
    change: dict[str, Any],
    more: list[str],
    sentences: list[str],
    tmp_path: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(changed(tmp_path, change), model, *more, "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["trains"] is False
    assert len(found["refusals"]) == len(sentences)
    for refusal, sentence in zip(found["refusals"], sentences, strict=True):
        assert sentence in refusal
    assert call(changed(tmp_path, change), model, *more) == 2
    assert f"refused   {found['refusals'][0]}" in capsys.readouterr().out


@pytest.mark.parametrize(("state_dtype", "offload"), [(None, "cpu"), ("float32", "none")])
def test_masters_and_states_of_16_bits(
    state_dtype: str | None, offload: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masters train under offload too; DeepSpeed's setting for states is not taken for ours."""
    params = {"rank": 16, **({"state_dtype": state_dtype} if state_dtype else {})}
    change = {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": offload}},
        "optimizer": {"type": "FiraAdam", "params": params},
    }
    assert call(changed(tmp_path, change), model, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["training"]["master_weights"] == "bfloat16"
    about_states = [text for text in found["warnings"] if "bf16_optimizer_states = True" in text]
    assert len(about_states) == (state_dtype is None)


def test_auto_is_what_the_trainer_makes_of_it(model: str) -> None:
    """By its own code, ZeRO-3's buckets by the model's width; a contradiction is its own sentence."""
    given = ["bf16=true", "per_device_train_batch_size=3", "learning_rate=0.02"]
    found = examine("zero3_auto", model, 2, given)
    assert not found.refusals
    assert (found.training["micro_batch"], found.training["batch"], found.training["dtype"]) == (3, 6, "bfloat16")
    assert {group.settings["lr"] for group in found.groups} == {0.02}
    (refusal,) = examine("zero2", model, 2, ["learning_rate=0.02"]).refusals
    assert refusal.startswith("transformers: Please correct the following DeepSpeed config values")
    for given, words in (("learning_rte=0.02", "is no argument"), ("max_steps=x", "is not legal: ")):
        (refusal,) = examine("zero3_auto", model, 2, [given]).refusals
        assert refusal.startswith(f"--trainer {given} {words}")
    content = json.loads((ROOT / "ds_configs" / "zero3_auto.json").read_text())
    assert "zero_optimization.stage3_prefetch_bucket_size" in list(places_of_auto(content))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.json", "--model", "llama_60m", "--gpus", "2"], "nothing.json cannot be read as a DeepSpeed config"),
        (["zero7", "--model", "llama_60m", "--gpus", "2"], "no config is named 'zero7'; did you mean 'zero"),
        (["zero2", "--model", "llama_60m", "--gpus", "0"], "--gpus = 0 is not legal"),
        (["zero2", "--model", "nothing.json", "--gpus", "2"], "is a config file that does not exist"),
        (["zero2", "--model", "llama_60m", "--gpus", "2", "--gpu-memory", "h1000"], "did you mean 'h100'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_arguments_end_in_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ds-fira doctor: ")
    assert said.err.count("\n") == 1
    assert words in said.err


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1, "a": 2}'])
def test_a_file_that_is_no_config(text: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(changed(tmp_path, text), model) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be read as a DeepSpeed config (" in said


def test_every_file_is_found_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    """As it is in the repository's folder, which the package's links to; a source distribution has a copy."""
    names = {path.stem for path in (ROOT / "ds_configs").iterdir()}
    assert set(files()) == names
    for name in names:
        assert main(["config", name]) == 0
        (path,) = (ROOT / "ds_configs").glob(f"{name}.*")
        assert capsys.readouterr().out == path.read_text()
    assert main(["config", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == sorted(names)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ds-fira {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--liste"], ["zero2", "--list"], ["zero2", "zero3"]], ids=" ".join)
def test_the_parser_refuses_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["config", *arguments])
    assert ended.value.code == 2
