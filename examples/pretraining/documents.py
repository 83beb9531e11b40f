"""Documents of an ordered list of files, read one file at a time through the streaming side of `datasets`.

So a position in the text is two integers, file and document, and an error names its file; a data set of all files tells
neither which file a document came from nor where in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import datasets

# One document in so many is held out for validation where a stream brings no validation split.
HELD_OUT_EVERY = 100
READ_BATCH = 256  # documents


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence for the user."""


def is_held_out(file: int, document: int) -> bool:
    """Whether a document of the training text belongs to validation; one in `HELD_OUT_EVERY`, and the very first."""
    return (file + document) % HELD_OUT_EVERY == 0


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of an ordered list of files.

    Attributes:
        files: their names, for messages and for `len`.
        parts: consecutive runs of `files` as iterable data sets; each has one shard per file.
        column: the column that holds the text.
        held_out: None to read every document, True for the ones that `is_held_out` names, False for the others.
        only: a column and the value that rows must have in it.
        clean: applied to each text.
    """

    files: tuple[str, ...]
    parts: tuple[datasets.IterableDataset, ...]
    column: str = "text"
    held_out: bool | None = None
    only: tuple[str, str] | None = None
    clean: Callable[[str], str] | None = None

    def read(self, file: int, start: int = 0) -> Iterator[tuple[int, str]]:
        """The documents of one file from the one numbered `start` on, each with its number; empty ones are left out.

        Raises:
            DataError: the file cannot be read, decoded or parsed, or has no text in its column.
        """
        index = start
        try:
            for rows in self._shard(file).skip(start).iter(batch_size=READ_BATCH):
                if self.column not in rows:
                    raise DataError(
                        f"{self.files[file]} has no column named {self.column}, only {', '.join(rows)}: name it with "
                        "--text-column"
                    )
                keep = rows[self.only[0]] if self.only else None
                for offset, text in enumerate(rows[self.column]):
                    number = index + offset
                    if text is not None and not isinstance(text, str):
                        raise DataError(
                            f"document {number} of {self.files[file]} holds no text in the column {self.column}, "
                            f"but a value of the type {type(text).__name__}"
                        )
                    if not text or (keep is not None and keep[offset] != self.only[1]):
                        continue
                    if self.held_out is not None and is_held_out(file, number) != self.held_out:
                        continue
                    text = self.clean(text) if self.clean else text
                    if text.strip():
                        yield number, text
                index += len(rows[self.column])
        except DataError:
            raise
        except Exception as error:  # of pyarrow, pandas, gzip, codecs, fsspec, http: no common base
            raise DataError(f"{self.files[file]} cannot be read: {first_line(error)}") from error

    def read_all(self) -> Iterator[str]:
        """The texts of all documents in the order of the files."""
        for file in range(len(self.files)):
            for _, text in self.read(file):
                yield text

    def _shard(self, file: int) -> datasets.IterableDataset:
        for part in self.parts:
            if file < part.num_shards:
                return part.shard(part.num_shards, file)
            file -= part.num_shards
        raise IndexError(file)


def first_line(error: BaseException) -> str:
    """An exception's message as a part of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
