"""Fragments of matrices that ZeRO splits: the parts of rows at their edges.

Whole rows of a fragment are a matrix, which the kernels of any matrix take. One that begins or ends inside a row has up
to two *edges* beside them, parts of one row each: too little work to be tuned, and all of a turn in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.moving import table_of
from ds_fira.core.kernels.stored import store_rounded
from ds_fira.core.kernels.tiles import launch
from ds_fira.core.kernels.views import View, origin
from ds_fira.core.subspace import Side

# Columns of an edge, and entries of R's other axis, that a program handles at a time.
COLUMNS, ENTRIES = 128, 16


class Edge(NamedTuple):
    """A part of one row of a matrix.

    Attributes:
        place: of its first element in weights and gradient, which lie alike.
        count: its elements; 0 for no edge.
        line: on the left its first column's place among the entries of R; on the right its row's.
        basis_row: of the rows of P that the rank works with, on the left its row's; on the right its first column's.
    """

    place: int = 0
    count: int = 0
    line: int = 0
    basis_row: int = 0


class Edges(NamedTuple):
    """What a fragment has beside whole rows.

    Attributes:
        low_rank: place of R over the entries that the rank works on, float32.
        squares: place of the squared norms of the gradient's columns or rows.
        entries: how many.
        is_added: 1 where whole rows have been projected into R and the norms, to which edges add on the left; else 0.
        low_rank_update: place of C over the same entries, float32.
        scales: place of the factors of the gradient, float32.
        pair: the edges.
    """

    low_rank: int
    squares: int
    entries: int
    is_added: int
    low_rank_update: int
    scales: int
    pair: tuple[Edge, Edge]

    def row(self) -> tuple[int, ...]:
        """As the kernels take it."""
        return (*self[:6], *self.pair[0], *self.pair[1])


def launch_project_edges(
    grad: Tensor, basis: View, words: Tensor, doubles: Tensor, edges: Sequence[Edges], rank: int, side: Side
) -> None:
    """Line 8 of Algorithm 1 for the edges of fragments, behind that of their whole rows.

    Args:
        grad: the tensor in which places of edges count.
        basis: of every fragment the rows of P that it works with.
        words: holds R.
        doubles: holds the squared norms.
        edges: of every fragment.
        rank: r.
        side: the projected side.
    """
    table = table_of(grad.device, tuple(each.row() for each in edges))
    kernel, grid = _project_right_edges, (triton.cdiv(rank, ENTRIES), 2 * len(edges))
    if side == "left":
        longest = max(each.entries for each in edges)
        kernel, grid = _project_left_edges, (triton.cdiv(longest, COLUMNS), len(edges))
    launch(kernel, grid, grad, grad, basis, words, doubles, table, rank, COLUMNS=COLUMNS, ENTRIES=ENTRIES, num_warps=4)


def launch_update_edges(
    weight: Tensor,
    grad: Tensor,
    basis: View,
    words: Tensor,
    edges: Sequence[Edges],
    rank: int,
    decay_factor: float,
    side: Side,
    steps: View | None,
    *,
    scaled: bool,
    one: bool,
) -> None:
    """Line 16 for the edges of fragments; what it takes as in `launch_project_edges`.

    Args:
        weight: changed.
        grad: of the same size.
        basis: as there.
        words: holds C and the factors of the gradient.
        edges: of every fragment.
        rank: r.
        decay_factor: the share of the weights that weight decay leaves.
        side: as there.
        steps: the `count` of `launch_update`, of every fragment.
        scaled: whether the update has a part of the gradient.
        one: whether one factor is for all entries.
    """
    table = table_of(grad.device, tuple(each.row() for each in edges))
    longest = max(edge.count for each in edges for edge in each.pair)
    launch(
        _update_edges,
        (triton.cdiv(longest, COLUMNS), 2 * len(edges)),
        weight,
        weight,
        grad,
        basis,
        words,
        table,
        rank,
        float(decay_factor),
        steps,
        LEFT=side == "left",
        SCALED=scaled,
        NOISY=steps is not None and weight.dtype == torch.bfloat16,
        ONE=one,
        COLUMNS=COLUMNS,
        ENTRIES=ENTRIES,
        num_warps=4,
    )


@triton.jit
def _edge(grad, row, column, inside):
    """Values of an edge at some columns of R, zero elsewhere; `row` is where its numbers are in the table."""
    offset = column - tl.load(row + 2)
    inside = inside & (offset >= 0) & (offset < tl.load(row + 1))
    return tl.load(grad + tl.load(row) + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _project_left_edges(grad, basis, words, doubles, table, rank, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr):
    fragment = tl.program_id(1).to(tl.int64)
    row = table + fragment * 14
    low_rank, squares = words + tl.load(row), doubles + tl.load(row + 1)
    entries = tl.load(row + 2)
    added = tl.load(row + 3) != 0
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < entries
    head = _edge(grad, row + 6, column, inside)
    tail = _edge(grad, row + 10, column, inside)
    total_sq = tl.load(squares + column, mask=inside & added, other=0.0)
    total_sq += (head * head).to(tl.float64) + (tail * tail).to(tl.float64)
    tl.store(squares + column, total_sq, mask=inside)
    basis_at = origin(basis, fragment)
    head_at = basis_at + tl.load(row + 9) * basis.rows
    tail_at = basis_at + tl.load(row + 13) * basis.rows
    for start in range(0, rank, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        head_row = tl.load(head_at + entry * basis.columns, mask=entry < rank, other=0.0).to(tl.float32)
        tail_row = tl.load(tail_at + entry * basis.columns, mask=entry < rank, other=0.0).to(tl.float32)
        at = low_rank + entry.to(tl.int64)[:, None] * entries + column[None, :]
        there = (entry < rank)[:, None] & inside[None, :]
        value = tl.load(at, mask=there & added, other=0.0)
        value += head_row[:, None] * head[None, :] + tail_row[:, None] * tail[None, :]
        tl.store(at, value, mask=there)


@triton.jit
def _project_right_edges(grad, basis, words, doubles, table, rank, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr):
    fragment = tl.program_id(1).to(tl.int64) // 2
    row = table + fragment * 14
    edge = row + 6 + tl.program_id(1) % 2 * 4
    count = tl.load(edge + 1)
    if count == 0:
        return
    first = grad + tl.load(edge)
    line = tl.load(edge + 2)
    basis_at = origin(basis, fragment) + tl.load(edge + 3) * basis.rows
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    total = tl.zeros((ENTRIES,), dtype=tl.float32)
    squares = tl.zeros((COLUMNS,), dtype=tl.float64)
    start = count * 0
    while start < count:
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(first + column, mask=column < count, other=0.0).to(tl.float32)
        squares += (value * value).to(tl.float64)
        at = basis_at + column[:, None] * basis.rows + entry[None, :] * basis.columns
        part = tl.load(at, mask=(column < count)[:, None] & (entry < rank)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * part, axis=0)
        start += COLUMNS
    tl.store(words + tl.load(row) + line * rank + entry, total, mask=entry < rank)
    if tl.program_id(0) == 0:
        tl.store(doubles + tl.load(row + 1) + line, tl.sum(squares, axis=0))


@triton.jit
def _update_edges(
    weight,
    grad,
    basis,
    words,
    table,
    rank,
    decay_factor,
    steps,
    LEFT: tl.constexpr,
    SCALED: tl.constexpr,
    NOISY: tl.constexpr,
    ONE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    fragment = tl.program_id(1).to(tl.int64) // 2
    row = table + fragment * 14
    edge = row + 6 + tl.program_id(1) % 2 * 4
    first, count, line = tl.load(edge), tl.load(edge + 1), tl.load(edge + 2)
    entries = tl.load(row + 2)
    low_rank_update, scales = words + tl.load(row + 4), words + tl.load(row + 5)
    basis_at = origin(basis, fragment) + tl.load(edge + 3) * basis.rows
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < count
    update = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, rank, ENTRIES):
        entry = (start + tl.arange(0, ENTRIES)).to(tl.int64)
        there = (entry < rank)[:, None] & inside[None, :]
        # The row that is one number for each of r, and the matrix of those for each column.
        if LEFT:
            own_at = basis_at + entry * basis.columns
            other_at = low_rank_update + entry[:, None] * entries + (line + column)[None, :]
        else:
            own_at = low_rank_update + line * rank + entry
            other_at = basis_at + column[None, :] * basis.rows + entry[:, None] * basis.columns
        own = tl.load(own_at, mask=entry < rank, other=0.0).to(tl.float32)
        update += tl.sum(own[:, None] * tl.load(other_at, mask=there, other=0.0).to(tl.float32), axis=0)
    if SCALED:
        if ONE:
            scale = tl.load(scales + column * 0, mask=inside, other=0.0)
        elif LEFT:
            scale = tl.load(scales + line + column, mask=inside, other=0.0)
        else:
            scale = tl.load(scales + line + column * 0, mask=inside, other=0.0)
        update += scale * tl.load(grad + first + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(weight + first + column, mask=inside, other=0.0).to(tl.float32) * decay_factor - update
    seed = -tl.load(origin(steps, fragment)).to(tl.int64) if NOISY else first
    store_rounded(weight + first + column, value, first + column, seed, inside, NOISY)
