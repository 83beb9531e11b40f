"""Geometry of a fragment in rows: which blocks of its matrix it is, and which entries of R it touches and keeps.

A fragment is a range of elements of a row-major (m, n) matrix: at most a part of a first row, whole rows, a part of a
last row. Each of these is a `RowBlock`, a block that can be seen as a 2-D view without copying anything:

    row 2     . . . . a a a     piece (2, 1 row, columns 4 to 7)
    row 3     b b b b b b b     piece (3, 2 rows, all columns)
    row 4     b b b b b b b
    row 5     c c . . . . .     piece (5, 1 row, columns 0 to 2)

Ranges are half-open and count rows or columns of the whole matrix. Nothing here holds a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ds_fira.sharding.geometry import MatrixShard


@dataclass(frozen=True, slots=True)
class RowBlock:
    """A block of a matrix that lies contiguously in a fragment.

    Attributes:
        rows: the block's rows.
        columns: the block's columns; all of them where it has more than one row.
        offset: its first element in the fragment.
    """

    rows: range
    columns: range
    offset: int

    def view(self, fragment: Tensor) -> Tensor:
        """The block as a (rows, columns) view of the fragment, which is 1-D."""
        numel = len(self.rows) * len(self.columns)
        return fragment.narrow(0, self.offset, numel).view(len(self.rows), len(self.columns))


def row_blocks(fragment: MatrixShard) -> tuple[RowBlock, ...]:
    """The one to three blocks that tile a fragment, in its order."""
    n = fragment.shape[1]
    pieces = []
    position = fragment.start
    while position < fragment.stop:
        row, column = divmod(position, n)
        whole = (fragment.stop - position) // n if column == 0 else 0
        if whole:
            piece = RowBlock(range(row, row + whole), range(n), position - fragment.start)
        else:
            columns = range(column, min(n, column + fragment.stop - position))
            piece = RowBlock(range(row, row + 1), columns, position - fragment.start)
        pieces.append(piece)
        position += len(piece.rows) * len(piece.columns)
    return tuple(pieces)


def touched_rows(fragment: MatrixShard) -> range:
    """The rows that a fragment holds any element of."""
    n = fragment.shape[1]
    return range(fragment.start // n, -(-fragment.stop // n))


def kept_rows(fragment: MatrixShard) -> range:
    """The rows whose first element a fragment holds: over the fragments of a matrix every row is kept once.

    All that it touches but the first, where that begins in another fragment; empty inside one row.
    """
    n = fragment.shape[1]
    return range(-(-fragment.start // n), -(-fragment.stop // n))


def column_span(fragment: MatrixShard) -> range:
    """The columns from the first to the last that a fragment holds any element of."""
    pieces = row_blocks(fragment)
    return range(min(piece.columns.start for piece in pieces), max(piece.columns.stop for piece in pieces))


def common(first: range, second: range) -> range:
    """What two ranges have in common."""
    start = max(first.start, second.start)
    return range(start, max(start, min(first.stop, second.stop)))


def hull(first: range, second: range) -> range:
    """The smallest range with both in it; an empty one has no place."""
    if not len(first) or not len(second):
        return first if len(first) else second
    return range(min(first.start, second.start), max(first.stop, second.stop))


def inside(part: range, whole: range) -> slice:
    """Where `part` lies in a tensor whose entries stand for `whole`, of which it is a part."""
    return slice(part.start - whole.start, part.stop - whole.start)
