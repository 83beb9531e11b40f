"""Ranges of bytes in the files of a checkpoint: in order, together, in batches. Needs neither torch nor DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class FileRange(NamedTuple):
    """Bytes of a file, by its name."""

    name: str
    start: int
    stop: int


def merged(places: Iterable[FileRange], gap: int = 0) -> list[FileRange]:
    """Places in order, each byte once; those that lie no more than `gap` bytes apart are one, with what is between."""
    found: list[FileRange] = []
    for name, start, stop in sorted(places):
        if found and found[-1].name == name and start <= found[-1].stop + gap:
            found[-1] = found[-1]._replace(stop=max(stop, found[-1].stop))
        else:
            found.append(FileRange(name, start, stop))
    return found


def batches(places: Iterable[FileRange], room: int) -> list[list[FileRange]]:
    """Places in batches of so many bytes, cut where one is full."""
    found: list[list[FileRange]] = []
    free = 0
    for name, start, stop in places:
        while start < stop:
            if free == 0:
                found.append([])
                free = room
            end = min(stop, start + free)
            found[-1].append(FileRange(name, start, end))
            free, start = free - (end - start), end
    return found
