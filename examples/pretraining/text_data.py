"""Prepared text of the pre-training example: documents -> tokenizer -> full fixed-length sequences, cached on disk.

A small text is prepared as a whole. Of a stream only the tokenizer and the validation sequences are; its training
sequences are made while training runs (`streaming.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .documents import HELD_OUT_EVERY, DataError, Documents
from .progress import preparation_bar
from .sources import Source, open_source
from .tokenization import Encoder, check_vocabulary, fingerprint, load_tokenizer, needed_vocabulary, train_tokenizer

# Part of the cache key: raise it when the preparation below changes what it writes.
CACHE_VERSION = 2
STREAMING_BYTES = 200 * 10**6  # local text of more bytes on disk is streamed unless told otherwise
TOKENIZER_DOCUMENTS = 20_000  # of a stream, from its beginning, for a tokenizer trained on the spot
STREAM_VALIDATION_TOKENS = 10**7  # what the papers of GaLore and Fira evaluate on
ENCODE_BATCH = 1000  # documents


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """Everything that decides the content of the prepared data, and so the name of its cache folder."""

    text: str | Path | None  # as `open_source` takes it; None: the packaged reviews
    vocab_size: int | None  # of the model; None: as many as the tokenizer needs
    seq_length: int
    seed: int
    validation_share: float = 1 / HELD_OUT_EVERY  # of a text that is prepared as a whole
    validation_text: str | Path | None = None
    validation_tokens: int | None = None  # None: `STREAM_VALIDATION_TOKENS` of a stream, all of another text
    tokenizer: str | None = None  # as `load_tokenizer` takes it; None: trained on the text
    text_column: str = "text"
    streaming: bool | None = None  # None: a hub's text, and local ones above `STREAMING_BYTES`

    def open(self) -> Source:
        """The text, with `validation_text` for its validation split where there is one."""
        source = open_source(None if self.text is None else str(self.text), self.text_column)
        if self.validation_text is not None:
            other = open_source(str(self.validation_text), self.text_column)
            # Of a source with splits, its validation split is meant.
            documents = other.validation or other.train
            source = dataclasses.replace(source, validation=documents, key=(*source.key, "validation", *other.key))
        return source

    def streams(self, source: Source) -> bool:
        """Whether the text is streamed."""
        if self.streaming is not None:
            return self.streaming
        return source.size is None or source.size > STREAMING_BYTES

    def cache_name(self, source: Source, tokenizer: PreTrainedTokenizerBase | None) -> str:
        """A folder name that changes with the recipe, the source files, the tokenizer and the preparation code."""
        key = [CACHE_VERSION, *source.key, self.streams(source), fingerprint(tokenizer) if tokenizer else "trained"]
        key += [self.vocab_size, self.seq_length, self.seed, self.validation_share, self.validation_tokens]
        return "text-" + hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, slots=True)
class TextData:
    """Prepared data: `train` and `validation` hold rows `input_ids` of exactly `seq_length` tokens."""

    train: Dataset | None  # None of a stream
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase
    facts: dict  # source, documents, tokens and unigram_entropy (nats per token) of the two splits, and more

    @classmethod
    def load(cls, folder: Path) -> TextData:
        """Open what :func:`prepare` wrote."""
        train = folder / "train"
        return cls(
            train=load_from_disk(str(train)).with_format("torch") if train.exists() else None,
            validation=load_from_disk(str(folder / "validation")).with_format("torch"),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            facts=json.loads((folder / "facts.json").read_text()),
        )


def prepare(recipe: TextRecipe, cache: Path) -> Path:
    """Write the prepared data under `cache` unless it is already there, and return its folder.

    Call it on one process. The folder appears in one rename, so what lies there is complete, and two runs may prepare
    the same text at the same time.

    Raises:
        DataError: the text or the tokenizer cannot be used.
    """
    source = recipe.open()
    if source.left_out:
        print(f"Left out, for their names say test: {', '.join(source.left_out)}", flush=True)
    tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
    if tokenizer and recipe.vocab_size:
        check_vocabulary(tokenizer, recipe.vocab_size)
    folder = cache / recipe.cache_name(source, tokenizer)
    if folder.exists():
        return folder
    make = prepare_stream if recipe.streams(source) else prepare_whole
    packed, tokenizer, facts = make(recipe, source, tokenizer)
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", suffix=".partial", dir=cache))
    for name, rows in packed.items():
        Dataset.from_dict({"input_ids": rows}).save_to_disk(str(scratch / name))
    tokenizer.save_pretrained(scratch / "tokenizer")
    facts = {"source": source.name, **facts, "tokenizer": recipe.tokenizer or "trained on the text"}
    facts |= {"vocabulary": needed_vocabulary(tokenizer), "tokenizer_fingerprint": fingerprint(tokenizer)}
    (scratch / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(scratch)  # another run was faster
    return folder


def prepare_whole(
    recipe: TextRecipe, source: Source, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[dict[str, np.ndarray], PreTrainedTokenizerBase, dict[str, Any]]:
    """Rows of both splits of a text that fits into memory, the tokenizer, and facts."""
    # A dict keeps the order of the files, which the seeded split relies on. Reviews that occur twice are dropped.
    texts = list(with_bar(source.train.read_all(), "reading the text"))
    documents = Dataset.from_dict({"text": list(dict.fromkeys(texts)) if recipe.text is None else texts})
    if source.validation is not None:
        train, validation = documents, Dataset.from_dict({"text": list(source.validation.read_all())})
    else:
        if len(documents) < 2:
            raise DataError(
                f"{source.name} holds {len(documents)} documents, and at least two are needed: in a txt file a blank "
                'line ends a document; for one document a line, write a jsonl file of {"text": "..."}'
            )
        # Whole documents are held out, so that no review is seen in part during training.
        held_out = min(max(1, round(len(documents) * recipe.validation_share)), len(documents) - 1)
        splits = documents.train_test_split(test_size=held_out, seed=recipe.seed)
        train, validation = splits["train"], splits["test"]
    for name, split in (("training", train), ("validation", validation)):
        if len(split) == 0:
            raise DataError(f"the {name} split of {source.name} holds no documents")
    if tokenizer is None:
        tokenizer = trained(recipe, with_bar(iterate(train), "training the tokenizer", len(train)))
    packed = {}
    limits = {"train": None, "validation": recipe.validation_tokens}
    for name, split in (("train", train), ("validation", validation)):
        texts = with_bar(iterate(split), f"tokenising the {name} split", len(split))
        packed[name], _ = pack(texts, tokenizer, recipe.seq_length, limits[name])
        if len(packed[name]) == 0:
            raise DataError(f"the {name} split of {source.name} is shorter than one row of {recipe.seq_length} tokens")
    return (
        packed,
        tokenizer,
        {
            "streaming": False,
            "documents": {"train": len(train), "validation": len(validation)},
            "tokens": {name: rows.size for name, rows in packed.items()},
            "unigram_entropy": unigram_entropy(packed["train"], packed["validation"], len(tokenizer)),
        },
    )


def prepare_stream(
    recipe: TextRecipe, source: Source, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[dict[str, np.ndarray], PreTrainedTokenizerBase, dict[str, Any]]:
    """The validation rows of a stream, the tokenizer, and facts."""
    train, validation = stream_splits(source)
    beginning = list(with_bar(islice(train.read_all(), TOKENIZER_DOCUMENTS), "reading the beginning of the text"))
    if not beginning:
        raise DataError(f"{source.name} holds no documents for training")
    if tokenizer is None:
        tokenizer = trained(recipe, with_bar(beginning, "training the tokenizer", len(beginning)))
    limit = recipe.validation_tokens or STREAM_VALIDATION_TOKENS
    texts = with_bar(validation.read_all(), "tokenising the validation split")
    rows, documents = pack(texts, tokenizer, recipe.seq_length, limit)
    if len(rows) == 0:
        raise DataError(
            f"the validation split of {source.name} is shorter than one row of {recipe.seq_length} tokens: pass "
            "--validation-data"
        )
    sample, _ = pack(beginning, tokenizer, 1, limit)
    return (
        {"validation": rows},
        tokenizer,
        {
            "streaming": True,
            "files": len(train.files),
            "documents": {"train": None, "validation": documents},
            "tokens": {"train": None, "validation": rows.size},
            # Of a stream the frequencies of tokens are those at its beginning.
            "unigram_entropy": unigram_entropy(sample, rows, len(tokenizer)),
        },
    )


def stream_splits(source: Source) -> tuple[Documents, Documents]:
    """Training and validation documents of a stream: its own splits, or disjoint parts of the training text."""
    if source.validation is not None:
        return source.train, source.validation
    return dataclasses.replace(source.train, held_out=False), dataclasses.replace(source.train, held_out=True)


def trained(recipe: TextRecipe, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A tokenizer trained on `texts`, of the model's vocabulary."""
    if recipe.vocab_size is None:
        raise DataError("a tokenizer that is trained on the text needs a --vocab-size")
    return train_tokenizer(texts, recipe.vocab_size)


