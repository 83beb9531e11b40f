"""What the two Hugging Face examples share: the model and its text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from pretraining.arguments import stop
from pretraining.data import agreed
from pretraining.documents import DataError
from pretraining.text_data import TextData, TextRecipe, prepare
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import TrainOutput

from ds_fira.checkpoint.atomic_save import CheckpointError
from ds_fira.optim.registry import TYPES
from ds_fira.optim.settings import check_params
from ds_fira.tools.models import NAMES, config_file

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def check_fira(config: dict[str, Any], source: Any) -> None:
    """Check the optimizer of a DeepSpeed config before anything is loaded.

    Args:
        config: the DeepSpeed config; values that are still "auto" are those that nobody fills in.
        source: where it comes from, for the message.

    Raises:
        ValueError: there is no optimizer, an "auto" is left, a setting of FiraAdam is wrong, or it has no rank.
    """
    optimizer = config.get("optimizer")
    if optimizer is None:
        raise ValueError(f'{source} has no optimizer; add "optimizer": {{"type": "FiraAdam", "params": {{...}}}}.')
    params = optimizer.get("params", {})
    for name, value in params.items():
        if value == "auto":
            raise ValueError(f'{source}: optimizer.params.{name} = "auto" is filled in by nobody; give a value.')
    if optimizer["type"] in TYPES:
        check_params(params, f"{optimizer['type']} in {source}", TYPES[optimizer["type"]].algorithm)
        if params.get("rank") is None:
            raise ValueError(
                f"{source}: optimizer.params.rank is missing, so nothing would be projected; add a rank, such as 128."
            )


def build_model(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, str | None]:
    """The model to train, and where its tokenizer is if it is a checkpoint.

    Args:
        name: a transformers config file or one of `ds_fira.tools.models.NAMES`, for a new model with random weights; or
            the folder or hub name of a checkpoint to go on from.
        dtype: of its weights.

    Raises:
        OSError: there is no such file, model or checkpoint.
        ValueError: the file holds no model that transformers knows.
    """
    # On a CPU the plain attention is faster in training than the fused kernel, whose backward is slow.
    options = {"dtype": dtype, "attn_implementation": "sdpa" if torch.cuda.is_available() else "eager"}
    if name in NAMES or name.endswith(".json"):
        path = config_file(name) if name in NAMES else Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"the model config {path} does not exist")
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), **options)
        return model, None
    return AutoModelForCausalLM.from_pretrained(name, **options), name


@dataclass(frozen=True, slots=True)
class Task:
    """A model, the rows `input_ids` it is trained and validated on, and the tokenizer that made them."""

    model: PreTrainedModel
    train: Dataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase


def load(
    name: str,
    text: str | None,
    seq_length: int,
    cache: Path,
    text_column: str = "text",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """The model and its text, which the first process prepares and caches while the others wait.

    Args:
        name: see `build_model`. A checkpoint brings its tokenizer; a new model gets one trained on the text.
        text: a file, folder or glob of txt, csv, json, jsonl or parquet files; None for the packaged reviews.
        seq_length: tokens in a row.
        cache: folder that keeps prepared text.
        text_column: column of the text in csv, json, jsonl and parquet files.
        dtype: of the model's weights.

    Raises:
        OSError: there is no such model.
        ValueError: the model or the text cannot be used; on every process, with the same sentence.
    """
    model, tokenizer = build_model(name, dtype)
    positions = getattr(model.config, "max_position_embeddings", seq_length)
    if seq_length > positions:
        raise ValueError(f"rows of {seq_length} tokens exceed the {positions} positions of the model")
    recipe = TextRecipe(
        text=text,
        vocab_size=model.config.vocab_size,
        seq_length=seq_length,
        seed=0,
        tokenizer=tokenizer,
        text_column=text_column,
    )

    def prepared() -> Path:
        try:
            if recipe.streams(recipe.open()):
                raise DataError(f"{text} is too large to be prepared as a whole; examples/pretrain_llama.py streams it")
            return prepare(recipe, cache)
        except DataError as error:  # which names the option as the pre-training example has it
            raise DataError(str(error).replace("--data", "--text")) from error

    data = TextData.load(agreed(prepared, only_first=True))
    # Generation stops at these; a new model's config has those of another tokenizer.
    model.config.bos_token_id, model.config.eos_token_id = data.tokenizer.bos_token_id, data.tokenizer.eos_token_id
    return Task(model, data.train, data.validation, data.tokenizer)


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch for a causal language model, which shifts the labels itself.

    Not `DataCollatorForLanguageModeling`: it takes every pad token out of the loss, and where the end-of-text token
    pads, as here, a model never learns to end.
    """
    ids = torch.stack([row["input_ids"] for row in rows]).long()
    return {"input_ids": ids, "labels": ids}


class Begun(TrainerCallback):
    """Notes that the Trainer has its engine and its checkpoint, and begins to train."""

    def __init__(self) -> None:
        self.noted = False

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Called by the Trainer."""
        self.noted = True


@contextlib.contextmanager
def refusals_stop(accelerator: Accelerator, begun: Begun | None = None) -> Iterator[None]:
    """Around the start of an engine: a setting or a checkpoint that it refuses ends the process, not with a traceback.

    Every rank gets the same refusal, and exits with its sentence and the status 2 of a wrong option, with which
    `launch/run.sh` starts nothing again.

    Args:
        accelerator: that builds the engine.
        begun: tells of a start inside that it is over; an error from then on is no refusal, and goes on.
    """
    try:
        yield
    except (ValueError, CheckpointError) as error:
        if begun is not None and begun.noted:
            raise
        accelerator.free_memory()  # ends the engine, where there is one that a checkpoint did not fit
        stop(str(error))


def train(trainer: Trainer) -> TrainOutput:
    """`trainer.train`, from the checkpoint that its arguments name; see `refusals_stop`."""
    begun = Begun()
    trainer.add_callback(begun)
    with refusals_stop(trainer.accelerator, begun):
        return trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
