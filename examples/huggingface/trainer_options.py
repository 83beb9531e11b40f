"""Command line of the Trainer's example, checked against the DeepSpeed JSON that it names."""

# No `from __future__ import annotations`: HfArgumentParser reads the types of the dataclass.
import argparse
import dataclasses
from pathlib import Path
from typing import Literal, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import ds_fira.hf

from .common import REPOSITORY, check_fira

# Arguments of the Trainer that act through a value of the JSON, and do nothing where the JSON lacks it.
THROUGH_JSON = {
    "learning_rate": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "adam_beta1": "optimizer.params.betas",
    "adam_beta2": "optimizer.params.betas",
    "adam_epsilon": "optimizer.params.eps",
    "max_grad_norm": "gradient_clipping",
}


@dataclasses.dataclass
class Options:
    """What to train, and on which text."""

    model: str = dataclasses.field(
        default="llama_60m",
        metadata={"help": "a model of ds_fira.tools.models, a transformers config file, or a checkpoint to go on from"},
    )
    text: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "file, folder or glob of txt (a blank line ends a document), csv, jsonl, parquet (or reviews)"
        },
    )
    text_column: str = dataclasses.field(default="text", metadata={"help": "of csv, json, jsonl and parquet files"})
    weights: Literal["float32", "bfloat16"] = dataclasses.field(
        default="float32",
        metadata={"help": "of the model; bfloat16 goes with weight_rounding=stochastic in optim_args"},
    )
    seq_length: int = dataclasses.field(default=256, metadata={"help": "tokens in a row"})
    cache_dir: Path = dataclasses.field(default=REPOSITORY / "runs" / "cache", metadata={"help": "for prepared text"})


class Parser(HfArgumentParser):
    """Stops with one sentence, not with the pages of usage that `TrainingArguments` has."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(arguments: list[str] | None = None) -> tuple[Options, TrainingArguments]:
    """The command line, checked against the DeepSpeed JSON it names.

    Raises:
        ValueError: they contradict each other, or a file does not exist.
    """
    ds_fira.hf.register()
    by_name = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    by_name.add_argument("--optim")
    named = by_name.parse_known_args(arguments)[0].optim in ds_fira.hf.NAMES
    parser = Parser((Options, TrainingArguments), allow_abbrev=False)
    parser.set_defaults(
        deepspeed=None if named else str(REPOSITORY / "ds_configs" / "zero2_auto.json"),
        # Without a GPU the Trainer takes itself for one process, whatever the launcher, unless it is told.
        use_cpu=not torch.cuda.is_available(),
    )
    options, training = parser.parse_args_into_dataclasses(arguments)
    if training.deepspeed is not None and not named:
        check_against_json(training)
    if training.resume_from_checkpoint == "last":
        folder = Path(training.output_dir)
        training.resume_from_checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
        if training.resume_from_checkpoint is None:
            raise ValueError(f"--resume_from_checkpoint last found no checkpoint in {training.output_dir}.")
    return options, training


def check_against_json(training: TrainingArguments) -> None:
    """Raise a ValueError where arguments and the DeepSpeed JSON that names the optimizer contradict each other."""
    if training.hf_deepspeed_config.mismatches:
        differences = ", ".join(entry.removeprefix("- ") for entry in training.hf_deepspeed_config.mismatches)
        raise ValueError(f'{training.deepspeed} contradicts the arguments ({differences}); write "auto" there.')
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, key in THROUGH_JSON.items():
        value = getattr(training, name)
        if value != defaults[name] and training.hf_deepspeed_config.get_value(key) is None:
            raise ValueError(f'--{name} {value} does nothing, as {training.deepspeed} lacks {key}; add it as "auto".')
    for name in ("optim", "optim_args", "ddp_timeout"):
        value = getattr(training, name)
        if value != defaults[name]:
            instead = "DEEPSPEED_TIMEOUT in minutes" if name == "ddp_timeout" else f"it in {training.deepspeed}"
            raise ValueError(f"--{name} {getattr(value, 'value', value)} does nothing here; set {instead}.")
    check_fira(training.hf_deepspeed_config.config, training.deepspeed)
