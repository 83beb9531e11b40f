"""Lay a file of `torch.save` out before a byte of it is written, so that several processes can write its storages.

Such a file is a zip archive of uncompressed records: the pickle, a few constants, then each storage at a multiple of
64 bytes. Where everything lies follows from sizes alone. Checksums stand behind a record's content and in the directory
at the end, never before the content: whoever finishes the file writes what lies between the storages (`ZipLayout.rest`)
once it knows their sums.

The bytes are those of torch 2.9 to 2.13 (`PyTorchFileWriter`), but for the number under `.data/serialization_id`, which
only torch's own statistics read (`tests/unit/checkpoint/test_zip_layout.py` compares them). Needs neither torch nor
DeepSpeed.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_fira.checkpoint.crc32 import combined

ALIGNMENT = 64  # bytes, torch's default
_LARGE = 0xFFFFFFFF  # sizes and offsets from here on stand in zip64's fields
_DESCRIBED, _UTF8 = 8, 1 << 11  # flags: sizes and sum stand behind the content; the name's encoding
_ID = ".data/serialization_id"


@dataclass(frozen=True, slots=True)
class Entry:
    """A record of the archive.

    Attributes:
        name: with the archive's stem before it.
        header: the bytes before its content.
        begin: where the header begins, in bytes from the start of the file.
        start: where the content begins.
        size: of the content, in bytes.
        large: the fields of zip64, empty where it needs none.
    """

    name: bytes
    header: bytes
    begin: int
    start: int
    size: int
    large: bytes

    def descriptor(self, crc: int) -> bytes:
        """The bytes behind the content."""
        if not self.size:
            return b""
        return struct.pack("<4sIQQ" if self.large else "<4sIII", b"PK\7\10", crc, self.size, self.size)

    def listed(self, crc: int) -> bytes:
        """Its entry in the directory at the end."""
        size, begin = (_LARGE if number >= _LARGE else number for number in (self.size, self.begin))
        numbers = (0, 0, _flags(self.size), 0, 0, 0, crc, size, size, len(self.name), len(self.large), 0, 0, 0, 0)
        return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *numbers, begin) + self.name + self.large


def _flags(size: int) -> int:
    return _UTF8 | (_DESCRIBED if size else 0)


def _zip64(size: int, begin: int, compressed: int | None = None) -> bytes:
    numbers = [size, size if compressed is None else compressed] if size >= _LARGE else []
    numbers += [begin] if begin >= _LARGE else []
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


class ZipLayout:
    """Where everything lies in a file of `torch.save`.

    Attributes:
        storages: the records of the storages, in order.
        size: of the file, in bytes.
    """

    def __init__(self, stem: str, pickle_size: int, sizes: Sequence[int], alignment: int = ALIGNMENT) -> None:
        """Lay out a file.

        Args:
            stem: the file's name without its ending.
            pickle_size: of the pickle, in bytes.
            sizes: of the storages, in bytes, in the order of their keys.
            alignment: of every record's content, in bytes.
        """
        self._constants = {
            ".format_version": b"1",
            ".storage_alignment": str(alignment).encode(),
            "byteorder": sys.byteorder.encode(),
            "version": b"3\n",
        }
        names = [("data.pkl", pickle_size)]
        names += [(name, len(self._constants[name])) for name in (".format_version", ".storage_alignment", "byteorder")]
        names += [(f"data/{number}", size) for number, size in enumerate(sizes)]
        names += [("version", len(self._constants["version"])), (_ID, 40)]
        self._entries: dict[str, Entry] = {}
        cursor = 0
        for name, size in names:
            self._entries[name] = entry = _entry(f"{stem}/{name}".encode(), cursor, size, alignment)
            cursor = entry.start + size + len(entry.descriptor(0))
        self.storages = [self._entries[f"data/{number}"] for number in range(len(sizes))]
        self._directory = cursor
        self.size = cursor + len(self._end([0] * len(self._entries)))

    def rest(self, pickled: bytes, crcs: Sequence[int]) -> tuple[list[tuple[int, bytes]], int]:
        """Everything but the storages' contents.

        Args:
            pickled: the pickle.
            crcs: CRC-32 of every storage's content.

        Returns:
            Runs of bytes with their places in the file, in order; and the CRC-32 of the whole file.
        """
        contents: Mapping[str, bytes] = {"data.pkl": pickled, **self._constants}
        known = {f"data/{number}": crc for number, crc in enumerate(crcs)}
        known |= {name: zlib.crc32(content) for name, content in contents.items()}
        numbers = zlib.crc32(" ".join(self._entries).encode()), zlib.crc32(struct.pack(f"<{len(crcs)}I", *crcs))
        contents = {**contents, _ID: "{:020}{:020}".format(*numbers).encode()}
        known[_ID] = zlib.crc32(contents[_ID])
        runs: list[tuple[int, bytes]] = []
        sums: list[tuple[int, int]] = []
        begin, run = 0, b""
        for name, entry in self._entries.items():
            run += entry.header
            if name in contents:
                run += contents[name]
            else:
                runs.append((begin, run))
                sums += [(zlib.crc32(run), len(run)), (known[name], entry.size)]
                begin, run = entry.start + entry.size, b""
            run += entry.descriptor(known[name])
        run += self._end([known[name] for name in self._entries])
        runs.append((begin, run))
        sums.append((zlib.crc32(run), len(run)))
        return runs, combined(sums)

    def _end(self, crcs: Sequence[int]) -> bytes:
        """The directory and what stands behind it."""
        listed = b"".join(entry.listed(crc) for entry, crc in zip(self._entries.values(), crcs, strict=True))
        count, at = len(self._entries), self._directory
        numbers = (44, 0x31E, 45, 0, 0, count, count, len(listed), at)
        end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", *numbers)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, at + len(listed), 1)
        few, near = min(count, 0xFFFF), min(at, _LARGE)
        end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, few, few, min(len(listed), _LARGE), near, 0)
        return listed + end64 + locator + end


def _entry(name: bytes, begin: int, size: int, alignment: int) -> Entry:
    large = _zip64(size, begin)
    ahead = _zip64(size, begin, 0)  # before the content, torch does not tell its size once more
    numbers = (0, _flags(size), 0, 0, 0, 0, 0, 0, len(name))
    start = begin + 30 + len(name) + len(large) + 4
    padding = -start % alignment
    extra = ahead + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    header = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *numbers, len(extra)) + name + extra
    return Entry(name, header, begin, start + padding, size, large)
