"""`ds-fira estimate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

from ds_fira.core.setting_fields import meaning_of
from ds_fira.optim.settings import Settings
from ds_fira.tools.commands import Answer
from ds_fira.tools.commands import add as add_command
from ds_fira.tools.estimate.cards import CARDS, Available, card_memory
from ds_fira.tools.estimate.compute import Estimate, estimate
from ds_fira.tools.estimate.methods import COMPARED, METHODS
from ds_fira.tools.estimate.paper_report import paper_json, paper_lines
from ds_fira.tools.estimate.setup import DTYPES, MASTERS, REDUCE_BUCKET_SIZE, Setup
from ds_fira.tools.estimate.table import estimate_json, estimate_lines
from ds_fira.tools.models import NAMES

# Settings of FiraAdam that shape its states, and how a command line gives them; None for one of a few words.
SETTINGS: dict[str, dict[str, object] | None] = {
    "rank": {"type": int},
    "target_modules": {"nargs": "+"},
    "proj_type": None,
    "formulation": None,
    "state_dtype": None,
    "project_full_rank": {"action": "store_true"},
    "max_group_bytes": {"type": int},
}
EXAMPLES = """examples:
  ds-fira estimate --model llama_1b --rank 512 --gpus 8 --zero-stage 2 --gpu-memory a100-40
  ds-fira estimate --model my_model/config.json --rank 128 --dtype bf16 --offload --json estimate.json
  ds-fira estimate --model llama_7b --rank 256 --state-dtype int8 --zero-stage 0 --master-weights none \\
      --step-in-backward --activation-checkpointing --gpu-memory rtx4090
  ds-fira estimate --paper
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command to argparse's `commands`."""
    parser = add_command(
        commands,
        "estimate",
        run,
        help="memory per GPU of AdamW, GaLore, LoRA and Fira, before training",
        description="Bytes per GPU by category, for AdamW, GaLore, LoRA and Fira under ZeRO 0, 1 or 2, at one rank.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--paper", action="store_true", help="print the paper's Table 2 beside its formula's instead")
    add("--model", help=f"{', '.join(NAMES)}, a transformers config file or folder, or a hub id")
    for name, kind in SETTINGS.items():
        field = Settings.model_fields[name]
        kind = kind or {"choices": get_args(field.annotation)}
        add(f"--{name.replace('_', '-')}", default=field.default, help=meaning_of(field), **kind)
    add("--zero-stage", type=int, default=2, help="0, 1 or 2 (default %(default)s)")
    add("--gpus", type=int, default=1, help="data-parallel ranks (default %(default)s)")
    add("--dtype", choices=list(DTYPES), default="bf16", help="of weights and gradients (default %(default)s)")
    add(
        "--master-weights",
        choices=MASTERS,
        default="fp32",
        help="default %(default)s; at stage 0 in fp32 there are none",
    )
    add("--accumulation-dtype", choices=list(DTYPES), help="data_types.grad_accum_dtype; default --dtype")
    add("--offload", action="store_true", help="optimizer states and master weights on the host")
    add("--reduce-bucket-size", type=int, default=REDUCE_BUCKET_SIZE, help="elements (default %(default)s)")
    add("--overlap-comm", action="store_true", help="two reduce buckets")
    add("--batch-size", type=int, default=1, help="sequences in a micro-batch (default %(default)s)")
    add("--seq-length", type=int, default=1024, help="tokens in a sequence (default %(default)s)")
    add("--activation-checkpointing", action="store_true")
    add(
        "--step-in-backward",
        action="store_true",
        help="without DeepSpeed, by ds_fira.step_in_backward; with --zero-stage 0 --master-weights none",
    )
    add("--methods", nargs="+", choices=METHODS, default=list(COMPARED), help="default: %(default)s")
    add("--gpu-memory", help=f"GiB, or a card: {', '.join(CARDS)}")
    add("--json", type=Path, metavar="FILE", help="also write everything in bytes to this file")


def run(args: argparse.Namespace) -> Answer:
    """The estimate.

    Raises:
        ValueError: an argument is not legal; one sentence.
    """
    found, available = (None, None) if args.paper else _estimate(args)
    if args.json is not None:
        numbers = paper_json() if found is None else estimate_json(found, available)
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(numbers, indent=1) + "\n")
        except OSError as error:
            raise ValueError(
                f"--json = {str(args.json)!r} cannot be written ({error.strerror}); give another file."
            ) from None
    return Answer("\n".join(paper_lines() if found is None else estimate_lines(found, available)))


def _estimate(args: argparse.Namespace) -> tuple[Estimate, Available | None]:
    if args.model is None:
        raise ValueError(
            f"--model is missing; give one of {', '.join(NAMES)}, a config file or a hub id, or use --paper."
        )
    available = None if args.gpu_memory is None else Available(card_memory(args.gpu_memory))
    setup = Setup(**{name: getattr(args, name) for name in Setup.__dataclass_fields__})
    params = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    return estimate(args.model, setup, args.methods, **params), available
