"""Read a checkpoint's files once, by all ranks together: each its share of the bytes, which it sums while it reads.

A share is a range of bytes, or a file of the rank's own. The ranks put the CRC-32 of the ranges together, and compare
that of each file with the manifest's, before anything is made of a byte. What a rank needs of another's share it then
gets from there, in pieces of bounded memory, and not from the disk. Every rank makes the calls that say so, in one
order.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_fira.checkpoint.byte_ranges import FileRange, batches, merged
from ds_fira.checkpoint.crc32 import combine
from ds_fira.checkpoint.file_image import FileImage
from ds_fira.sharding.comm import Communicator

_BLOCK = 1 << 22  # bytes read at a time
PIECE = 1 << 26  # bytes that travel at a time
_NEAR = 1 << 12  # bytes between two tensors that travel together with them: in a file they are some hundred


class ReadRange(NamedTuple):
    """Bytes of a file, and the rank that reads them."""

    start: int
    stop: int
    rank: int


@dataclass(frozen=True, slots=True)
class Listed:
    """A file to read.

    Attributes:
        size: in bytes.
        crc32: of its content; None where nobody has noted it.
        rank: that reads all of it; None where all ranks read an even part.
        kept: whether it is kept for what is made of it, or only summed.
    """

    size: int
    crc32: int | None = None
    rank: int | None = None
    kept: bool = False


def divide(files: Mapping[str, Listed], ranks: int) -> dict[str, list[ReadRange]]:
    """Which rank reads which bytes of which file: each byte one rank, in order."""
    parts = {name: [ReadRange(0, file.size, file.rank)] for name, file in files.items() if file.rank is not None}
    shared = {name: file.size for name, file in files.items() if file.rank is None}
    total, before = sum(shared.values()), 0
    bounds = [number * total // ranks for number in range(ranks + 1)]
    for name, size in shared.items():
        cut = [min(max(bound - before, 0), size) for bound in bounds]
        parts[name] = [ReadRange(*pair, rank) for rank, pair in enumerate(pairwise(cut)) if pair[0] < pair[1]]
        before += size
    return parts


class SharedRead:
    """One reading of a checkpoint's files, on one rank.

    Attributes:
        files: by name, the same on every rank.
        images: of those that are kept.
        ready: the names of those in which all is there that anyone will read.
        kept: by name, what of a file the caller may hold on to when it is loaded.
        sums: of what this rank has read: names, bounds and CRC-32.
    """

    def __init__(self, folder: Path, files: Mapping[str, Listed], communicator: Communicator) -> None:
        self.folder, self.files, self.communicator = folder, dict(files), communicator
        self.rank = communicator.dp_rank
        self.parts = divide(files, communicator.dp_size)
        self.images = {name: FileImage(folder / name, file.size) for name, file in files.items() if file.kept}
        self.ready: set[str] = set()
        self.kept: dict[str, list[FileRange]] = {}
        self.sums: list[tuple[str, int, int, int]] = []
        self._in_memory = sorted((image.start, name) for name, image in self.images.items())

    def read(self) -> str | None:
        """Read and sum this rank's share; why that failed, None where it did not."""
        scratch = memoryview(bytearray(_BLOCK))
        for name, parts in self.parts.items():
            for start, stop, rank in parts:
                if rank != self.rank:
                    continue
                try:
                    crc = self._read(name, start, stop, scratch)
                except EOFError:
                    return _changed(name)
                except OSError as error:
                    return f"its file {name} cannot be read: {error.strerror or error}"
                self.sums.append((name, start, stop, crc))
        return None

    def _read(self, name: str, start: int, stop: int, scratch: memoryview) -> int:
        """Read a range of a file; its CRC-32."""
        crc, image = 0, self.images.get(name)
        with open(self.folder / name, "rb", buffering=0) as file:
            while start < stop:
                end = min(stop, start + _BLOCK)
                block = scratch[: end - start] if image is None else image.view(start, end)
                count = os.preadv(file.fileno(), [block], start)
                if count == 0:
                    raise EOFError
                crc, start = zlib.crc32(block[:count], crc), start + count
        return crc

    def find_damage(self, sums: Iterable[Iterable[tuple[str, int, int, int]]]) -> str | None:
        """Compare what was read with what was noted.

        Args:
            sums: of every rank.
        """
        found: dict[str, int] = {}
        for name, start, stop, crc in sorted(item for of_rank in sums for item in of_rank):
            found[name] = combine(found.get(name, 0), crc, stop - start)
        for name in sorted(self.files):
            if self.files[name].crc32 not in (None, found.get(name, 0)):
                return _changed(name)
        return None

    def spread_structure(self, names: Iterable[str]) -> None:
        """Give all ranks what is needed to unpickle some files, without the tensors' content; a collective call."""
        steps = [self.images[name].outline() for name in names]
        for asked in zip(*steps, strict=True):
            if not any(asked):  # on no rank: all of them have the same bytes by now
                continue
            own = []
            for name, places in zip(names, asked, strict=True):
                view = self.images[name].view
                wanted = [FileRange(name, place.start, place.stop) for place in places]
                own += [(piece, bytes(view(piece.start, piece.stop))) for piece, _ in self._cut(wanted, self.rank)]
            for held in self.communicator.gather_objects(own):
                for (name, start, stop), content in held:
                    self.images[name].view(start, stop)[:] = content

    def spread(self, places: Iterable[FileRange]) -> None:
        """Give all ranks the same bytes; a collective call."""
        by_rank: dict[int, list[FileRange]] = defaultdict(list)
        for piece, rank in self._cut(merged(places, _NEAR)):
            by_rank[rank].append(piece)
        if self.communicator.dp_size == 1:
            return
        for rank, pieces in sorted(by_rank.items()):
            for batch in batches(pieces, PIECE):
                mine, (first, *more) = rank == self.rank, batch
                if not more:  # one piece travels from memory to memory as it is
                    packed = self._place(first)
                elif mine:
                    packed = self._packed(batch)
                else:
                    packed = torch.empty(sum(stop - start for _, start, stop in batch), dtype=torch.uint8)
                arrived = self.communicator.broadcast(packed, rank)
                if not mine and (more or arrived is not packed):
                    self._unpack(batch, arrived)

    def deliver(self, places: Iterable[FileRange]) -> None:
        """Give each rank the bytes that it wants of the others' shares; a collective call."""
        size, wanted = self.communicator.dp_size, self.communicator.gather_objects(merged(places))
        others = [rank for rank in range(size) if rank != self.rank]
        room = max(1, PIECE // size)
        # One list of batches for every other rank: what goes there, what comes from there.
        sent = {rank: batches([piece for piece, _ in self._cut(wanted[rank], self.rank)], room) for rank in others}
        arriving = defaultdict(list)
        for piece, rank in self._cut(wanted[self.rank]):
            arriving[rank].append(piece)
        expected = {rank: batches(arriving[rank], room) for rank in others}
        turns = max((len(batches) for batches in (*sent.values(), *expected.values())), default=0)
        turns = int(max(row[0] for row in self.communicator.gather_numbers([turns])))
        for turn in range(turns):
            out, back = ([_at(batches.get(rank, []), turn) for rank in range(size)] for batches in (sent, expected))
            counts = [[sum(stop - start for _, start, stop in batch) for batch in lists] for lists in (out, back)]
            packed = self._packed([piece for batch in out for piece in batch])
            arrived = self.communicator.start_all_to_all(packed, *counts).wait()
            self._unpack([piece for batch in back for piece in batch], arrived)

    def _cut(self, places: Iterable[FileRange], only: int | None = None) -> Iterator[tuple[FileRange, int]]:
        """Places by the rank that has read them; those of one rank alone where one is named."""
        for name, start, stop in places:
            parts = self.parts[name]
            for number in range(max(0, bisect_right(parts, (start, float("inf"))) - 1), len(parts)):
                part = parts[number]
                first, last = max(start, part.start), min(stop, part.stop)
                if part.start >= stop:
                    break
                if first < last and only in (None, part.rank):
                    yield FileRange(name, first, last), part.rank

    def _packed(self, places: Sequence[FileRange]) -> Tensor:
        if not places:
            return torch.empty(0, dtype=torch.uint8)
        return torch.cat([self._place(place) for place in places])

    def _unpack(self, places: Sequence[FileRange], arrived: Tensor) -> None:
        sizes = [stop - start for _, start, stop in places]
        for place, content in zip(places, arrived.split(sizes), strict=True):
            self._place(place).copy_(content)

    def _place(self, place: FileRange) -> Tensor:
        """The memory of some bytes."""
        return self.images[place.name].bytes[place.start : place.stop]

    def holds(self, name: str) -> bool:
        """Whether this rank has read all of a file."""
        return self.files[name].rank == self.rank

    def forget_all_but(self, name: str, kept: Iterable[FileRange]) -> None:
        """Give the memory of a file back but for some ranges, on which a tensor may keep all of it."""
        first = 0
        for _, start, stop in merged(part for part in kept if part.name == name):
            self.images[name].forget(range(first, start))
            first = stop
        self.images[name].forget(range(first, self.files[name].size))

    def ranges_of(self, tensors: Iterable[object]) -> list[FileRange]:
        """Where in the files tensors lie, those that lie in one."""
        found = []
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.layout is torch.strided:
                number = bisect_right(self._in_memory, (tensor.data_ptr(), "\U0010ffff")) - 1
                name = self._in_memory[number][1] if number >= 0 else None
                read = None if name is None else self.images[name].range_of(tensor)
                if read is not None:
                    found.append(FileRange(name, read.start, read.stop))
        return found

    def touched_by(self, function: Callable[[], object]) -> list[FileRange]:
        """Which bytes a function reads of tensors in the files; it sees zeros where they are not there yet."""
        with _Touched(self) as touched:
            function()
        return merged(touched.found)


class _Touched(TorchDispatchMode):
    """Notes what operators read of the files' tensors; views read nothing."""

    def __init__(self, reading: SharedRead) -> None:
        super().__init__()
        self.reading, self.found = reading, list[FileRange]()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if not func.is_view:
            self.found += self.reading.ranges_of(tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


def _at(batches: Sequence[list[FileRange]], number: int) -> list[FileRange]:
    return batches[number] if number < len(batches) else []


def _changed(name: str) -> str:
    return f"the content of its file {name} has changed"
