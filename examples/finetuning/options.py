"""Command line of the fine-tuning example, and the recipe, DeepSpeed config and model that it asks for."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from pretraining.arguments import OneSentenceParser, positive
from pretraining.batch import TOTAL, settle_batch
from pretraining.configs import read_json

import ds_fira

from .tuning import METHODS, Recipe, optimizer_block, prepare

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def build_parser() -> OneSentenceParser:
    """The options; the defaults are the paper's."""
    recipe = Recipe()
    parser = OneSentenceParser(description="Fine-tune a LLaMA on commonsense questions.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder or hub name of a pre-trained model with its tokenizer")
    parser.add_argument("--train", required=True, nargs="+", type=Path, help="JSON or JSONL files to train on")
    parser.add_argument("--tests", nargs="*", type=Path, default=[], help="JSON or JSONL files of questions to answer")
    parser.add_argument("--method", choices=METHODS, default="fira")
    parser.add_argument("--lr", type=float, help=f"for fira default the JSON's, otherwise {recipe.lr}")
    parser.add_argument("--epochs", type=positive, default=recipe.epochs)
    parser.add_argument("--warmup-steps", type=int, default=recipe.warmup_steps)
    parser.add_argument("--max-length", type=positive, default=recipe.max_length, help="tokens of prompt and response")
    parser.add_argument("--batch-size", type=positive, help="sequences per process and pass (default the JSON's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--activation-checkpointing", action="store_true", help="less memory, for a third more time")
    parser.add_argument(
        "--deepspeed-config", type=Path, default=REPOSITORY / "ds_configs" / "finetune_commonsense.json"
    )
    parser.add_argument("--output-dir", type=Path, default=REPOSITORY / "runs" / "commonsense")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="passed by the deepspeed launcher")
    return parser


def settle(options: argparse.Namespace, world_size: int) -> tuple[Recipe, dict[str, object]]:
    """The recipe and the DeepSpeed config that the options ask for.

    Raises:
        ValueError: the config cannot be read, has no FiraAdam, sets a schedule, or its batch does not divide.
    """
    config = read_json(options.deepspeed_config, "--deepspeed-config")
    params = config.get("optimizer", {}).get("params", {})
    if "scheduler" in config:
        raise ValueError(
            f"{options.deepspeed_config} sets a scheduler, but the recipe's depends on the data: remove it"
        )
    if config.get("optimizer", {}).get("type") != "FiraAdam" or not {"lr", "rank"} <= params.keys():
        raise ValueError(
            f"{options.deepspeed_config} has no optimizer FiraAdam with lr and rank, which this recipe trains with"
        )
    if options.method == "prefix" and options.activation_checkpointing:
        raise ValueError("--method prefix does not go with --activation-checkpointing, which drops peft's prefix cache")
    settle_batch(config, world_size, micro=options.batch_size)
    recipe = Recipe(
        lr=options.lr if options.lr is not None else params["lr"] if options.method == "fira" else Recipe().lr,
        epochs=options.epochs,
        warmup_steps=options.warmup_steps,
        max_length=options.max_length,
        batch_size=config[TOTAL],
    )
    if options.method == "fira":
        params["lr"] = recipe.lr
    else:
        config["optimizer"] = optimizer_block(options.method, recipe)
    return recipe, config


def load_model(options: argparse.Namespace, config: dict[str, object], recipe: Recipe) -> torch.nn.Module:
    """The model to train, in the dtype that the engine computes in.

    Raises:
        OSError: there is no such model.
        ValueError: it is no model that transformers knows, or lacks the projections.
    """
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((low[name] for name in low if config.get(name, {}).get("enabled")), torch.float32)
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation=attention)
    model = prepare(model, options.method, recipe)
    if options.activation_checkpointing or "activation_checkpointing" in config:
        ds_fira.checkpoint_activations(model, config)
    return model
