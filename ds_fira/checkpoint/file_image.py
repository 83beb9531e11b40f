"""A file of `torch.save` in memory, of which only the bytes are there that were put there: its structure, some tensors.

The memory of a file that nobody has touched costs nothing. So its structure can be unpickled with tensors that have
their places and no content, and what a rank needs of them is filled in later, from the disk or from other ranks.

What this relies on: the zip files that torch 2.9 to 2.13 writes (stored, not compressed, each record behind a local
header), and `torch._weights_only_unpickler.Unpickler`, to which `torch.load` gives a `persistent_load` as this does. A
file of another kind is not `legible` here, and whoever wants it reads it from the disk.
"""

from __future__ import annotations

import contextlib
import copy
import io
import mmap
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch._weights_only_unpickler import Unpickler
from torch.storage import TypedStorage, UntypedStorage

from ds_fira.checkpoint import safe_load

# Linux's flag, which Python knows by name from 3.13 on: no room is set aside for memory that nobody may touch.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_TAIL = 1 << 16  # bytes at the end, in which the end of the directory is, and most directories
# Records up to so many bytes belong to the structure: counters, norms, learning rates.
SMALL = 1 << 12
# The end of a zip file, the same of 64 bits, and where that one is; the fixed part of a record's local header.
_END, _END64, _LOCATOR, _LOCAL = (struct.Struct(code) for code in ("<4s4H2LH", "<4sQ2H2L4Q", "<4sLQL", "<4s5H3L2H"))
_EXTRA = 192  # most bytes of a local header's extra field, with which torch aligns the record behind it
_HIDDEN = 0xFFFFFFFF  # an offset that stands in the 64-bit form


