"""Write ranges of a file, and sum them from memory on their way out: no byte is read again.

Several processes may write one file, each its own ranges. A writer sums and writes a few megabytes at a time, so that
the second of the two finds them in the processor's cache.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_AT_ONCE = 1 << 22  # bytes summed and written at a time
_FROM_DEVICE = 1 << 26  # bytes brought to the host at a time


class RangedFile:
    """A file that is open for writing anywhere in it; made where it is not there, never cut.

    Attributes:
        written: bytes so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.written = 0

    def __enter__(self) -> RangedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        except OSError as failed:
            raise self._named(failed) from None
        finally:
            os.close(self._descriptor)

    def write(self, offset: int, content: bytes | memoryview | Tensor, crc: int = 0) -> int:
        """Write bytes at a place.

        Args:
            offset: bytes from the start of the file.
            content: bytes, or a 1-D uint8 tensor on any device.
            crc: CRC-32 of what stands before it, if it is to be summed on.

        Returns:
            The CRC-32 with it.

        Raises:
            OSError: names the file.
        """
        if isinstance(content, Tensor) and content.device.type != "cpu":
            for begin in range(0, len(content), _FROM_DEVICE):
                crc = self.write(offset + begin, content[begin : begin + _FROM_DEVICE].cpu(), crc)
            return crc
        view = memoryview(content.numpy() if isinstance(content, Tensor) else content)
        for begin in range(0, len(view), _AT_ONCE):
            block = view[begin : begin + _AT_ONCE]
            crc = zlib.crc32(block, crc)
            self._write_whole(offset + begin, block)
        return crc

    def _write_whole(self, offset: int, block: memoryview) -> None:
        done = 0
        while done < len(block):
            try:
                done += write_at(self._descriptor, block[done:], offset + done)
            except OSError as error:
                raise self._named(error) from None
        self.written += done

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self._path))


def write_at(descriptor: int, block: memoryview, offset: int) -> int:
    """Every byte of a checkpoint's own files goes through this call; returns how many were written."""
    return os.pwrite(descriptor, block, offset)


class Stream:
    """What `torch.save` takes for a file: writes it from its beginning.

    Attributes:
        size: bytes so far.
        crc32: of them.
    """

    def __init__(self, file: RangedFile) -> None:
        self._file = file
        self.size = self.crc32 = 0

    def write(self, content: bytes | bytearray | memoryview | torch.UntypedStorage) -> int:
        """Append bytes; returns their number."""
        block = memoryview(bytes(content) if isinstance(content, torch.UntypedStorage) else content).cast("B")
        self.crc32 = self._file.write(self.size, block, self.crc32)
        self.size += len(block)
        return len(block)

    def flush(self) -> None:
        """Nothing is held back."""
