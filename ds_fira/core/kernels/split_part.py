"""One rank's part of a matrix in the memory of a step by kernels: where its tensors lie, and what is read of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_fira.core.kernels import numbers as places
from ds_fira.core.kernels.device_stats import DeviceStats
from ds_fira.core.kernels.fragments import Edges
from ds_fira.core.kernels.measuring import Memory
from ds_fira.core.kernels.numbers import launch_tally
from ds_fira.core.kernels.views import Origin, View, origins
from ds_fira.core.normalized import require_average
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState
from ds_fira.core.subspace import Side


@dataclass(frozen=True, slots=True)
class SplitPart:
    """One rank's part of a matrix, and where its tensors lie in the memory of a step.

    Attributes:
        kind: what parts alike have in common, but for their states.
        side: the projected side.
        shape: (m, n) of the whole matrix.
        rank: r.
        width: elements of a row: n, or those of a slice of columns.
        rows: whole rows that the rank holds, or whole rows of the slice.
        body: place of the first of them in weights and gradient.
        body_line: on the right its place among the entries of R that the rank works on; 0 on the left.
        body_basis: the row of P that it is multiplied with first, of those that the rank works with.
        region: entries of R that the rank works on.
        kept: those of them that it keeps.
        kept_start: the place of the first.
        basis: place of the rows of P that the rank works with, float32; None where its state has them.
        low_rank: of R over the region, float32 as all up to `scales`.
        kept_low_rank: of R over the entries kept.
        direction: of N, then C, over the entries kept; on the right over the region.
        low_rank_update: of C over the region, and of N before where borrowers make C.
        spare: of N again, over the entries kept; None where it is not needed.
        scales: of the factors of the gradient, over the region.
        grad_sq: of |G_j|^2 over the region, float64 as all behind it.
        direction_sq: of |N_j|^2 over the entries kept.
        low_rank_sq: of |R_j|^2 over the entries kept.
        phi: before the limiter, over the region.
        numbers: see `ds_fira.core.kernels.numbers`.
        exact: of |S|^2 from the residual itself.
        edges: parts of rows that the rank holds; None for none.
    """

    kind: Hashable
    side: Side
    shape: tuple[int, int]
    rank: int
    width: int
    rows: int
    body: int
    body_line: int
    body_basis: int
    region: int
    kept: int
    kept_start: int
    basis: int | None
    low_rank: int
    kept_low_rank: int
    direction: int
    low_rank_update: int
    spare: int | None
    scales: int
    grad_sq: int
    direction_sq: int
    low_rank_sq: int
    phi: int
    numbers: int
    exact: int
    edges: Edges | None

    @property
    def left(self) -> bool:
        """Whether the left side is projected."""
        return self.side == "left"


# A part, and its state.
Held = tuple[SplitPart, MatrixState]


class SplitStats(DeviceStats):
    """`StepStats` of one matrix that looks a number up when it is asked for; all of them are on the device."""

    def __init__(self, doubles: Tensor, numbers: int, settings: GroupSettings) -> None:
        self._doubles, self._numbers, self._settings = doubles, numbers, settings

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self._doubles.device

    def add_to_(self, sums: Tensor, residual_scale: float) -> None:
        """As `StepStats.add_to_`, by one kernel."""
        launch_tally(sums, View(self._doubles, places.NUMBERS, start=self._numbers), 1, residual_scale)

    def _number(self, place: int) -> Tensor:
        return self._doubles[self._numbers + place]

    @property
    def low_rank_sq(self) -> Tensor:
        """|R|^2, (1,)."""
        return self._number(places.LOW_RANK_SQ).unsqueeze(0)

    def quotient(self) -> tuple[Tensor, Tensor, float]:
        """As `step_stats` of a split matrix has it: the ranks that keep the entries record them."""
        return self.low_rank_sq, self.low_rank_sq, 1.0


def quotient_of(doubles: Tensor, part: SplitPart, settings: GroupSettings) -> tuple[Tensor, Tensor, Tensor]:
    starts = (part.grad_sq + part.kept_start, part.direction_sq, part.low_rank_sq)
    squares = settings.residual_form.squares(*(doubles[start : start + part.kept] for start in starts), settings)
    start, count = (part.phi, 1) if settings.has_one_factor else (part.phi + part.kept_start, part.kept)
    phi = None if settings.residual_form.factors is None else doubles[start : start + count].expand(part.kept)
    return settings.residual_form.recorded(squares, phi, doubles[part.numbers + places.BIAS_CORRECTION])


def by_kind(parts: Iterable[Held]) -> Iterator[tuple[SplitPart, list[Held]]]:
    """Parts alike, with the first of them."""
    kinds: dict[Hashable, list[Held]] = {}
    for part, state in parts:
        kept = [(name, suffix, each.dtype) for name, stored in state.moments.items() for suffix, each in stored.items()]
        key = (part.kind, state.basis.dtype, state.basis.stride(), tuple(kept), state.residual_avg_sq is None)
        kinds.setdefault(key, []).append((part, state))
    for alike in kinds.values():
        yield alike[0][0], alike


def with_edges(parts: Sequence[Held]) -> Iterator[tuple[Side, list[Held]]]:
    """Parts that begin or end inside a row, by side, rank and where their rows of P are."""
    kinds: dict[Hashable, list[Held]] = {}
    for part, state in parts:
        if part.edges is not None:
            key = (part.side, part.rank, part.basis is None, state.basis.dtype, state.basis.stride())
            kinds.setdefault(key, []).append((part, state))
    for alike in kinds.values():
        yield alike[0][0].side, alike


def strided(basis: View, alike: Sequence[Held]) -> View:
    """A view of the rows of P that parts alike work with, with their strides."""
    part, state = alike[0]
    rows, columns = state.basis.stride() if part.basis is None else (part.rank, 1)
    return basis._replace(rows=rows, columns=columns)


def memory_of(alike: Sequence[Held], settings: GroupSettings) -> Memory:
    """What parts alike keep from step to step beside basis and moments."""
    states, form = [state for _, state in alike], settings.residual_form
    operands: list[list[Origin]] = [[(state.step, 0) for state in states]]
    if settings.has_limiter:
        operands.append([(state.residual_norm, 0) for state in states])
    if form.averages and (alike[0][0].kept or settings.has_one_factor):
        for state in states:
            require_average(state, settings)
        if states[0].residual_avg_sq is not None:
            operands.append([(state.residual_avg_sq, 0) for state in states])
    step, *others = origins(operands)
    norm = others.pop(0) if settings.has_limiter else None
    return Memory(step, norm, others[0] if others else None)
