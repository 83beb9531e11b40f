"""The step of k matrices of one shape by kernels: `ds_fira.core.step.update` where the device decides everything.

    _cast               P in bfloat16, where products are and P is not stored so
    _project            line 8: R, and the norms of G's columns or rows
    _adam_direction     lines 9 to 11: moments, N, and the norms of N and R; `_adam_blocks` before it for 8-bit moments
    _measure            lines 12 and 13: phi, |S|^2 as a difference
    _residual_square    |S|^2 from the residual, of the matrices whose difference has lost its digits
    _combine            lines 14 and 15: the limiter, C; the step count
    _apply_update       line 16: W

The matrices may be tensors of their own. What the kernels need beside them is two allocations, and a third for products
in bfloat16; what metrics and recorders read of the step stays there, and is looked up when they ask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_fira.core.base_optimizer import adapt, step_factor
from ds_fira.core.kernels import numbers as places
from ds_fira.core.kernels.casting import launch_cast
from ds_fira.core.kernels.combining import launch_combine
from ds_fira.core.kernels.device_stats import DeviceStats
from ds_fira.core.kernels.finite import Finite
from ds_fira.core.kernels.measuring import Memory, Squares, launch_measure
from ds_fira.core.kernels.moments import launch_adam
from ds_fira.core.kernels.numbers import NUMBERS, launch_tally
from ds_fira.core.kernels.projection import launch_project, strips
from ds_fira.core.kernels.residual import launch_residual_square, programs
from ds_fira.core.kernels.stored import Moment, moment
from ds_fira.core.kernels.update import launch_update
from ds_fira.core.kernels.views import Origin, Room, View, origins
from ds_fira.core.normalized import require_average
from ds_fira.core.scalars import is_finite
from ds_fira.core.state import EXP_AVG, EXP_AVG_SQ, MatrixState

if TYPE_CHECKING:
    from ds_fira.core.residuals import ResidualForm
    from ds_fira.core.settings import GroupSettings
    from ds_fira.core.step import MatrixTask


def step_together(tasks: Sequence[MatrixTask]) -> BatchStats:
    """Step matrices that all have a basis: weights and states change in place where the gradient is finite.

    Args:
        tasks: of matrices alike in shape, strides, dtypes, device and settings, one each; or one task of a batch. One
            task of one matrix, where the settings have a rule.

    Returns:
        The numbers of the step, those of a batch with a leading dimension.

    Raises:
        ValueError: as `ds_fira.core.normalized.require_average`.
    """
    return _BatchStep(tasks).make()


class _BatchStep:
    """One step of k matrices: where everything is."""

    def __init__(self, tasks: Sequence[MatrixTask]) -> None:
        first = tasks[0]
        self.state, self.settings, self.ratio = first.state, first.settings, first.negligible_ratio
        weight, grad = first.places()
        *batch, self.m, self.n = weight.shape
        self.is_batch = bool(batch) or len(tasks) > 1
        self.count, self.rank = batch[0] if batch else len(tasks), self.state.basis.shape[-1]
        self.left = self.state.side == "left"
        self.lines = self.n if self.left else self.m
        form, one = self.settings.residual_form, self.settings.has_one_factor
        if form.averages:
            require_average(self.state, self.settings)

        # The rank's memory of every matrix; that of a batch has a leading dimension.
        def kept(get: Callable[[MatrixState], Tensor]) -> list[Origin]:
            if batch:
                tensor = get(self.state)
                return [(tensor, place * tensor.stride(0)) for place in range(self.count)]
            return [(get(task.state), 0) for task in tasks]

        pairs = [task.places() for task in tasks]
        basis, bases = self.state.basis, kept(lambda state: state.basis)
        if self.settings.draws_basis:
            basis = torch.stack([task.state.projector() for task in tasks])
            bases = [(basis, place * basis.stride(0)) for place in range(self.count)]
        operands: dict[str, list[Origin]] = {
            "weight": [origin for each, _ in pairs for origin in each.origins()],
            "grad": [origin for _, each in pairs for origin in each.origins()],
            "basis": bases,
            "step": kept(lambda state: state.step),
        }
        moments = () if self.settings.rule is not None else (EXP_AVG, EXP_AVG_SQ)
        for name in moments:
            for suffix in self.state.moments[name]:
                operands[name + suffix] = kept(lambda state, name=name, suffix=suffix: state.moments[name][suffix])
        if self.settings.has_limiter:
            operands["residual_norm"] = kept(lambda state: state.residual_norm)
        if form.averages and self.state.residual_avg_sq is not None:
            operands["residual_avg_sq"] = kept(lambda state: state.residual_avg_sq)
        views = dict(zip(operands, origins(list(operands.values())), strict=True))

        def strided(name: str, strides: Sequence[int]) -> View:
            return views[name]._replace(rows=strides[-2], columns=strides[-1])

        self.weight, self.grad = strided("weight", weight.strides), strided("grad", grad.strides)
        self.basis = strided("basis", basis.stride())
        self.step = views["step"]
        self.memory = Memory(self.step, views.get("residual_norm"), views.get("residual_avg_sq"))
        self.moments: list[Moment] = []
        for name in moments:
            stored = self.state.moments[name]
            self.moments.append(moment(stored, [views[name + suffix] for suffix in stored]))
        self.shape = (self.rank, self.n) if self.left else (self.m, self.rank)

        count, precision = self.count, self.settings.chosen_precision
        factors = 0 if form.factors is None else 1 if one else self.lines
        self.strips = strips(self.lines, precision)
        self.parts = programs(self.m, self.n, precision) if self.settings.measures_residual else 0
        self.singles, self.doubles = Room(), Room()
        self.low_rank, self.direction = (self.singles.reserve(count, self.rank * self.lines) for _ in range(2))
        self.scales = self.singles.reserve(count, factors)
        self.strip_sq = self.doubles.reserve(count, self.strips)
        self.squares = [self.doubles.reserve(count, self.lines) for _ in range(3)]
        self.phi, self.partial = self.doubles.reserve(count, factors), self.doubles.reserve(count, self.parts)
        self.numbers = self.doubles.reserve(count, NUMBERS)
        device = weight.tensor.device
        self.singles.allocate(torch.float32, device)
        self.doubles.allocate(torch.float64, device)
        # What products in bfloat16 read many times, P and C, is rounded to it once.
        self.halves, half = Room(), precision == "bfloat16"
        self.casts_basis = half and basis.dtype != torch.bfloat16
        self.rounded_basis = self.halves.reserve(count, self.casts_basis * self.rank * (self.m + self.n - self.lines))
        self.low_rank_update = self.halves.reserve(count, half * self.rank * self.lines)
        if half:
            self.halves.allocate(torch.bfloat16, device)

    def make(self) -> BatchStats:
        """Lines 8 to 16."""
        settings, side, rule = self.settings, self.state.side, self.settings.rule
        precision, by_row = settings.chosen_precision, not self.left
        sizes, update_rank = (self.count, self.m, self.n, self.rank), settings.update_rank(self.rank)
        low_rank, direction = (self.singles.view(place, self.shape[1], 1) for place in (self.low_rank, self.direction))
        squares = Squares(*(self.doubles.view(place) for place in self.squares))
        strip_sq, numbers = self.doubles.view(self.strip_sq), self.doubles.view(self.numbers)
        grad_finite = Finite(None, strip_sq, self.strips)
        low_rank_update = (
            self.halves.view(self.low_rank_update, self.shape[1], 1) if precision == "bfloat16" else direction
        )
        if self.casts_basis:
            basis = self.halves.view(self.rounded_basis, self.rank, 1)
            launch_cast(self.basis, basis, (self.count, self.m + self.n - self.lines, self.rank))
            self.basis = basis
        launch_project(self.grad, self.basis, low_rank, squares.grad, strip_sq, sizes, side, precision)
        if rule is None:
            launch_adam(
                low_rank,
                tuple(self.moments),
                direction,
                (squares.direction, squares.low_rank),
                grad_finite,
                self.step,
                (self.count, *self.shape),
                betas=settings.betas,
                eps=settings.eps,
                side=side,
            )
        else:
            self._advance_by_rule()
        # One factor for all is one number.
        along = 0 if settings.has_one_factor else 1
        phi, scales = self.doubles.view(self.phi, along), self.singles.view(self.scales, along)
        launch_measure(
            squares, phi, numbers, grad_finite, self.memory, sizes, settings, side=side, given=rule is not None
        )
        partial = self.doubles.view(self.partial)
        if self.parts:
            needed = numbers._replace(start=numbers.start + places.NEEDED)
            launch_residual_square(
                self.grad,
                *self._factors(low_rank),
                phi,
                needed,
                partial,
                sizes,
                settings.inner_alpha,
                by_row=by_row,
                precision=precision,
            )
        launch_combine(
            low_rank,
            direction,
            low_rank_update,
            phi,
            scales,
            numbers,
            partial,
            self.memory,
            (self.count, update_rank, self.lines, self.parts),
            settings,
            side=side,
            negligible_ratio=self.ratio,
        )
        launch_update(
            self.weight,
            self.grad,
            *self._factors(low_rank_update),
            None if settings.residual_form.factors is None else scales,
            numbers._replace(start=numbers.start + places.FINITE),
            (*sizes[:3], update_rank),
            numbers._replace(start=numbers.start + places.DECAY),
            numbers._replace(start=numbers.start + places.COUNT) if settings.rounds_stochastically else None,
            by_row=by_row,
            precision=precision,
        )
        return BatchStats(self)

    def _factors(self, inner: View) -> tuple[View, View]:
        """The two factors of a product with the basis, (m, r) and (r, n)."""
        if self.left:
            return self.basis, inner
        return inner, self.basis._replace(rows=self.basis.columns, columns=self.basis.rows)

    def _advance_by_rule(self) -> None:
        """Lines 9 to 11 of Algorithm 2 in torch, for one matrix; step count and factor of the step size with them."""
        state, batch = self.state, self.state.step.shape
        finite = is_finite(self.doubles.read(self.squares[0], batch, self.lines).sum(-1), state.dtype)
        state.step += finite
        bias_correction = self.doubles.read(self.numbers, batch, start=places.BIAS_CORRECTION)
        bias_correction.copy_(step_factor(state.step, self.settings))
        low_rank = self.singles.read(self.low_rank, batch, *self.shape)
        found = adapt(low_rank, state, self.settings, finite)
        self.singles.read(self.direction, batch, *self.shape).copy_(found[0])
        for place, value in zip(self.squares[1:], found[1:], strict=True):
            self.doubles.read(place, batch, self.lines).copy_(value)


class BatchStats(DeviceStats):
    """`StepStats` that looks a number up when it is asked for; all of them are on the device."""

    def __init__(self, step: _BatchStep) -> None:
        self._form: ResidualForm = step.settings.residual_form
        self._settings: GroupSettings = step.settings
        self._doubles, self._places, self._phi, self._squares = step.doubles, step.numbers, step.phi, step.squares
        self._count, self._lines = step.count, step.lines
        self._batch = (step.count,) if step.is_batch else ()

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self._doubles.tensor.device

    def add_to_(self, sums: Tensor, residual_scale: float) -> None:
        """As `StepStats.add_to_`, by one kernel."""
        launch_tally(sums, self._doubles.view(self._places), self._count, residual_scale)

    def _number(self, place: int) -> Tensor:
        return self._doubles.read(self._places, self._batch, start=place)

    def _entries(self, place: int) -> Tensor:
        return self._doubles.read(self._squares[place], self._batch, self._lines)

    @property
    def low_rank_sq(self) -> Tensor:
        """|R_j|^2 of every column (left) or row (right)."""
        return self._entries(2)

    def quotient(self) -> tuple[Tensor, Tensor, Tensor]:
        """What phi is the quotient of."""
        grad_sq, direction_sq, low_rank_sq = (self._entries(place) for place in range(3))
        squares = self._form.squares(grad_sq, direction_sq, low_rank_sq, self._settings)
        factors = 1 if self._settings.has_one_factor else self._lines
        phi = None if self._form.factors is None else self._doubles.read(self._phi, self._batch, factors)
        return self._form.recorded(squares, phi, self._number(places.BIAS_CORRECTION))
