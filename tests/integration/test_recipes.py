"""The paper's recipes as they ship: model files, DeepSpeed configs and the commands in `launch/`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_fira.optim.presets import PRESETS, ModelSize, transferred_alpha, transferred_scale, transferred_warmup
from ds_fira.tools import models
from examples.pretraining.batch import settle_batch
from tests.programs import ROOT, Forked, run, write_text

# Table 5 (heads and layers of 1B the right way round): hidden, intermediate, heads, layers, and millions of weights.
TABLE_5 = {
    "llama_60m": (512, 1376, 8, 8, 58),
    "llama_130m": (768, 2048, 12, 12, 134),
    "llama_350m": (1024, 2736, 16, 24, 368),
    "llama_1b": (2048, 5461, 32, 24, 1339),
    "llama_7b": (4096, 11008, 32, 32, 6738),
}
# Table 2 and appendix A.2; 7B from the released script: rank, lr, alpha, gap, clipping, optimizer steps.
RECIPES = {
    "llama_60m": (128, 0.01, 0.25, 200, 0.0, 10_000),
    "llama_130m": (256, 0.01, 0.25, 200, 0.0, 20_000),
    "llama_350m": (256, 0.01, 0.25, 200, 0.0, 60_000),
    "llama_1b": (512, 0.01, 0.0625, 200, 0.0, 100_000),
    "llama_7b": (1024, 0.005, 0.0625, 500, 1.0, 150_000),
    "llama_7b_rank64": (64, 0.005, 0.0625, 500, 1.0, 10_000),
}


@pytest.mark.parametrize("name", models.NAMES)
def test_model_file_is_the_papers_model(name: str) -> None:
    """The file opens in transformers, and the model has the paper's shape and size."""
    config = AutoConfig.from_pretrained(models.config_file(name))
    hidden, intermediate, heads, layers, millions = TABLE_5[name]
    assert config.model_type == "llama"
    assert (config.hidden_size, config.intermediate_size) == (hidden, intermediate)
    assert (config.num_attention_heads, config.num_hidden_layers) == (heads, layers)
    assert config.vocab_size == 32000
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert round(model.num_parameters() / 1e6) == millions


@pytest.mark.parametrize("name", RECIPES)
def test_config_has_the_papers_values(name: str) -> None:
    """rank, lr, alpha and gap; 512 sequences a batch; clipping said, not left to DeepSpeed's default."""
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    params = config["optimizer"]["params"]
    found = (params["rank"], params["lr"], params["alpha"], params["update_proj_gap"], config["gradient_clipping"])
    assert found == RECIPES[name][:5]
    assert config["train_batch_size"] == 512  # of 256 tokens: the paper's 131K


@pytest.mark.parametrize("name", RECIPES)
def test_command_names_the_recipe(name: str) -> None:
    """Each command has its model, its config and the paper's number of steps."""
    script = (ROOT / "launch" / f"{name}.sh").read_text()
    model = name.removesuffix("_rank64")
    assert re.search(rf'^recipe {model} {name} {RECIPES[name][5]} "\$@"$', script, re.MULTILINE)
    assert f"{RECIPES[name][5]:,} steps" in script


@pytest.mark.full
@pytest.mark.timeout(600)  # 56 exact decompositions, 186 s on two quiet cores without AVX-512
def test_recipe_trains(tmp_path: Path) -> None:
    """LLaMA 60M itself takes two steps on two processes, with a smaller batch and another text; what it has is kept."""
    write_text(tmp_path)
    options = ["--data", "text.txt", "--tokenizer", "train", "--cache-dir", "cache", "--output-dir", "out"]
    options += ["--steps", "2", "--batch-size", "1", "--total-batch-size", "4", "--eval-batches", "1", "--report"]
    options += ["--validation-tokens", "1024", "--gamma", "1.1", "--preset", "recommended"]
    command = ["bash", str(ROOT / "launch" / "llama_60m.sh"), *options]
    done = run(command, tmp_path, limit=580, VIRTUAL_ENV=sys.prefix, NPROC="2", LAUNCHER="torchrun")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["parameters"] == 58_073_600
    assert summary["projected_matrices"] == 56
    assert (summary["steps"], summary["tokens"]) == (2, 2 * 4 * 256)
    config = summary["deepspeed_config"]
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (4, 2)
    assert config["gradient_clipping"] == 0.0
    params = config["optimizer"]["params"]
    assert (params["rank"], params["gamma"], params["preset"]) == (128, 1.1, "recommended")
    assert not {"lr", "alpha"} & params.keys()
    assert summary["refreshes"] == 56
    page = (tmp_path / "out" / "report.html").read_text()
    # Fira's own events come every ten steps (`steps_per_print`), later than this run ends.
    assert "Learning rate" in page
    assert "Perplexity" in page
    assert sorted(path.name for path in (tmp_path / "out" / "model").glob("*.safetensors")) == ["model.safetensors"]


