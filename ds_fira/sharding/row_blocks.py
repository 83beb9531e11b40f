"""Geometry of a fragment in rows: which blocks of its matrix it is, and which rows and columns it touches.

A fragment is a range of elements of a row-major (m, n) matrix: at most a part of a first row, whole rows, a part of a
last row. Each of these is a `RowBlock`, which a 2-D view of the fragment shows without copying anything:

    row 2     . . . . a a a     block (1 row, columns 4 to 7)
    row 3     b b b b b b b     block (2 rows, all columns)
    row 4     b b b b b b b
    row 5     c c . . . . .     block (1 row, columns 0 to 2)

Of a slice of some columns it is likewise a range of elements of the slice.

Ranges are half-open and count rows or columns of the whole matrix. Nothing here holds a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ds_fira.sharding.geometry import MatrixShard


@dataclass(frozen=True, slots=True)
class RowBlock:
    """A block of a matrix that lies contiguously in a fragment.

    Attributes:
        rows: the block's rows.
        columns: the block's columns; all of them, or all of the slice, where it has more than one row.
        offset: its first element in the fragment.
    """

    rows: range
    columns: range
    offset: int

    def view(self, fragment: Tensor) -> Tensor:
        """The block as a (rows, columns) view of the fragment, which is 1-D."""
        rows, columns = len(self.rows), len(self.columns)
        return fragment.narrow(0, self.offset, rows * columns).view(rows, columns)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Entries of R, or rows of P, that one sharer borrows of another.

    Attributes:
        borrower: the dp_rank that touches them.
        keeper: the dp_rank that keeps them.
        entries: of R columns on the left, rows on the right; rows of P.
    """

    borrower: int
    keeper: int
    entries: range


def row_blocks(fragment: MatrixShard) -> tuple[RowBlock, ...]:
    """The one to three blocks that tile a fragment, in its order."""
    span, blocks = fragment.span, []
    n, position = len(span), fragment.start
    while position < fragment.stop:
        (row, column), left = divmod(position, n), fragment.stop - position
        if column == 0 and left >= n:
            rows, columns = range(row, row + left // n), span
        else:
            rows, columns = range(row, row + 1), span[column : column + left]
        blocks.append(RowBlock(rows, columns, position - fragment.start))
        position += len(rows) * len(columns)
    return tuple(blocks)


def touched_rows(fragment: MatrixShard) -> range:
    """The rows that a fragment holds any element of."""
    n = len(fragment.span)
    return range(fragment.start // n, -(-fragment.stop // n))


def kept_rows(fragment: MatrixShard) -> range:
    """The rows whose first element a fragment holds: over the fragments of a matrix every row is kept once.

    All that it touches but the first, where that begins in another fragment; empty inside one row.
    """
    n = len(fragment.span)
    return range(-(-fragment.start // n), -(-fragment.stop // n))


def touched_columns(fragment: MatrixShard) -> range:
    """The columns from the first to the last that a fragment holds any element of."""
    span, rows = fragment.span, touched_rows(fragment)
    before = rows.start * len(span)
    return span if len(rows) > 1 else span[fragment.start - before : fragment.stop - before]


def common(first: range, second: range) -> range:
    """The overlap of two ranges."""
    start = max(first.start, second.start)
    return range(start, max(start, min(first.stop, second.stop)))


def hull(first: range, second: range) -> range:
    """The smallest range that contains both; an empty one does not count."""
    if not len(first) or not len(second):
        return first if len(first) else second
    return range(min(first.start, second.start), max(first.stop, second.stop))


def even_share(span: range, sharers: Sequence[int], dp_rank: int) -> range:
    """The part of a span that one of several sharers has where all take as many."""
    place, count = sharers.index(dp_rank), len(sharers)
    return span[place * len(span) // count : (place + 1) * len(span) // count]


def inside(part: range, span: range) -> slice:
    """The slice that takes `part` out of a tensor whose entries stand for `span`."""
    return slice(part.start - span.start, part.stop - span.start)
