"""Command line of the memory experiment."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from pretraining.arguments import OneSentenceParser, positive

from ds_fira.tools.models import NAMES

from .grid import OWN_MODELS, Run, model_config

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STAGES = ("0", "1", "2")


def build_parser(description: str | None) -> OneSentenceParser:
    """The options."""
    parser = OneSentenceParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join((*OWN_MODELS, *NAMES))
    parser.add_argument("--model", default=None, help=f"{known}, or a LLaMA's config file (default small)")
    parser.add_argument("--seq-length", type=positive, default=None, help="default 256")
    parser.add_argument("--micro-batch", type=positive, default=2, help="sequences of a rank in a step")
    parser.add_argument("--steps", type=positive, default=2, help="that are timed")
    parser.add_argument("--rank", type=positive, default=None, help="of FiraAdam (default a quarter of the width)")
    parser.add_argument(
        "--state-dtype", choices=("float32", "bfloat16", "int8"), default="float32", help="FiraAdam's, fp32 masters"
    )
    parser.add_argument("--method", choices=("transformers", "deepspeed"), default="transformers", help="checkpointing")
    parser.add_argument("--cpu-adam", action="store_true", help="AdamW under offload is DeepSpeedCPUAdam (compiles)")
    parser.add_argument("--ranks", type=positive, default=None, help="processes (default all GPUs, or 2 on a CPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one combination")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 64 tokens, one timed step")
    parser.add_argument("--output-dir", type=Path, default=REPOSITORY / "runs" / "memory_savings")
    grid = parser.add_argument_group("grid", "each option keeps some of its axis")
    grid.add_argument("--optimizers", nargs="+", choices=("AdamW", "FiraAdam"), default=["AdamW", "FiraAdam"])
    grid.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    grid.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    grid.add_argument("--offload", nargs="+", choices=("off", "on"), default=["off", "on"])
    grid.add_argument("--masters", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    return parser


def build_run(parser: OneSentenceParser, options: argparse.Namespace) -> Run:
    """What all cells share; a contradiction ends the program with one sentence."""
    gpus = torch.cuda.device_count()
    processes = options.ranks or gpus or 2
    if gpus and processes > gpus:
        parser.error(f"--ranks {processes} is more than the {gpus} GPUs here; give at most {gpus}")
    seq_length = options.seq_length or (64 if options.quick else 256)
    if seq_length < 2:
        parser.error("--seq-length must be at least 2: the first token of a sequence is not predicted")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"--output-dir {options.output_dir} is a file; name a folder")
    try:
        model = model_config(options.model or ("tiny" if options.quick else "small"), seq_length)
    except ValueError as error:
        parser.error(str(error))
    return Run(
        model=model,
        seq_length=seq_length,
        micro_batch=options.micro_batch,
        steps=1 if options.quick else options.steps,
        rank=options.rank or max(1, model.get("hidden_size", 4096) // 4),
        state_dtype=options.state_dtype,
        method=options.method,
        cpu_adam=options.cpu_adam,
        processes=processes,
        seed=options.seed,
    )
