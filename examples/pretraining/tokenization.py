"""Tokenizers of the pre-training example: a hub's, a local one, or one trained on the spot."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import transformers
from huggingface_hub import HfApi
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .documents import DataError, first_line
from .sources import HUB_TIMEOUT, check_hub

BOS, EOS = "<s>", "</s>"
# Marks of the end and the start of a text in a tokenizer.json, which does not say what they are for.
COMMON_EOS = (EOS, "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>")
COMMON_BOS = (BOS, "<|begin_of_text|>", "<bos>", "[BOS]")
# A model whose vocabulary exceeds the tokenizer's by this factor spends memory on rows that are never used.
SPARE_VOCABULARY = 1.5


class Encoder:
    """Texts to token ids, each text opened by BOS, where the tokenizer has one, and closed by EOS.

    Words of the text that look like special tokens are encoded as ordinary text, so that text alone never yields a
    special id, and neither truncation nor padding that a tokenizer brings along is applied.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # A copy: the tokenizer itself is saved beside the model as it came.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._closing = [tokenizer.eos_token_id]

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 of shape (tokens,)."""
        # The fast path skips the character offsets, half of the time that encoding takes.
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*self._opening, *encoding.ids, *self._closing], dtype=np.int32) for encoding in encodings]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, a local `tokenizer.json` or SentencePiece `.model` file, or a hub's repository.

    Raises:
        DataError: there is none, it cannot be opened, or it has no end-of-sequence token.
    """
    path = Path(name)
    try:
        if path.is_file():
            tokenizer = _from_file(path)
        elif path.is_dir():
            tokenizer = _from_folder(path)
        elif path.suffix in (".json", ".model") or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise DataError(f"--tokenizer {name} does not exist")
        else:
            tokenizer = _from_hub(name)
    except DataError:
        raise
    except Exception as error:  # of tokenizers (a bare Exception), sentencepiece, json, transformers
        raise DataError(f"--tokenizer {name} cannot be opened: {first_line(error)}") from error
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise DataError(
            f"--tokenizer {name} is a {type(tokenizer).__name__}, which has no fast version: save one as tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(f"--tokenizer {name} has no end-of-sequence token, which closes every document: set eos_token")
    if len(tokenizer) - len(_special_ids(tokenizer)) < 2:
        raise DataError(f"--tokenizer {name} holds no vocabulary, only {len(tokenizer)} special tokens")
    return tokenizer


def _from_file(path: Path) -> PreTrainedTokenizerBase:
    if (path.parent / "tokenizer_config.json").is_file() and path.name in ("tokenizer.json", "tokenizer.model"):
        return AutoTokenizer.from_pretrained(path.parent)
    if path.suffix == ".model":
        with tempfile.TemporaryDirectory() as folder:
            # The class looks for this very name.
            shutil.copyfile(path, Path(folder) / "tokenizer.model")
            return LlamaTokenizer.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    known = tokenizer.get_vocab()
    for role, names in (("bos_token", COMMON_BOS), ("eos_token", COMMON_EOS)):
        found = next((mark for mark in names if mark in known), None)
        if getattr(tokenizer, role) is None and found is not None:
            setattr(tokenizer, role, found)
    return tokenizer


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer_config.json").is_file():
        for file in ("tokenizer.json", "tokenizer.model"):
            if (folder / file).is_file():
                return _from_file(folder / file)
    return AutoTokenizer.from_pretrained(folder)


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    try:
        # What was downloaded before needs no hub, and none of its waiting.
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:
        check_hub(
            lambda: HfApi().model_info(name, timeout=HUB_TIMEOUT),
            what=f"--tokenizer {name}",
            remedy="pass a local folder, tokenizer.json or .model file as --tokenizer, or leave it out to train one on "
            "the text",
        )
    return AutoTokenizer.from_pretrained(name)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens learned from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A name that changes with what the tokenizer makes of a text."""
    content = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.bos_token_id), str(tokenizer.eos_token_id)]
    return hashlib.sha256("\n".join([*content, transformers.__version__.split(".")[0]]).encode()).hexdigest()[:16]


def needed_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """The smallest model vocabulary that holds every id a text can yield, and BOS and EOS.

    Special tokens beside those two do not count: text never yields them (t5-base has 100 beyond its 32,000).
    """
    special = _special_ids(tokenizer) - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return max(index for index in tokenizer.get_vocab().values() if index not in special) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str | None:
    """Whether a model of `vocab_size` fits the tokenizer; returns a warning where it is much too large.

    Raises:
        DataError: it is too small.
    """
    needed = needed_vocabulary(tokenizer)
    if needed > vocab_size:
        raise DataError(
            f"the tokenizer yields ids up to {needed - 1} and the model's vocabulary has {vocab_size} entries: set "
            f"--vocab-size {needed}, or vocab_size in --model-config, or take another --tokenizer"
        )
    if vocab_size > SPARE_VOCABULARY * needed:
        return f"the model's vocabulary has {vocab_size} entries, of which the tokenizer uses {needed}"
    return None


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {index for index, token in added.items() if token.special}
