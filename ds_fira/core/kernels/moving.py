"""Pieces of tensors moved, and sums of them made, by tables: many in one launch, whatever their sizes.

What a rank sends of many matrices is one buffer; a table says where every piece of it comes from. Places are elements
behind the first one of a tensor: of `words`, float32, or `doubles`, float64, in which a step has its temporaries.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.tiles import launch

# Elements of one program at a time, and programs of a piece at most.
BLOCK, PROGRAMS = 1024, 64


class Way(IntEnum):
    """From where to where a piece goes; the first four into the buffer that is sent."""

    WORDS_TO_WIRE = 0
    ROOTS_TO_WIRE = 1  # of `doubles`, as float32: norms, whose squares would underflow there
    BASES_TO_WIRE = 2
    BITS_TO_WIRE = 3  # of `doubles`, two elements each; places and sizes count in such
    BASES_TO_WORDS = 4
    WORDS_TO_WORDS = 5
    WIRE_TO_WORDS = 6
    WIRE_TO_BITS = 7


class Move(NamedTuple):
    """A matrix to move, stored row by row in both places.

    Attributes:
        way: where it comes from and goes to.
        source: place of its first element there.
        target: likewise.
        rows: how many.
        columns: of every row.
        source_row: elements from one row to the next.
        target_row: likewise.
        source_column: 1, or 0 for one number in place of a row.
    """

    way: int
    source: int
    target: int
    rows: int
    columns: int
    source_row: int = 0
    target_row: int = 0
    source_column: int = 1


class Sum(NamedTuple):
    """R and the squared norms of a matrix's entries, to which what others send is added.

    Attributes:
        low_rank: place of R in `words`.
        squares: place of the norms' squares in `doubles`.
        entries: how many.
        rank: r.
        is_left: 1 where R is stored (r, entries), 0 where (entries, r).
        first: of its `Arrival`s in their table.
        count: of them.
    """

    low_rank: int
    squares: int
    entries: int
    rank: int
    is_left: int
    first: int
    count: int


class Arrival(NamedTuple):
    """What another rank has sent of some of the entries: R, then their norms.

    Attributes:
        place: in the buffer that has arrived.
        start: the first entry, counted from the first of its `Sum`.
        entries: how many.
    """

    place: int
    start: int
    entries: int


@functools.lru_cache(maxsize=4096)
def table_of(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """The rows as an int64 tensor on a device; kept, because a plan has the same ones in every step."""
    table = torch.tensor(rows, dtype=torch.int64)
    # From pinned memory the host does not wait for what the device has yet to do.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def move(words: Tensor, doubles: Tensor, bases: Tensor | None, wire: Tensor, pieces: Sequence[Move]) -> None:
    """Move pieces; what lies in none of them stays as it is.

    Args:
        words: float32.
        doubles: float64.
        bases: a tensor of the dtype that bases are stored in, from whose first element on their places count; None
            where none is moved.
        wire: float32; what is sent, or what has arrived.
        pieces: none of which overlaps another's target.
    """
    if not pieces:
        return
    largest = max(piece.rows * piece.columns for piece in pieces)
    grid = (min(PROGRAMS, triton.cdiv(largest, BLOCK)), len(pieces))
    table = table_of(words.device, tuple(pieces))
    launch(_move, grid, words, words, doubles, bases, wire, table, BLOCK=BLOCK, num_warps=4)


def add_arrived(words: Tensor, doubles: Tensor, wire: Tensor, sums: Sequence[Sum], arrivals: Sequence[Arrival]) -> None:
    """Add parts of R and of squared norms that have arrived, each entry's in the order of their table.

    Args:
        words: float32.
        doubles: float64.
        wire: what has arrived.
        sums: where they are added.
        arrivals: of all of `sums`.
    """
    if not arrivals:
        return
    grid = (min(PROGRAMS, triton.cdiv(max(each.entries * each.rank for each in sums), BLOCK)), len(sums))
    tables = (table_of(words.device, tuple(rows)) for rows in (sums, arrivals))
    launch(_add_arrived, grid, words, words, doubles, wire, *tables, BLOCK=BLOCK, num_warps=4)


@triton.jit
def _move(words, doubles, bases, wire, table, BLOCK: tl.constexpr):
    piece = table + tl.program_id(1).to(tl.int64) * 8
    way = tl.load(piece)
    source = tl.load(piece + 1)
    target = tl.load(piece + 2)
    columns = tl.load(piece + 4)
    numel = tl.load(piece + 3) * columns
    source_row = tl.load(piece + 5)
    target_row = tl.load(piece + 6)
    source_column = tl.load(piece + 7)
    bits = doubles.to(tl.pointer_type(tl.float32), bitcast=True)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < numel:
        place = start + tl.arange(0, BLOCK)
        inside = place < numel
        row = place // columns
        column = place % columns
        at = source + row * source_row + column * source_column
        value = tl.zeros((BLOCK,), dtype=tl.float32)
        if way == 1:
            value = tl.sqrt(tl.load(doubles + at, mask=inside, other=0.0)).to(tl.float32)
        elif way == 3:
            value = tl.load(bits + at, mask=inside, other=0.0)
        elif way >= 6:
            value = tl.load(wire + at, mask=inside, other=0.0)
        elif (way == 2) | (way == 4):
            if bases is not None:
                value = tl.load(bases + at, mask=inside, other=0.0).to(tl.float32)
        else:
            value = tl.load(words + at, mask=inside, other=0.0)
        at = target + row * target_row + column
        if way <= 3:
            tl.store(wire + at, value, mask=inside)
        elif way == 7:
            tl.store(bits + at, value, mask=inside)
        else:
            tl.store(words + at, value, mask=inside)
        start += tl.num_programs(0) * BLOCK


@triton.jit
def _add_arrived(words, doubles, wire, sums, arrivals, BLOCK: tl.constexpr):
    own = sums + tl.program_id(1).to(tl.int64) * 7
    low_rank = words + tl.load(own)
    squares = doubles + tl.load(own + 1)
    entries = tl.load(own + 2)
    rank = tl.load(own + 3)
    is_left = tl.load(own + 4)
    first = tl.load(own + 5)
    last = first + tl.load(own + 6)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < entries * rank:
        place = start + tl.arange(0, BLOCK)
        inside = place < entries * rank
        entry = tl.where(is_left != 0, place % entries, place // rank)
        row = tl.where(is_left != 0, place // entries, place % rank)
        total = tl.load(low_rank + place, mask=inside, other=0.0)
        for index in range(first, last):
            one = arrivals + index * 3
            count = tl.load(one + 2)
            offset = entry - tl.load(one + 1)
            at = tl.load(one) + tl.where(is_left != 0, row * count + offset, offset * rank + row)
            total += tl.load(wire + at, mask=inside & (offset >= 0) & (offset < count), other=0.0)
        tl.store(low_rank + place, total, mask=inside)
        start += tl.num_programs(0) * BLOCK
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < entries:
        entry = start + tl.arange(0, BLOCK)
        total_sq = tl.load(squares + entry, mask=entry < entries, other=0.0)
        for index in range(first, last):
            one = arrivals + index * 3
            count = tl.load(one + 2)
            offset = entry - tl.load(one + 1)
            kept = (entry < entries) & (offset >= 0) & (offset < count)
            norm = tl.load(wire + tl.load(one) + rank * count + offset, mask=kept, other=0.0).to(tl.float64)
            total_sq += norm * norm
        tl.store(squares + entry, total_sq, mask=entry < entries)
        start += tl.num_programs(0) * BLOCK
