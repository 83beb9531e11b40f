"""What the two Hugging Face examples share: the model, its text, and an end in one sentence on every rank."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import datasets
import deepspeed.comm as dist
import torch
from datasets.fingerprint import Hasher
from pretraining.text_data import TextData, TextRecipe, prepare
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import ds_fira
from ds_fira.models import NAMES, config_file
from ds_fira.settings import check_params

REPOSITORY = Path(__file__).resolve().parent.parent


def stop(sentence: str) -> NoReturn:
    """End every process in good order with one sentence; for errors that all of them know of."""
    ds_fira.shutdown()
    sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(sentence.split())}")


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
    if optimizer["type"] == "FiraAdam":
        check_params(params, f"FiraAdam in {source}")
        if params.get("rank") is None:
            raise ValueError(
                f"{source}: optimizer.params.rank is missing, so FiraAdam would project nothing and be AdamW; "
                "add a rank, such as 128."
            )


def build_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model to train, in float32, and its tokenizer where it is a checkpoint.

    Args:
        name: a transformers config file or one of `ds_fira.models.NAMES`, for a new model with random weights; or the
            folder or hub name of a checkpoint to go on from.

    Raises:
        OSError: there is no such file, model or checkpoint.
        ValueError: the file holds no model that transformers knows.
    """
    # On a CPU the plain attention is faster in training than the fused kernel, whose backward is slow.
    options = {"attn_implementation": "sdpa" if torch.cuda.is_available() else "eager"}
    if name in NAMES or name.endswith(".json"):
        path = config_file(name) if name in NAMES else Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"the model config {path} does not exist")
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), **options)
        return model, None
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(name)


@dataclass(frozen=True, slots=True)
class Task:
    """A model, the rows `input_ids` it is trained and validated on, and the tokenizer that made them."""

    model: PreTrainedModel
    train: datasets.Dataset
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase


def load(name: str, text: Path | None, seq_length: int, cache: Path) -> Task:
    """The model and its text, which the first process prepares and caches while the others wait.

    Args:
        name: see `build_model`. A new model gets a tokenizer of its vocabulary's size, trained on the text.
        text: a txt, csv, json, jsonl or parquet file; None for the packaged reviews.
        seq_length: tokens in a row.
        cache: folder that keeps prepared text.

    Raises:
        OSError: there is no such model.
        ValueError: the model or the text cannot be used; on every process, with the same sentence.
    """
    model, tokenizer = build_model(name)
    outcome: list[Any] = [None, None]  # folder, error
    if dist.get_rank() == 0:
        try:
            positions = getattr(model.config, "max_position_embeddings", seq_length)
            if seq_length > positions:
                raise ValueError(f"rows of {seq_length} tokens exceed the {positions} positions of the model")
            if tokenizer is None:
                vocab_size = model.config.vocab_size
                recipe = TextRecipe(text=text, vocab_size=vocab_size, seq_length=seq_length, seed=0)
                outcome[0] = str(prepare(recipe, cache))
            else:
                outcome[0] = str(pack(text, tokenizer, seq_length, cache))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    folder, error = outcome
    if error is not None:
        raise ValueError(error)
    if tokenizer is None:
        data = TextData.load(Path(folder))
        # Generation stops at these; the config's own belong to another tokenizer.
        model.config.bos_token_id, model.config.eos_token_id = data.tokenizer.bos_token_id, data.tokenizer.eos_token_id
        return Task(model, data.train, data.validation, data.tokenizer)
    splits = datasets.load_from_disk(folder).with_format("torch")
    return Task(model, splits["train"], splits["test"], tokenizer)


def pack(text: Path | None, tokenizer: PreTrainedTokenizerBase, seq_length: int, cache: Path) -> Path:
    """Cut documents, in the tokens of a checkpoint, into full rows; returns the folder they are in.

    Raises:
        ValueError: there is no text, too little of it, or no end-of-text token to close a document with.
        FileNotFoundError: the file does not exist.
    """
    if text is None:
        raise ValueError("a checkpoint to go on from needs --text with the text to train it on")
    if not text.is_file():
        raise FileNotFoundError(f"the text file {text} does not exist")
    if tokenizer.eos_token_id is None:
        raise ValueError("the checkpoint's tokenizer has no eos_token, which closes a document")
    key = Hasher.hash([str(text.resolve()), text.stat().st_mtime_ns, tokenizer.get_vocab(), seq_length])
    folder = cache / f"packed-{key}"
    if folder.exists():
        return folder
    # The ending of the file's name tells `datasets` how to read it; the paragraphs of a txt file are its documents.
    options = {"sample_by": "paragraph"} if text.suffix == ".txt" else {}
    documents = datasets.load_dataset(
        str(text.parent), data_files=text.name, split="train", cache_dir=str(cache), **options
    )

    def rows(batch: dict[str, list]) -> dict[str, list]:
        tokenized = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        stream = [token for ids in tokenized for token in [*ids, tokenizer.eos_token_id]]
        return {"input_ids": [stream[i : i + seq_length] for i in range(0, len(stream) - seq_length + 1, seq_length)]}

    splits = documents.train_test_split(test_size=0.01, seed=0)
    packed = splits.map(rows, batched=True, remove_columns=documents.column_names)
    for name, split in packed.items():
        if len(split) == 0:
            raise ValueError(f"the {name} split of {text} is shorter than {seq_length} tokens")
    packed.save_to_disk(str(folder))
    return folder


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch for a causal language model, which shifts the labels itself.

    Not `DataCollatorForLanguageModeling`: it takes every pad token out of the loss, and where the end-of-text token
    pads, as here, a model never learns to end.
    """
    ids = torch.stack([row["input_ids"] for row in rows]).long()
    return {"input_ids": ids, "labels": ids}
