"""From the options of the pre-training example to the model's and DeepSpeed's configurations."""

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from ds_fira.optim.presets import preset_rows
from ds_fira.optim.registry import TYPES
from ds_fira.optim.settings import check_params, legal_settings
from ds_fira.tools import models

from .batch import MICRO, TOTAL

# JSON parameter of FiraAdam -> option. A value given on the command line wins over the DeepSpeed JSON.
FIRA_PARAMS = ("rank", "alpha", "update_proj_gap", "gamma", "target_modules", "preset")
SHARED_PARAMS = ("lr", "weight_decay")
SHAPE_OPTIONS = ("hidden_size", "intermediate_size", "layers", "heads")
SHAPE_DEFAULTS = {"hidden_size": 128, "layers": 4, "heads": 4}
VOCAB_SIZE = 4096
MINIMAL_VOCAB_SIZE = 256 + 2
ADAMW_LR = 3e-3
# Monitor -> its block in a DeepSpeed JSON.
MONITORS = {"csv": "csv_monitor", "tensorboard": "tensorboard", "wandb": "wandb"}
MONITOR_FOLDER = "monitor"


def read_json(path: Path, option: str) -> dict[str, Any]:
    """The object in a JSON file that `option` named; raises `ValueError` with a sentence otherwise."""
    if not path.is_file():
        raise ValueError(f"{option} {path} does not exist")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{option} {path} holds no JSON object")
    return content


def build_model_config(options: argparse.Namespace) -> LlamaConfig:
    """The LLaMA to train, and `options.vocab_size` made to agree with it.

    `options.vocab_size` stays None where the vocabulary is to be that of `--tokenizer`, which is not open yet.
    """
    given = [name for name in SHAPE_OPTIONS if getattr(options, name) is not None]
    named = "--model" if options.model is not None else "--model-config"
    if options.model is not None:
        if options.model_config is not None:
            raise ValueError("--model and --model-config both name a model: leave one out")
        options.model_config = models.config_file(options.model)
    if options.model_config is None:
        shape = {name: getattr(options, name) or SHAPE_DEFAULTS.get(name) for name in SHAPE_OPTIONS}
        values = {
            "vocab_size": options.vocab_size or VOCAB_SIZE,
            "hidden_size": shape["hidden_size"],
            "intermediate_size": shape["intermediate_size"] or -(-shape["hidden_size"] * 8 // (3 * 64)) * 64,
            "num_hidden_layers": shape["layers"],
            "num_attention_heads": shape["heads"],
            "max_position_embeddings": options.seq_length,
        }
    else:
        if given:
            raise ValueError(f"{named} and --{given[0].replace('_', '-')} both set the shape of the model")
        values = read_json(options.model_config, "--model-config")
    try:
        config = LlamaConfig(**values)
    except StrictDataclassError as error:
        raise ValueError(f"this model cannot be built: {error.__cause__ or error}") from error

    if options.vocab_size not in (None, config.vocab_size):
        raise ValueError(f"--vocab-size {options.vocab_size} contradicts {config.vocab_size} of {named}")
    if options.tokenizer is None or options.model_config is not None:
        options.vocab_size = config.vocab_size
    if options.tokenizer is None and config.vocab_size < MINIMAL_VOCAB_SIZE:
        raise ValueError(
            f"a vocabulary of {config.vocab_size} cannot hold the 256 bytes and two marks of the tokenizer"
        )
    if options.seq_length > config.max_position_embeddings:
        positions = config.max_position_embeddings
        raise ValueError(f"--seq-length {options.seq_length} exceeds the {positions} positions of the model")
    if options.seq_length < 2:
        raise ValueError("--seq-length must be at least 2: the first token of a sequence is not predicted")
    config.use_cache = False  # of no use in training, and refused under activation checkpointing
    return config


def build_deepspeed_config(options: argparse.Namespace) -> dict[str, Any]:
    """The base JSON with the values of the command line over it."""
    config = read_json(options.deepspeed_config, "--deepspeed-config")
    if '"auto"' in json.dumps(config):
        raise ValueError(f'{options.deepspeed_config} holds "auto" values, for the Hugging Face Trainer only')
    # DeepSpeed clips at 1.0 when the JSON is silent; written out here, the summary shows it.
    config.setdefault("gradient_clipping", 1.0)
    if options.batch_size is None and options.total_batch_size is None and not {TOTAL, MICRO} & config.keys():
        raise ValueError(f"{options.deepspeed_config} sets no batch size: pass --batch-size")
    if options.activation_checkpointing not in (None, "deepspeed"):
        config.pop("activation_checkpointing", None)
    for name in options.monitors:
        # A block of the user's own keeps its settings.
        config[MONITORS[name]] = {
            "output_path": str(options.output_dir / MONITOR_FOLDER),
            "job_name": options.output_dir.name,
            **({"project": "ds_fira"} if name == "wandb" else {}),
            **config.get(MONITORS[name], {}),
            "enabled": True,
        }

    base = config.get("optimizer", {"type": "FiraAdam", "params": {}})
    params = dict(base.get("params", {}))
    options.optimizer = options.optimizer or base["type"]
    if options.optimizer not in (*TYPES, "AdamW"):
        raise ValueError(f"{options.deepspeed_config} names the optimizer {options.optimizer}: pass --optimizer")
    if options.optimizer == "AdamW":
        given = [name for name in FIRA_PARAMS if getattr(options, name) is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} belongs to FiraAdam and contradicts --optimizer AdamW")
        if base["type"] != "AdamW":
            params = {name: value for name, value in params.items() if name in ("betas", "eps", "weight_decay")}
            params["lr"] = ADAMW_LR
        params["torch_adam"] = True  # DeepSpeed's own Adam compiles a C++ or CUDA extension first
    elif base["type"] != options.optimizer:
        legal = legal_settings(TYPES[options.optimizer].algorithm)
        params = {name: value for name, value in params.items() if name in legal}
    # A preset on the command line replaces what the JSON says in its place; in the JSON, what stands beside it wins.
    params = {name: value for name, value in params.items() if name not in preset_rows(options.preset)}
    for name in (*SHARED_PARAMS, *FIRA_PARAMS):
        if getattr(options, name) is not None:
            params[name] = getattr(options, name)
    if options.optimizer in TYPES:
        check_params(params, algorithm=TYPES[options.optimizer].algorithm)
    config["optimizer"] = {"type": options.optimizer, "params": params}
    return config