def test_recipe_with_the_preset_is_planned(tmp_path: Path) -> None:
    """The command's own plan for LLaMA 60M: the preset in place of the config's lr and alpha, and what it gives."""
    options = ["--preset", "recommended", "--dry-run", "--data", "text.txt", "--tokenizer", "train"]
    write_text(tmp_path)
    command = ["bash", str(ROOT / "launch" / "llama_60m.sh"), *options, "--output-dir", "out"]
    done = run(command, tmp_path, VIRTUAL_ENV=sys.prefix, NPROC="1", LAUNCHER="python")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = re.search(r"^optimizer +FiraAdam: (.*)$", done.stdout, re.MULTILINE)[1]
    assert "preset recommended" in said
    assert not re.search(r"\b(lr|alpha) ", said)
    scale = transferred_scale(ModelSize(width=512, depth=8, rank=128))
    assert f"residual_scale {scale:.3g}, residual_warmup 400 (width 512, depth 8, rank 128)" in done.stdout


@pytest.mark.parametrize("given", [[], ["--lr", "0.02"], ["--alpha", "0.5"]], ids=str)
def test_a_recipes_config_trains_a_tiny_model_with_the_preset(tmp_path: Path, given: list[str]) -> None:
    """What the recipe starts, with a tiny model: an option wins over the preset, and the preset over the config."""
    write_text(tmp_path)
    options = ["--deepspeed-config", str(ROOT / "ds_configs" / "llama_60m.json"), "--preset", "recommended", *given]
    options += ["--hidden-size", "32", "--layers", "3", "--heads", "2", "--rank", "8", "--vocab-size", "300"]
    options += ["--seq-length", "32", "--steps", "3", "--batch-size", "2", "--total-batch-size", "2"]
    options += ["--eval-batches", "1", "--validation-tokens", "128", "--data", "text.txt", "--save-every", "3"]
    options += ["--cache-dir", "cache", "--output-dir", "out", "--warmup-steps", "0", "--min-lr-ratio", "1"]
    (done,) = Forked(str(ROOT / "examples" / "pretrain_llama.py"), options, tmp_path).wait()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    params = json.loads((tmp_path / "out" / "summary.json").read_text())["deepspeed_config"]["optimizer"]["params"]
    own = {name.removeprefix("--"): float(value) for name, value in zip(given[::2], given[1::2], strict=True)}
    assert {name: params[name] for name in ("lr", "alpha") if name in params} == own
    (folder,) = (tmp_path / "out" / "state").glob("*/")
    expected = {
        "lr": PRESETS["recommended"].settings["lr"],
        "alpha": transferred_alpha(ModelSize(width=32, depth=3, rank=8)),
        "residual_scale": transferred_scale(ModelSize(width=32, depth=3, rank=8)),
        "residual_beta": 0.0,
        "residual_warmup": transferred_warmup(ModelSize(width=32, depth=3, rank=8)),
        **own,
    }
    (file,) = folder.glob("*optim_states.pt")
    groups = torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
    found = {tuple(group[name] for name in expected) for group in groups if "rank" in group}
    assert found == {tuple(expected.values())}


@pytest.mark.parametrize(
    ("config", "world_size", "given", "expected"),
    [
        ({"train_batch_size": 512, "train_micro_batch_size_per_gpu": 64}, 8, {}, (512, 64, 1)),
        ({"train_batch_size": 512, "train_micro_batch_size_per_gpu": 64}, 2, {}, (512, 64, 4)),
        ({"train_batch_size": 512, "train_micro_batch_size_per_gpu": 64}, 2, {"micro": 16}, (512, 16, 16)),
        ({"train_batch_size": 512, "train_micro_batch_size_per_gpu": 64}, 2, {"micro": 1, "total": 4}, (4, 1, 2)),
        ({"train_micro_batch_size_per_gpu": 8}, 3, {}, (24, 8, 1)),
        ({"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}, 3, {"micro": 4}, (24, 4, 2)),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 2}, 3, {}, (12, 2, 2)),
        ({}, 2, {"micro": 5}, (10, 5, 1)),
    ],
)
def test_batch_is_settled(config: dict, world_size: int, given: dict, expected: tuple[int, int, int]) -> None:
    """Every way of writing a batch down leads to the same three numbers."""
    settle_batch(config, world_size, **given)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(config[key] for key in keys) == expected


@pytest.mark.parametrize(
    ("config", "world_size", "given", "message"),
    [
        ({"train_batch_size": 512}, 3, {}, "512 sequences .* 3 processes: .* --total-batch-size 513"),
        (
            {"train_batch_size": 512, "train_micro_batch_size_per_gpu": 64},
            2,
            {"micro": 48},
            "micro-batches of 48 do not divide: pass --batch-size 32",
        ),
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3},
            2,
            {},
            "micro-batches of 4 times 3 accumulation steps do not make",
        ),
        ({"train_batch_size": 4, "train_micro_batch_size_per_gpu": 8}, 1, {}, "pass --batch-size 4"),
        ({"train_batch_size": 4, "gradient_accumulation_steps": 8}, 1, {}, "accumulation steps do not make"),
        ({}, 1, {}, "sets no batch size: pass --batch-size"),
        ({"train_batch_size": 0}, 1, {}, "train_batch_size = 0"),
    ],
)
def test_batch_that_cannot_be(config: dict, world_size: int, given: dict, message: str) -> None:
    """One sentence with the numbers and the remedy, where DeepSpeed would assert."""
    with pytest.raises(ValueError, match=message):
        settle_batch(config, world_size, **given)