def with_bar(texts: Iterable[str], description: str, total: int | None = None) -> Iterator[str]:
    """`texts` under a progress bar."""
    with preparation_bar(description, total) as bar:
        for text in texts:
            yield text
            bar.update()


def iterate(documents: Dataset) -> Iterator[str]:
    """The texts of `documents`."""
    for start in range(0, len(documents), ENCODE_BATCH):
        yield from documents[start : start + ENCODE_BATCH]["text"]


def pack(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_length: int, limit: int | None = None
) -> tuple[np.ndarray, int]:
    """Documents, each opened by BOS and closed by EOS, end to end and cut into full rows.

    Args:
        texts: the documents.
        tokenizer: gives the tokens.
        seq_length: tokens of a row.
        limit: stop at so many tokens.

    Returns:
        int32 array of shape (sequences, seq_length), and the number of documents read; the less than `seq_length`
        tokens that do not fill a last row are dropped.
    """
    encoder, remaining = Encoder(tokenizer), iter(texts)
    pieces, tokens, documents = [], 0, 0
    while (limit is None or tokens < limit) and (batch := list(islice(remaining, ENCODE_BATCH))):
        pieces += encoder(batch)
        tokens += sum(map(len, pieces[documents:]))
        documents += len(batch)
    rows = (tokens if limit is None else min(tokens, limit)) // seq_length
    stream = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    return stream[: rows * seq_length].reshape(rows, seq_length), documents


def unigram_entropy(train: np.ndarray, validation: np.ndarray, vocab_size: int) -> float:
    """Nats per token that the training frequencies alone need for the validation tokens a model has to predict.

    The first token of a row is given, never predicted, and so left out. Counts start at one, so that a token the
    training split never saw keeps a finite cost.
    """
    counts = np.bincount(train.ravel(), minlength=vocab_size) + 1.0
    log_shares = np.log(counts / counts.sum())
    return float(-log_shares[validation[:, 1:].ravel()].mean())
