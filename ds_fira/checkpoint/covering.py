"""Cover a range of what a rank needs with the ranges that were saved, whoever saved them, and copy what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ds_fira.checkpoint.cuts import Recut
from ds_fira.checkpoint.slices import Missing, overlap
from ds_fira.sharding.geometry import ParamSlice

Source = TypeVar("Source")
# By the names of parameters and slices, which of their elements were saved, and what holds them.
Sources = dict[str, list[tuple[ParamSlice, Source]]]
# Numbers of rows, columns or elements as they were, and with which they begin now.
Moves = Sequence[tuple[range, int]]
# Elements of a slice that are put together at once, of other slices: bounds what is held twice.
_TURN = 2**22


def fill(
    target: Tensor,
    params: Sequence[ParamSlice],
    sources: Sources[Source],
    what: str,
    recuts: Mapping[str, Recut],
    read: Callable[[Source, int, int], Tensor] = lambda flat, start, stop: flat[start:stop],
) -> None:
    """Copy the elements of `params` to their offsets in a 1-D tensor, from wherever they were.

    Args:
        target: the tensor.
        params: what it is to hold.
        sources: what was saved.
        what: it is, for the error.
        recuts: of `SavedState`.
        read: gives elements start to stop of what holds some.

    Raises:
        ValueError: as of `covering`.
    """

    def read_flat(label: str, start: int, stop: int) -> Tensor:
        value = torch.empty(stop - start, dtype=target.dtype)
        fill(value, (ParamSlice(label, 0, start, stop),), sources, what, {}, read)
        return value

    for held in params:
        recut = recuts.get(held.name)
        cuts = () if recut is None else recut.sources(sources)
        if recut is not None and cuts != (recut.own,):
            for start in range(held.start, held.stop, _TURN):
                values = recut.read(cuts, start, min(start + _TURN, held.stop), read_flat)
                first = held.offset + start - held.start
                target[first : first + len(values)].copy_(values)
            continue
        parts = [(range(other.start, other.stop), (other.offset, flat)) for other, flat in sources.get(held.name, [])]
        for here, there, (offset, flat) in covering(range(held.start, held.stop), parts, what, held.name):
            values = read(flat, offset + there.start, offset + there.stop)
            target[held.offset + here.start : held.offset + here.stop].copy_(values)


def covering(
    wanted: range, parts: Iterable[tuple[range, Source]], what: str, name: str, moved: Moves | None = None
) -> Iterator[tuple[slice, slice, Source]]:
    """Cover a range with parts of other ranges: where in it, where in the other one, and what that one holds.

    Args:
        wanted: the range.
        parts: ranges of numbers, as they were when they were saved, and what each holds.
        what: they hold, for the error.
        name: of whose.
        moved: numbers as they were, and with which they begin now; None where they are the same.

    Raises:
        ValueError: some of it is in none of them.
    """
    missing = Missing(wanted)
    for held, source in parts:
        for there, begin in [(held, held.start)] if moved is None else moved:
            common = overlap(there, held)
            first = begin + common.start - there.start
            for taken in missing.take(range(first, first + len(common))):
                start = taken.start - first + common.start - held.start
                yield _within(taken, wanted), slice(start, start + len(taken)), source
    if missing.ranges:
        raise ValueError(
            f"the checkpoint lacks a part of the {what} of {name}; a file of it is missing or from another save, so "
            "load an older tag."
        )


def _within(common: range, held: range) -> slice:
    return slice(common.start - held.start, common.stop - held.start)
