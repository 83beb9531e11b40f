"""A file of `torch.save` on its way to the disk: who writes which bytes of it, and how their sums become the file's.

Ranks that hold the same tensors share a file's storages out: each writes an even part of their bytes, whichever
storages these lie in. The file's *owner* has the structure and everything else; it finishes the file when it has the
others' sums. A file that only one rank has content of is the same with one rank.
"""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ds_fira.checkpoint.crc32 import combined
from ds_fira.checkpoint.manifest import Record
from ds_fira.checkpoint.pickled import bytes_of, with_item
from ds_fira.checkpoint.ranged_file import RangedFile, Stream
from ds_fira.checkpoint.zip_layout import ALIGNMENT, ZipLayout

# (number of the storage, first byte, bytes, CRC-32) of what a rank has written.
Sum = tuple[int, int, int, int]
_OLD_FORMAT = -1  # in the place of the storage, where a file has none


@dataclass
class Extent:
    """Neighbouring bytes of one storage that a rank writes.

    Attributes:
        storage: its number; for a rank that is not the owner, among those that are shared out.
        start: the first byte.
        data: a 1-D uint8 tensor: the memory itself, or a copy of it.
    """

    storage: int
    start: int
    data: Tensor


@dataclass(frozen=True, slots=True)
class Frame:
    """What the owner of a file tells the others of it.

    Attributes:
        pickle_size: in bytes.
        sizes: of all storages, in bytes.
        shared: the numbers of those that are shared out.
        alignment: of records, in bytes.
    """

    pickle_size: int
    sizes: tuple[int, ...]
    shared: tuple[int, ...]
    alignment: int


@dataclass
class Outgoing:
    """A file as one rank has a part in it.

    Attributes:
        name: in the checkpoint's folder.
        owner: the rank that finishes it.
        extents: what this rank writes.
        pickled: the structure; only the owner's.
        frame: likewise.
        old: the content of a file in torch's format without a zip archive, which its owner writes alone.
    """

    name: str
    owner: int
    extents: list[Extent] = field(default_factory=list)
    pickled: bytes = b""
    frame: Frame | None = None
    old: object = None

    @property
    def key(self) -> tuple[int, str]:
        """The same for this file on all of its ranks; nodes have files of one name."""
        return self.owner, self.name

    def add_whole(self, storages: Mapping[int, torch.UntypedStorage]) -> None:
        """Let this rank write all of some storages, by their numbers."""
        numbers = list(storages)
        found = extents_of(list(storages.values()))
        self.extents += (Extent(numbers[each.storage], each.start, each.data) for each in found)

    def add_item(self, key: str, value: object) -> None:
        """Put one item more into the dict that the file holds; for its owner, before anything is written.

        Raises:
            Exception: the value cannot be pickled.
        """
        if self.old is not None:
            self.old = {**self.old, key: value}
        elif self.frame is not None:
            count = len(self.frame.sizes)
            self.pickled, storages = with_item(self.pickled, key, value, count)
            sizes = (*self.frame.sizes, *(storage.nbytes() for storage in storages))
            self.frame = replace(self.frame, pickle_size=len(self.pickled), sizes=sizes)
            self.add_whole(dict(enumerate(storages, count)))

    def write(self, folder: Path, frame: Frame | None) -> tuple[list[Sum], int]:
        """Write this rank's bytes, and flush them to the disk.

        Args:
            folder: of the checkpoint.
            frame: of the owner.

        Returns:
            The sums of what was written, and bytes.

        Raises:
            OSError: the disk is full, or the folder gone.
        """
        path, sums = folder / self.name, []
        if self.old is not None:
            with RangedFile(path) as file:
                stream = Stream(file)
                torch.save(self.old, stream, pickle_module=pickle, _use_new_zipfile_serialization=False)
            return [(_OLD_FORMAT, 0, stream.size, stream.crc32)], file.written
        if not self.extents or frame is None:
            return [], 0
        entries = ZipLayout(path.stem, frame.pickle_size, frame.sizes, frame.alignment).storages
        with RangedFile(path) as file:
            for extent in self.extents:
                number = extent.storage if self.frame is not None else frame.shared[extent.storage]
                crc = file.write(entries[number].start + extent.start, extent.data)
                sums.append((number, extent.start, len(extent.data), crc))
        return sums, file.written

    def finish(self, folder: Path, sums: Iterable[Sum]) -> tuple[Record, int]:
        """Write what lies between the storages; for the owner, once all ranks have written theirs.

        Args:
            folder: of the checkpoint.
            sums: of all ranks.

        Returns:
            Size and CRC-32 of the file, and the bytes written here.

        Raises:
            OSError: the disk is full, or parts of the file were not written.
        """
        sums, path = sorted(sums), folder / self.name
        if self.old is not None:
            ((_, _, size, crc),) = sums
            return {"size": size, "crc32": crc}, 0
        found: dict[int, list[Sum]] = {number: [] for number in range(len(self.frame.sizes))}
        for each in sums:
            found[each[0]].append(each)
        crcs = [_whole(path, found[number], size) for number, size in enumerate(self.frame.sizes)]
        layout = ZipLayout(path.stem, len(self.pickled), self.frame.sizes, self.frame.alignment)
        runs, crc = layout.rest(self.pickled, crcs)
        with RangedFile(path) as file:
            for offset, content in runs:
                file.write(offset, content)
        return {"size": layout.size, "crc32": crc}, file.written


def _whole(path: Path, sums: Sequence[Sum], size: int) -> int:
    """The sum of a storage from the sums of its parts."""
    end = 0
    for _, start, length, _ in sums:
        if start != end:
            break
        end += length
    if end != size:
        raise OSError(errno.EIO, f"{size - end} bytes of a storage were written by no rank", str(path))
    return combined((crc, length) for *_, length, crc in sums)


def shares(sizes: Sequence[int], number: int, of: int) -> Iterator[tuple[int, int, int]]:
    """What one of several writers writes of storages that lie one after the other.

    Args:
        sizes: of the storages, in bytes.
        number: of the writer.
        of: writers.

    Yields:
        (storage, first byte, byte behind the last); together an even part, cut between multiples of 64 bytes.
    """
    total = sum(sizes)
    first, last = (total * each // of // ALIGNMENT * ALIGNMENT if each < of else total for each in (number, number + 1))
    begin = 0
    for storage, size in enumerate(sizes):
        start, stop = max(first - begin, 0), min(last - begin, size)
        if start < stop:
            yield storage, start, stop
        begin += size


def extents_of(storages: Sequence[torch.UntypedStorage], number: int = 0, of: int = 1) -> list[Extent]:
    """The part of storages that one of several writers writes, in the memory where they are."""
    sizes = [storage.nbytes() for storage in storages]
    return [
        Extent(each, start, bytes_of(storages[each])[start:stop]) for each, start, stop in shares(sizes, number, of)
    ]
