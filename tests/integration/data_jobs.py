"""What the tests of the example's data make and run: corpora in C4's layout, and jobs of several ranks."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import random
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from pretraining.data import open_data
from pretraining.documents import DataError, Documents
from pretraining.sources import open_files
from pretraining.text_data import TOKENIZER_DOCUMENTS, TextRecipe

CUT_SHORT = "Compressed file ended before the end-of-stream marker was reached"
WORDS = ["the", "state", "of", "matrices", "under", "low", "rank", "gradients", "moves", "slowly", "é", "数", "\n"]


def texts(count: int, seed: int, longest: int = 60) -> list[str]:
    """Random documents of very different lengths, each opened by a word of its own."""
    generator = random.Random(seed)
    return [
        f"doc{seed}x{number} " + " ".join(generator.choices(WORDS, k=generator.randint(0, longest)))
        for number in range(count)
    ]


def write_c4(folder: Path, sizes: list[int], validation: int = 12, longest: int = 60) -> list[list[str]]:
    """A folder in C4's layout.

    Args:
        folder: made where it is missing.
        sizes: documents of each training file.
        validation: documents of the validation file; none for 0.
        longest: words of a document.

    Returns:
        The texts of each training file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = [texts(size, seed, longest) for seed, size in enumerate(sizes)]
    names = [f"c4-train.{index:05d}-of-{len(sizes):05d}.json.gz" for index in range(len(sizes))]
    for name, documents in [*zip(names, content, strict=True), ("c4-validation.00000-of-00001.json.gz", None)]:
        documents = texts(validation, 1000, longest) if documents is None else documents
        if documents:
            with gzip.open(folder / name, "wt", encoding="utf-8") as file:
                for number, text in enumerate(documents):
                    row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"http://example.com/{number}"}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return content


def write_broken(folder: Path) -> tuple[int, Path]:
    """A folder in C4's layout, of which the file that breaks off is met in training, by rank 1 of 2, and not before.

    Returns:
        The seed for which that holds, and the file.
    """
    # The preparation looks at the first file alone; the broken one is the second that rank 1 comes to.
    orders = (np.random.default_rng([seed, 0]).permutation(4).tolist() for seed in range(100))
    seed, order = next((seed, order) for seed, order in enumerate(orders) if 0 in (order[0], order[2]))
    write_c4(folder, [TOKENIZER_DOCUMENTS + 300, 300, 300, 300], longest=2)
    broken = folder / f"c4-train.{order[3]:05d}-of-00004.json.gz"
    broken.write_bytes(broken.read_bytes()[:-100])
    return seed, broken


def c4_files(folder: Path) -> Documents:
    """The training documents of `write_c4`."""
    return open_files(sorted(folder.glob("c4-train.*")))


def message(call: Callable[[], Any]) -> str | None:
    """The sentence of the `DataError` that a call ends in, None where it ends well."""
    try:
        call()
    except DataError as error:
        return str(error)
    return None


def open_message(cache: Path, **recipe: Any) -> str | None:
    """The sentence that this rank gets for data it cannot use."""
    return message(lambda: open_data(text_recipe(**recipe), cache))


def text_recipe(**settings: Any) -> TextRecipe:
    """A recipe of short rows and a small vocabulary."""
    return TextRecipe(**{"vocab_size": 300, "seq_length": 16, "seed": 0, **settings})


def batches(
    cache: Path,
    count: int,
    batch_size: int,
    micro_steps: int = 1,
    state: dict[str, Any] | None = None,
    save_at: int | None = None,
    lanes: int | None = None,
    block_rows: int = 8,
    **recipe: Any,
) -> dict[str, Any]:
    """Batches of this rank, as lists, from the start or from a state; `state` is what `state_dict` said at `save_at`.

    `error` is the sentence that ended them early, None where none did.
    """
    multiprocessing.current_process().daemon = False  # a rank of the tests' pool may have a worker, as a user's may
    data = open_data(text_recipe(**recipe), cache, lanes=lanes, block_rows=block_rows)
    result: dict[str, Any] = {"batches": [], "state": None, "error": None, "facts": data.facts}
    try:
        if state is not None:
            data.load_state_dict(json.loads(json.dumps(state)))
        data.start(batch_size, micro_steps)
        for index, batch in enumerate(islice(data.batches(), count), start=1):
            result["batches"].append(batch.tolist())
            if index == save_at:
                result["state"] = data.state_dict()
        result["validation"] = [batch.tolist() for batch in data.validation_batches()]
    except DataError as error:
        result["error"] = str(error)
    finally:
        data.close()
    return result
