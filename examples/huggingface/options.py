"""Command line of the accelerate example, and the DeepSpeed config that it asks for."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from .common import REPOSITORY, check_fira

LAUNCHED_CONFIG = "ACCELERATE_DEEPSPEED_CONFIG_FILE"  # set by `accelerate launch`


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train with accelerate and FiraAdam.", allow_abbrev=False)
    parser.add_argument("--model", default="llama_60m", help="name in ds_fira.tools.models, config file or checkpoint")
    parser.add_argument(
        "--text", help="file, folder or glob of txt, csv, json, jsonl, parquet (default: the packaged reviews)"
    )
    parser.add_argument("--text-column", default="text", help="of csv, json, jsonl and parquet files")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--deepspeed-config", type=Path, help="JSON, without a config file of `accelerate launch`")
    parser.add_argument("--batch-size", type=int, help='per process, where the JSON says "auto"')
    parser.add_argument("--lr", type=float, help='where the JSON says "auto"')
    parser.add_argument("--weight-decay", type=float, help='where the JSON says "auto"')
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, help="steps between states in OUTPUT_DIR/step_N")
    parser.add_argument("--resume", type=Path, help="a folder step_N to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=REPOSITORY / "runs" / "accelerate")
    parser.add_argument("--cache-dir", type=Path, default=REPOSITORY / "runs" / "cache")
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher")
    return parser.parse_args(arguments)


def filled_config(options: argparse.Namespace) -> dict[str, object]:
    """The DeepSpeed config, "auto" values filled in from the options.

    Raises:
        ValueError: it is missing, named twice, contradicted by an option, or wrong.
    """
    launched = os.environ.get(LAUNCHED_CONFIG)
    if launched is not None and options.deepspeed_config is not None:
        raise ValueError(
            f"--deepspeed-config {options.deepspeed_config} contradicts {launched} of `accelerate launch`; give one."
        )
    source = Path(launched or options.deepspeed_config or REPOSITORY / "ds_configs" / "zero2_bf16.json")
    for path in (source, options.resume):
        if path is not None and not path.exists():
            raise ValueError(f"{path} does not exist.")
    config = json.loads(source.read_text())
    params = config.get("optimizer", {}).get("params", {})
    for block, key, option in (
        (params, "lr", "lr"),
        (params, "weight_decay", "weight_decay"),
        (config, "train_micro_batch_size_per_gpu", "batch_size"),
    ):
        value, flag = getattr(options, option), "--" + option.replace("_", "-")
        if block.get(key) == "auto":
            if value is None:
                raise ValueError(f'{source} has "auto" for {key}; give {flag}.')
            block[key] = value
        elif value is not None:
            raise ValueError(f'{flag} {value} contradicts {key} = {block.get(key)} in {source}; write "auto" there.')
    check_fira(config, source)
    return config
