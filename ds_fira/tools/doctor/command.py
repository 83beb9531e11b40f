"""`ds-fira doctor CONFIG --model M --gpus N`: what a training would do, before a GPU-hour is spent."""

from __future__ import annotations

import argparse
import json

from ds_fira.tools.commands import WRONG, Answer, add
from ds_fira.tools.doctor.examine import examine
from ds_fira.tools.doctor.text import diagnosis_json, diagnosis_lines
from ds_fira.tools.estimate.cards import CARDS, Available, card_memory
from ds_fira.tools.models import NAMES

EPILOG = """exit status:
  0  the training would start
  2  it would be refused, for the reasons listed, or the arguments are not legal

examples:
  ds-fira doctor ds_config.json --model llama_1b --gpus 8
  ds-fira doctor ds_config.json --model my_model/config.json --gpus 2 --gpu-memory a100-40 --seq-length 256
  ds-fira doctor zero3_auto --model llama_7b --gpus 8 --trainer bf16=true per_device_train_batch_size=4
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add(
        commands,
        "doctor",
        run,
        help="what a training with a DeepSpeed config would do, or be refused for",
        description="Goes through the start of a training for any number of ranks, without starting one.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a DeepSpeed config file, or a name of `ds-fira config --list`"
    )
    models = f"{', '.join(NAMES)}, a transformers config file or folder, or a hub id"
    parser.add_argument("--model", required=True, help=models)
    parser.add_argument("--gpus", type=int, required=True, help="data-parallel ranks")
    parser.add_argument("--seq-length", type=int, default=1024, help="tokens in a sequence (default %(default)s)")
    parser.add_argument("--gpu-memory", help=f"also ask whether it fits: GiB, or a card: {', '.join(CARDS)}")
    parser.add_argument(
        "--trainer",
        nargs="*",
        metavar="NAME=VALUE",
        help='fill in "auto" as the Hugging Face Trainer does with these arguments of its own',
    )
    parser.add_argument("--json", action="store_true", help="as JSON, in bytes")


def run(args: argparse.Namespace) -> Answer:
    """The diagnosis.

    Raises:
        ValueError: an argument is not legal; one sentence.
    """
    available = None if args.gpu_memory is None else Available(card_memory(args.gpu_memory))
    found = examine(args.config, args.model, args.gpus, args.trainer, args.seq_length, available)
    text = json.dumps(diagnosis_json(found), indent=1) if args.json else "\n".join(diagnosis_lines(found))
    return Answer(text, WRONG if found.refusals else 0)
