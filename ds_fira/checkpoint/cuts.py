"""Slices of parameters under tensor parallelism: which rows or columns each has, and how one is read from others.

A run with other slices than the one that saved reads its own out of those, or out of wholes. Nothing is put together
but the rows that are asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_fira.checkpoint.slices import overlap
from ds_fira.sharding.slice_names import param_of

Runs = tuple[range, ...]
# Gives elements start to stop of what is saved under a label.
ReadFlat = Callable[[str, int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows or the columns that a slice of a parameter has, in the slice's order.

    Attributes:
        label: the name by which its elements are counted (`ParamSlice.name`).
        shape: (m, n) of the whole parameter; (m, 1) where it is a vector.
        axis: 0 where it has rows, 1 where it has columns.
        runs: of these.
    """

    label: str
    shape: tuple[int, int]
    axis: int
    runs: Runs

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> Cut:
        """A parameter that is not cut."""
        m, n = matrix_shape(shape)
        return cls(name, (m, n), 0, (range(m),))

    @property
    def param(self) -> str:
        """The name of the parameter."""
        return param_of(self.label)

    @property
    def width(self) -> int:
        """Columns of the slice."""
        return self.shape[1] if self.axis == 0 else sum(map(len, self.runs))

    @property
    def numel(self) -> int:
        """Elements of the slice."""
        return self.width * (sum(map(len, self.runs)) if self.axis == 0 else self.shape[0])

    def along(self, axis: int) -> Runs:
        """Its rows or its columns, of the whole."""
        return self.runs if axis == self.axis else (range(self.shape[axis]),)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of a parameter as rows and columns; of a vector it has one column."""
    return (int(shape[0]), int(shape[1])) if len(shape) == 2 else (int(shape[0]), 1)


def _places(wanted: range, cuts: Sequence[Cut]) -> list[tuple[int, range, Cut]]:
    """Where some numbers stand among those that the cuts hold along their axis: each part's first, in order."""
    found = []
    for cut in cuts:
        first = 0
        for run in cut.runs:
            common = overlap(wanted, run)
            if len(common):
                begin = first + common.start - run.start
                found.append((common.start, range(begin, begin + len(common)), cut))
            first += len(run)
    return sorted(found, key=lambda part: part[0])


def _between(runs: Runs, start: int, stop: int) -> Runs:
    """The numbers at the positions from start to before stop of the runs."""
    firsts = itertools.accumulate(map(len, runs), initial=0)
    parts = [run[max(0, start - first) : max(0, stop - first)] for run, first in zip(runs, firsts, strict=False)]
    return tuple(part for part in parts if len(part))


def moves(before: Sequence[Cut], now: Sequence[Cut], axis: int) -> list[tuple[range, int]]:
    """Where the rows or the columns of a matrix were among those of all slices, and where they begin now.

    The matrix that the algorithm steps has the rows, or the columns, of the first slice first.
    """
    found, first = [], 0
    order = [run for cut in now if cut.axis == axis for run in cut.runs] or [*now[0].along(axis)]
    together = Cut("", now[0].shape, axis, tuple(order))
    for run in [run for cut in before if cut.axis == axis for run in cut.runs] or before[0].along(axis):
        for start, place, _ in _places(run, [together]):
            begin = first + start - run.start
            found.append((range(begin, begin + len(place)), place.start))
        first += len(run)
    return found


@dataclass(frozen=True, slots=True)
class Recut:
    """How one slice is read of what was saved.

    Attributes:
        own: the slice.
        before: the slices of the same parameter in the run that saved.
    """

    own: Cut
    before: tuple[Cut, ...]

    def sources(self, saved: Mapping[str, object]) -> tuple[Cut, ...]:
        """Choose what to read: the same slice if it was saved, else the whole parameter, else those that were saved.

        Args:
            saved: by label; what is not there may be empty.
        """
        if self.own in self.before and saved.get(self.own.label):
            return (self.own,)
        whole = Cut.whole(self.own.param, self.own.shape)
        return (whole,) if saved.get(whole.label) else self.before

    def read(self, cuts: Sequence[Cut], start: int, stop: int, read_flat: ReadFlat) -> Tensor:
        """Some elements of the slice.

        Args:
            cuts: of `sources`.
            start: the first of the slice's elements, in row-major order.
            stop: one past the last.
            read_flat: reads elements of one of the cuts.
        """
        width = self.own.width
        first, last = start // width, -(-stop // width)
        found = [
            self._rows(run, cuts, read_flat, self.own.along(1)) for run in _between(self.own.along(0), first, last)
        ]
        return torch.cat(found).reshape(-1)[start - first * width : stop - first * width]

    @staticmethod
    def _rows(rows: range, cuts: Sequence[Cut], read_flat: ReadFlat, columns: Runs) -> Tensor:
        """Columns of consecutive rows of the whole parameter."""

        def block(cut: Cut, rows: range) -> Tensor:
            return read_flat(cut.label, rows.start * cut.width, rows.stop * cut.width).view(-1, cut.width)

        if cuts[0].axis == 0:
            whole = [block(cut, place) for _, place, cut in _places(rows, cuts)]
            return torch.cat([torch.cat([part[:, run.start : run.stop] for run in columns], dim=1) for part in whole])
        parts = [part for run in columns for part in _places(run, cuts)]
        return torch.cat([block(cut, rows)[:, place.start : place.stop] for _, place, cut in parts], dim=1)
