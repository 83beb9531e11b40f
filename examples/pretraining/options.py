"""Command line of the pre-training example."""

import argparse
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from ds_fira.checkpoint.tag_folder import find_complete
from ds_fira.optim.presets import PRESETS
from ds_fira.optim.registry import TYPES
from ds_fira.runtime.activation_checkpointing import METHODS as CHECKPOINTING
from ds_fira.tools import models

from .arguments import OneSentenceParser, positive
from .configs import ADAMW_LR, MONITORS, SHAPE_DEFAULTS, VOCAB_SIZE, build_deepspeed_config, build_model_config
from .data import BLOCK_ROWS
from .sources import find_files
from .text_data import STREAM_VALIDATION_TOKENS, STREAMING_BYTES, TOKENIZER_DOCUMENTS

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STATE = "state"  # folder of the training states in the output directory
WARMUP_SHARE = 0.1
MIN_LR_RATIO = 0.1


def build_parser() -> OneSentenceParser:
    """The options; those without a default here take it from the model shape or from the DeepSpeed JSON."""
    parser = OneSentenceParser(description="Pre-train a LLaMA with FiraAdam under DeepSpeed.", allow_abbrev=False)

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=models.NAMES, help="a LLaMA of the paper, instead of a shape")
    model.add_argument("--model-config", type=Path, help="JSON file of a transformers LlamaConfig, instead of a shape")
    model.add_argument("--hidden-size", type=positive, help=f"default {SHAPE_DEFAULTS['hidden_size']}")
    model.add_argument("--intermediate-size", type=positive, help="default 8/3 of the hidden size, in steps of 64")
    model.add_argument("--layers", type=positive, help=f"default {SHAPE_DEFAULTS['layers']}")
    model.add_argument("--heads", type=positive, help=f"default {SHAPE_DEFAULTS['heads']}")
    model.add_argument(
        "--activation-checkpointing",
        choices=CHECKPOINTING,
        help="recompute activations in the backward pass; none is faster, with more memory (default: deepspeed where "
        "the JSON has the block, otherwise transformers)",
    )

    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        "--text",
        metavar="SOURCE",
        help="a txt, csv, json, jsonl or parquet file, also .gz, a folder or glob of them, c4, or a hub's "
        "owner/name[:config] (default: the packaged reviews)",
    )
    text.add_argument("--text-column", default="text", help="column of the text (default text)")
    text.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        help="tokenise while training runs, instead of preparing the text as a whole (default: for a hub's text and "
        f"for more than {STREAMING_BYTES // 10**6} MB of files)",
    )
    text.add_argument(
        "--lanes", type=positive, help="parts of a stream, a multiple of the processes (default: one for each)"
    )
    text.add_argument(
        "--block-rows", type=positive, default=BLOCK_ROWS, help="sequences of a stream that are shuffled together"
    )
    text.add_argument(
        "--validation-data", metavar="SOURCE", help="as --data (default: its validation split, or documents held out)"
    )
    text.add_argument(
        "--validation-tokens",
        type=positive,
        help=f"(default {STREAM_VALIDATION_TOKENS:,} of a stream, all of a text prepared as a whole)",
    )
    text.add_argument(
        "--tokenizer",
        help="a hub's name, or a local folder, tokenizer.json or SentencePiece .model (default, or `train`: a "
        f"byte-level BPE is trained on the text, of a stream on its first {TOKENIZER_DOCUMENTS:,} documents)",
    )
    text.add_argument(
        "--vocab-size",
        type=positive,
        help=f"of the model (default {VOCAB_SIZE}, or as many as --tokenizer has, or the model config's)",
    )
    text.add_argument("--seq-length", type=positive, default=128)
    text.add_argument("--cache-dir", type=Path, default=REPOSITORY / "runs" / "cache", help="keeps prepared text")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive, default=450, help="optimizer steps")
    training.add_argument("--batch-size", type=positive, help="sequences per process and pass (default: the JSON's)")
    training.add_argument(
        "--total-batch-size", type=positive, help="sequences per step on all processes (default: the JSON's)"
    )
    training.add_argument("--warmup-steps", type=int, help="default a tenth of the steps")
    training.add_argument("--min-lr-ratio", type=float, help=f"where the cosine ends (default {MIN_LR_RATIO})")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--eval-every", type=positive, default=50, help="steps between validations")
    training.add_argument("--eval-batches", type=positive, default=8, help="per process; the last validation uses all")
    training.add_argument("--time-budget", type=float, help="seconds of training: a slow machine takes fewer steps")
    training.add_argument("--save-every", type=positive, help="steps between training states, for --resume")
    training.add_argument(
        "--keep-checkpoints",
        type=positive,
        metavar="N",
        help="delete all but the last N training states (default: keep all)",
    )
    training.add_argument(
        "--resume",
        nargs="?",
        const="last",
        choices=("last", "auto"),
        help="go on from the last complete state in the output directory; auto starts anew where there is none",
    )
    training.add_argument(
        "--timeout",
        type=positive,
        help="seconds to wait for a process that does not answer (default: DeepSpeed's, 600)",
    )

    optimizer = parser.add_argument_group("optimizer", "defaults come from the DeepSpeed JSON")
    optimizer.add_argument("--optimizer", choices=(*TYPES, "AdamW"))
    optimizer.add_argument("--lr", type=float, help=f"default the JSON's; for AdamW beside a FiraAdam JSON {ADAMW_LR}")
    optimizer.add_argument("--weight-decay", type=float)
    optimizer.add_argument("--rank", type=positive, help="of the projection")
    optimizer.add_argument("--alpha", type=float, help="scale of the projected update")
    optimizer.add_argument("--update-proj-gap", type=positive, help="steps between subspace refreshes")
    optimizer.add_argument("--gamma", type=float, help="largest growth of the residual norm from step to step")
    optimizer.add_argument(
        "--preset", choices=tuple(PRESETS), help="settings that transfer, such as lr and alpha, in place of the JSON's"
    )
    optimizer.add_argument("--target-modules", nargs="+", help="modules whose weights are projected")

    parser.add_argument("--deepspeed-config", type=Path, default=REPOSITORY / "ds_configs" / "zero2_bf16.json")
    parser.add_argument("--output-dir", type=Path, default=REPOSITORY / "runs" / "pretrain")
    parser.add_argument(
        "--monitors", nargs="+", choices=tuple(MONITORS), default=[], help="DeepSpeed's monitors to switch on"
    )
    parser.add_argument(
        "--report", action="store_true", help="a page of plots, report.html; switches the csv monitor on"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the memory it needs, and stop")
    parser.add_argument("--prompt", default="This movie", help="start of the generated sample")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="passed by the deepspeed launcher")
    return parser


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, LlamaConfig, dict[str, Any]]:
    """Read and check the command line; returns the options, the model and the DeepSpeed configuration.

    A contradiction or a missing file ends the process with one sentence and status 2. Nothing here communicates, so
    every process comes to the same end.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.tokenizer == "train":
        options.tokenizer = None  # over a recipe's
    if options.report:
        options.monitors = list(dict.fromkeys([*options.monitors, "csv"]))
    try:
        check_files(options)
        model_config = build_model_config(options)
        deepspeed_config = build_deepspeed_config(options)
        check_schedule(options, deepspeed_config)
    except ValueError as error:
        parser.error(str(error))
    return options, model_config, deepspeed_config


def check_files(options: argparse.Namespace) -> None:
    """Raise `ValueError` for a file or folder that cannot be used."""
    for source in (options.data, options.validation_data):
        if source is not None:
            find_files(source)
    if options.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {options.seed}")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        raise ValueError(f"--output-dir {options.output_dir} is a file")
    if options.keep_checkpoints is not None and options.save_every is None:
        raise ValueError(f"--keep-checkpoints {options.keep_checkpoints} keeps nothing without --save-every")
    if options.resume == "last" and find_complete(options.output_dir / STATE) is None:
        raise ValueError(
            f"--resume found no complete training state in {options.output_dir / STATE}: was --save-every set?"
        )


def check_schedule(options: argparse.Namespace, deepspeed_config: dict[str, Any]) -> None:
    """Fill in the schedule's defaults; raise `ValueError` where it cannot work."""
    if "scheduler" in deepspeed_config and (options.warmup_steps is not None or options.min_lr_ratio is not None):
        raise ValueError(
            f"--warmup-steps and --min-lr-ratio contradict the scheduler that {options.deepspeed_config} sets"
        )
    if options.warmup_steps is None:
        options.warmup_steps = round(options.steps * WARMUP_SHARE)
    if options.min_lr_ratio is None:
        options.min_lr_ratio = MIN_LR_RATIO
    if not 0 <= options.warmup_steps < options.steps:
        raise ValueError(f"--warmup-steps must be at least 0 and below --steps {options.steps}")
    if not 0 <= options.min_lr_ratio <= 1:
        raise ValueError(f"--min-lr-ratio must lie between 0 and 1, not at {options.min_lr_ratio}")