class FileImage:
    """The bytes of one file.

    Attributes:
        path: of the file.
        size: in bytes.
        bytes: uint8, (size,), zeros where nothing was put.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        with contextlib.suppress(OSError, AttributeError):
            # Else a few bytes here and there would take 2 MB each.
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes: Tensor = torch.frombuffer(self._memory, dtype=torch.uint8)[:size]
        self.start: int = self.bytes.data_ptr()
        self._records: dict[str, range] = {}
        self._structure: object = None

    def view(self, start: int, stop: int) -> memoryview:
        """The memory of some bytes, to read into."""
        return memoryview(self._memory)[start:stop]

    def outline(self) -> Iterator[list[range]]:
        """What `structure` needs, step by step: each step says what is to be there before the next one is asked for."""
        yield [range(max(0, self.size - _TAIL), self.size)]
        yield [self._directory()] if self._directory() else []
        wanted = []
        with contextlib.suppress(*_BROKEN):
            for record in self._listed():
                stop = record.header_offset + _LOCAL.size + len(record.filename.encode()) + _EXTRA
                if record.file_size <= SMALL or not _is_content(record.filename):
                    stop += record.file_size
                wanted.append(range(record.header_offset, min(stop, self.size)))
        yield wanted

    def _directory(self) -> range | None:
        """Where the zip file's directory and all behind it lie."""
        at = self.size - _END.size
        if at < 0 or self._memory[at : at + 4] != b"PK\x05\x06":
            return None
        *_, start, _ = _END.unpack(self._memory[at : self.size])
        before = at - _LOCATOR.size
        if start == _HIDDEN and before >= 0 and self._memory[before : before + 4] == b"PK\x06\x07":
            _, _, end64, _ = _LOCATOR.unpack(self._memory[before:at])
            if end64 + _END64.size <= before:
                *_, start = _END64.unpack(self._memory[end64 : end64 + _END64.size])
        return range(start, self.size) if start <= self.size else None

    def _listed(self) -> list[zipfile.ZipInfo]:
        return zipfile.ZipFile(self._memory).infolist() if self._directory() else []  # type: ignore[arg-type]

    @property
    def records(self) -> dict[str, range]:
        """Where the content of each record lies, by its name without the archive's; none where that cannot be told."""
        if not self._records:  # as long as they are not there
            with contextlib.suppress(*_BROKEN):
                self._records = {item.filename.partition("/")[2]: self._content(item) for item in self._listed()}
        return self._records

    def _content(self, record: zipfile.ZipInfo) -> range:
        at = record.header_offset
        mark, *_, name, extra = _LOCAL.unpack(self._memory[at : at + _LOCAL.size])
        found = range(at + _LOCAL.size + name + extra, at + _LOCAL.size + name + extra + record.file_size)
        kept = name <= len(record.filename.encode()) and extra <= _EXTRA and found.stop <= self.size
        if mark != b"PK\x03\x04" or record.compress_type != zipfile.ZIP_STORED or not kept:
            raise ValueError(f"{record.filename} is no plain record")
        return found

    @property
    def legible(self) -> bool:
        """Whether `structure` can be read here; else from the disk."""
        order = self.records.get("byteorder")
        little = order is None or self._memory[order.start : order.stop] == b"little"
        return "data.pkl" in self.records and "constants.pkl" not in self.records and little

    def structure(self) -> object:
        """What the file holds, its tensors as far as their bytes are there; each time in containers of its own.

        Raises:
            UnsafeFileError: it names classes or functions that are not imported.
            ValueError: it cannot be read.
        """
        if self._structure is None:
            pickled = self.records["data.pkl"]
            with safe_load.refused(self.path):
                unpickler = Unpickler(io.BytesIO(self._memory[pickled.start : pickled.stop]), encoding="utf-8")
                unpickler.persistent_load = self._loader()
                self._structure = unpickler.load()
                torch._utils._validate_loaded_sparse_tensors()
        return _with_own_containers(self._structure, {})

    def _loader(self) -> Callable[[tuple[object, ...]], TypedStorage]:
        """What an unpickler calls for every storage: in the memory of this file."""
        all_bytes, known = self.bytes.untyped_storage(), {}

        def load(wanted: tuple[object, ...]) -> TypedStorage:
            _, kind, key, _, count = wanted
            if key not in known:
                dtype = torch.uint8 if kind is UntypedStorage else kind.dtype
                place, size = self.records[f"data/{key}"], count * dtype.itemsize
                if size > len(place):
                    raise ValueError(f"the record data/{key} has {len(place)} bytes of {size}")
                part = all_bytes[place.start : place.start + size]
                known[key] = TypedStorage(wrap_storage=part, dtype=dtype, _internal=True)
            return known[key]

        return load

    def range_of(self, tensor: Tensor) -> range | None:
        """Which bytes of the file a tensor reads; None for one that is not in its memory."""
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return None
        first = tensor.data_ptr() - self.start
        if not 0 <= first < self.size or tensor.numel() == 0:
            return None
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return range(first, min(self.size, first + (last + 1) * tensor.element_size()))

    def forget(self, place: range) -> None:
        """Give the memory of some bytes back, but for what shares a page with others; they are zeros then."""
        first = -(-place.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = place.stop // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            self._memory.madvise(mmap.MADV_DONTNEED, first, length)


def _with_own_containers(value: object, known: dict[int, object]) -> object:
    """A copy of nested dicts, lists and tuples, whose items are the same; torch's unpickler takes ten times as long.

    Args:
        value: that is copied.
        known: the copies made so far, by the places of what they are of: lists may hold each other.
    """
    if type(value) not in (dict, OrderedDict, list, tuple) or id(value) in known:
        return known.get(id(value), value)
    if isinstance(value, tuple):
        return tuple(_with_own_containers(item, known) for item in value)
    own = known[id(value)] = copy.copy(value)  # with the attributes of a module's state dict
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        own[key] = _with_own_containers(item, known)
    return own


# What a zip file that is none, or torn, can raise.
_BROKEN = (ValueError, OverflowError, NotImplementedError, zipfile.BadZipFile, struct.error, EOFError, UnicodeError)


def _is_content(name: str) -> bool:
    """Whether a record is the content of a tensor."""
    return name.partition("/")[2].startswith("data/")
