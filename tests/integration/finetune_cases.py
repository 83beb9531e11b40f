"""A model of a few thousand parameters to fine-tune, its questions, and a recipe of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from examples.finetuning.choices import (
    question_of,
)
from examples.finetuning.tuning import Recipe
from examples.pretraining.tokenization import train_tokenizer
from tests.integration.finetune_jobs import record

ROOT = Path(__file__).resolve().parents[2]


SMALL = Recipe(
    rank=4, lora_alpha=8, lr=0.02, warmup_steps=1, batch_size=4, epochs=8, virtual_tokens=3, update_proj_gap=5
)


def write_folder(path: Path) -> Path:
    """Write a LLaMA of a few thousand parameters with its tokenizer, and files of questions beside it."""
    records = [record(number) for number in range(12)]
    texts = [question_of(one).head + one["instruction"] + one["output"] for one in records]
    tokenizer = train_tokenizer(texts * 3, 400)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "train.json").write_text(json.dumps(records))
    (path / "test.jsonl").write_text("\n".join(json.dumps(record(number)) for number in range(20, 25)))
    return path


def load(folder: Path) -> Any:
    """The model of `write_folder`."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager"
    )


def arguments(folder: Path, tmp_path: Path, **changes: Any) -> list[str]:
    """A command line of the script, in float32 with exact bases, four sequences a step."""
    config = json.loads((ROOT / "ds_configs" / "finetune_commonsense.json").read_text())
    del config["bf16"], config["data_types"]
    config |= {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1} | changes.pop("config", {})
    config["optimizer"]["params"] |= {"rank": 4, "lr": 0.02, "subspace": "svd", "refresh_moments": "keep"}
    config["optimizer"]["params"] |= changes.pop("params", {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    options = {
        "model": folder / "model",
        "train": folder / "train.json",
        "tests": folder / "test.jsonl",
        "deepspeed-config": path,
        "output-dir": tmp_path / "out",
        "epochs": 2,
        "warmup-steps": 1,
        "max-length": 128,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]
