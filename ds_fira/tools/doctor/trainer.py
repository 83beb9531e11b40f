"""What the Hugging Face Trainer puts in the place of "auto", by its own code and from its own arguments."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import nn

AUTO = "auto"
# Of these DeepSpeed drops the word, and takes its default.
DROPPED = "zero_optimization."


def places_of_auto(content: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """The dotted names of the settings that are "auto"."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from places_of_auto(value, f"{prefix}{key}.")
        elif value == AUTO:
            yield prefix + key


def filled(content: Mapping[str, object], module: nn.Module, gpus: int, given: Sequence[str]) -> dict[str, object]:
    """A config as the Trainer hands it to DeepSpeed.

    Args:
        content: of the file.
        module: the model, whose width decides ZeRO-3's buckets.
        gpus: ranks.
        given: arguments of the Trainer, `NAME=VALUE`.

    Raises:
        ValueError: an argument is not legal, or contradicts the file; one sentence.
    """
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)
    parser.set_defaults(use_cpu=not torch.cuda.is_available())
    pairs = [argument.partition("=") for argument in given]
    for name, equals, value in pairs:
        if not equals:
            raise ValueError(
                f"--trainer {name}{value} is no argument of the Trainer; give NAME=VALUE, as in bf16=true."
            )
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            arguments, unknown = parser.parse_args_into_dataclasses(
                [f"--{name}={value}" for name, _, value in pairs], return_remaining_strings=True
            )
        except SystemExit:
            wrong = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
            raise ValueError(f"--trainer {' '.join(given)} is not legal: {wrong}; give another value.") from None
    if unknown:
        raise ValueError(
            f"--trainer {unknown[0].removeprefix('--')} is no argument of the Trainer; give those of TrainingArguments."
        )
    # It takes the number of ranks from its launcher.
    arguments = SimpleNamespace(**vars(arguments), world_size=gpus, get_warmup_steps=arguments.get_warmup_steps)
    trainers = HfTrainerDeepSpeedConfig(copy.deepcopy(dict(content)))
    try:
        trainers.trainer_config_process(arguments)
        trainers.trainer_config_finalize(arguments, module, max(1, arguments.max_steps))
    except ValueError as error:
        raise ValueError(f"transformers: {' '.join(str(error).split())}") from None
    finally:
        unset_hf_deepspeed_config()
    return trainers.config
