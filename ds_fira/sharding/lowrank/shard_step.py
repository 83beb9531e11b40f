"""One rank's part in the step of a split matrix: the phases of `ds_fira.core.step`, without the communication.

A rank works on a *region* of R, the entries (columns on the left, rows on the right) that its fragment touches and
those whose moments it keeps (`ds_fira.sharding.split_matrix`). Where it touches what another rank keeps, it gives its
part of the sums away and gets phi and C for it: `ShardStep.payload` and `ShardStep.complete` are the two ends of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ds_fira.core import functional as F
from ds_fira.core.base_optimizer import adapt, step_factor
from ds_fira.core.norms import total_square
from ds_fira.core.residuals import Squares, StepContext
from ds_fira.core.scalars import Scalar
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState, compute_dtype
from ds_fira.core.step import Quotient, factors, limit, scale
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.row_blocks import RowBlock, Transfer, common, inside


@dataclass(slots=True)
class EntrySteps:
    """What lines 9 to 12 give of the entries of R that a rank keeps.

    Attributes:
        low_rank: R, (r, kept) left or (kept, r) right.
        direction: N, of R's shape.
        squares: of every entry, as `ResidualForm.squares` gives them, (kept,), float64.
        phi: factors before the limiter, (kept,), float64; None until they are known, and without a residual.
    """

    low_rank: Tensor
    direction: Tensor
    squares: Squares
    phi: Tensor | None = None


@dataclass(slots=True)
class ShardStep:
    """One step of one rank's part: views of weight and gradient, the state, and the results so far.

    Attributes:
        plan: what the rank holds, keeps and sends of the matrix.
        weight: the fragment of the weights, 1-D, updated in place.
        grad: the fragment of the gradient, 1-D.
        state: its basis has the rows of P that the plan gives the rank; moments are of the entries it keeps, {} for
            none.
        settings: of the param group.
        negligible_ratio: a residual norm below this share of |phi * G| is rounding.
        low_rank: R over the region, (r, region) left or (region, r) right; None before `project`.
        grad_sq: squared norms of G's columns or rows over the region, float64.
        context: of the whole matrix's step; None before `advance`.
        entries: of the entries kept; None before `advance`, and where the rank keeps none.
        phi: where one factor is for all entries, that; None before `scale`.
    """

    plan: LocalShardPlan
    weight: Tensor
    grad: Tensor
    state: MatrixState
    settings: GroupSettings
    negligible_ratio: float
    low_rank: Tensor | None = None
    grad_sq: Tensor | None = None
    context: StepContext | None = None
    entries: EntrySteps | None = None
    phi: Tensor | None = None
    _basis: Tensor | None = field(default=None, repr=False)

    def grad_square(self) -> Tensor:
        """|G|^2 of the fragment, float64, 0-dim."""
        return sum(total_square(block.view(self.grad), self.state.dtype, self.state.side) for block in self.plan.blocks)

    def basis_payload(self, transfer: Transfer) -> tuple[Tensor]:
        """The rows of P that go over a transfer of `LocalShardPlan.basis_lent`."""
        return (self.state.basis[inside(transfer.entries, self.plan.basis_rows)].to(self.state.dtype),)

    def borrow_basis(self, arrived: Mapping[Transfer, Tensor]) -> None:
        """Put the rows of P that the step needs together: held and borrowed, or drawn; `project` comes after it.

        Args:
            arrived: the payloads of `LocalShardPlan.basis_borrowed`.
        """
        plan, state = self.plan, self.state
        if state.drawn is not None and not state.has_basis:
            return  # nothing is projected yet
        self._basis = state.projector(plan.basis_span)
        if state.drawn is not None or plan.basis_span == plan.basis_rows:
            return
        held, own = self._basis, common(plan.basis_rows, plan.basis_span)
        self._basis = held.new_empty(len(plan.basis_span), plan.matrix.rank)
        self._basis[inside(own, plan.basis_span)] = held[inside(own, plan.basis_rows)]
        for transfer, rows in arrived.items():
            self._basis[inside(transfer.entries, plan.basis_span)] = rows.view(len(transfer.entries), -1)

    def project(self) -> None:
        """This rank's part of R and of the squared norms, over its region; zero while there is no basis."""
        region, r, state = self.plan.region, self.plan.matrix.rank, self.state
        shape = (r, len(region)) if state.side == "left" else (len(region), r)
        self.low_rank = state.basis.new_zeros(shape, dtype=state.dtype)
        self.grad_sq = torch.zeros(len(region), dtype=torch.float64, device=state.basis.device)
        if not self.state.has_basis:
            return
        for block in self.plan.blocks:
            part, squares = F.project(
                block.view(self.grad), self._basis_of(block), state.side, self.settings.chosen_precision
            )
            along = self._along(block)
            self.along_entries(self.low_rank, along).add_(part)
            self.grad_sq[along].add_(squares)

    def payload(self, transfer: Transfer, values: Tensor, scales: Tensor, over: range) -> tuple[Tensor, Tensor]:
        """What goes over a transfer: the entries' part of a tensor like R, and of one number for each entry.

        Args:
            transfer: one that this rank borrows or lends by.
            values: like R over `over`.
            scales: one for each entry of `over`.
            over: the region, or the entries kept.
        """
        along = inside(transfer.entries, over)
        return self.along_entries(values, along), scales[along].to(self.state.dtype)

    def unpack(self, transfer: Transfer, arrived: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of a payload: entries like R, one number for each entry."""
        count = len(transfer.entries)
        r = arrived.numel() // count - 1  # of R, or of C, which may be empty
        values, scales = arrived.split([r * count, count])
        return values.view((r, count) if self.state.side == "left" else (count, r)), scales

    def add(self, transfer: Transfer, arrived: Tensor) -> None:
        """Add a borrower's part of R and of the norms to this rank's."""
        values, norms = self.unpack(transfer, arrived)
        along = inside(transfer.entries, self.plan.region)
        self.along_entries(self.low_rank, along).add_(values)
        self.grad_sq[along].add_(norms.double().square())

    def complete(
        self, kept: tuple[Tensor, Tensor] | None, borrowed: Mapping[Transfer, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Like R and one number for each entry, over the region: the entries kept and those borrowed put together.

        Args:
            kept: of the entries kept; None where this rank keeps none.
            borrowed: likewise, of those borrowed.
        """
        plan, state = self.plan, self.state
        if kept is not None and plan.kept == plan.region:
            return kept
        parts = [(transfer.entries, *pair) for transfer, pair in borrowed.items()]
        if kept is not None:
            parts.append((plan.kept, *kept))
        values = self.low_rank if not parts else parts[0][1]
        r = values.shape[0 if state.side == "left" else 1]
        values = values.new_zeros((r, len(plan.region)) if state.side == "left" else (len(plan.region), r))
        scales = torch.zeros(len(plan.region), dtype=state.dtype, device=values.device)
        for entries, part, numbers in parts:
            along = inside(entries, plan.region)
            self.along_entries(values, along).copy_(part)
            scales[along] = numbers.to(state.dtype)
        return values, scales

    def advance(self) -> list[Tensor] | None:
        """Lines 9 to 12 where the gradient is finite and R is complete over the entries kept.

        Returns:
            What all ranks have to add up, 0-dim: |R|^2; then |S|^2 and |phi * G|^2, or with one factor for all entries
            the two squares that it is made of. None where the rank keeps no entry.
        """
        state, settings, kept, one = self.state, self.settings, self.plan.kept, self.settings.has_one_factor
        state.step += 1
        bias_correction = step_factor(state.step, settings)
        self.context = StepContext(state, settings, self.plan.matrix.shape, bias_correction, True)
        if not len(kept):
            return None
        along = inside(kept, self.plan.region)
        low_rank, grad_sq = self.along_entries(self.low_rank, along), self.grad_sq[along]
        direction, direction_sq, low_rank_sq = adapt(low_rank, state, settings, True)
        squares = settings.residual_form.squares(grad_sq, direction_sq, low_rank_sq, settings)
        self.entries = EntrySteps(low_rank, direction, squares)
        if one:
            return [low_rank_sq.sum(), *(numbers.sum() for numbers in squares)]
        self.entries.phi, *sums = scale(grad_sq, squares, self.context)
        return [low_rank_sq.sum(), *sums]

    def scale(self, sums: Tensor, squares: Tensor) -> Tensor:
        """Line 12 where one scaling factor is for all entries: take it from the sums over all ranks.

        Args:
            sums: of what `advance` returns, (3,).
            squares: |S|^2 and |phi * G|^2, (2,); of phi = 1 where it is only found here.

        Returns:
            `squares` of the phi that the step is made with.
        """
        if not self.settings.has_one_factor:
            return squares
        self.phi = self.settings.residual_form.factors(sums[1:].split(1), self.context)
        if self.entries is not None:
            self.entries.phi = self.phi.expand(len(self.plan.kept))
        return squares * self.phi.square()

    def kept_residual(self) -> tuple[Tensor, Tensor] | None:
        """R and phi of the entries kept, which `residual_square` needs over the region; None for no entries."""
        return None if self.entries is None else (self.entries.low_rank, self.entries.phi)

    def residual_square(self, low_rank: Tensor, phi: Tensor) -> Tensor:
        """|phi * (G - a P R)|^2 of the fragment, from the residual itself; float64, 0-dim.

        Args:
            low_rank: R over the region, summed over all ranks.
            phi: likewise.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.grad.device)
        for block in self.plan.blocks:
            along = self._along(block)
            total += F.residual_square(
                block.view(self.grad),
                self._basis_of(block),
                self.along_entries(low_rank, along),
                phi[along].double(),
                side=self.state.side,
                alpha=self.settings.inner_alpha,
                needed=True,
                precision=self.settings.chosen_precision,
            )
        return total

    def limit(self, residual_sq: Tensor, scaled_grad_sq: Tensor) -> Scalar | None:
        """Line 14, alike on all ranks that hold a part: the divisor; the state remembers |S|.

        Args:
            residual_sq: |S|^2 of the whole matrix, 0-dim.
            scaled_grad_sq: |phi * G|^2, likewise.
        """
        return limit(residual_sq, scaled_grad_sq, self.state, self.settings, True, self.negligible_ratio)

    def quotient(self) -> Quotient | None:
        """What recorders show of the entries kept; None for no entries."""
        if self.entries is None:
            return None
        recorded, bias_correction = self.settings.residual_form.recorded, self.context.bias_correction
        return partial(recorded, self.entries.squares, self.entries.phi, bias_correction)

    def apply(self, low_rank_update: Tensor, phi: Tensor) -> None:
        """Line 16 on the fragment, C and phi given over the region."""
        side, settings = self.state.side, self.settings
        for block in self.plan.blocks:
            along = self._along(block)
            F.apply_update_(
                block.view(self.weight),
                block.view(self.grad),
                *factors(self._basis_of(block), self.along_entries(low_rank_update, along), side),
                None if settings.residual_form.factors is None else phi[along],
                by_row=side == "right",
                decay_factor=settings.decay_factor,
                precision=settings.chosen_precision,
                seed=settings.weight_seed(self.state.step),
            )

    def decay(self) -> None:
        """Weight decay alone, while there is no basis."""
        self.weight.mul_(self.settings.decay_factor)

    def _along(self, block: RowBlock) -> slice:
        """Where a block lies along the axis of R, in the region."""
        return inside(block.columns if self.state.side == "left" else block.rows, self.plan.region)

    def along_entries(self, values: Tensor, along: slice) -> Tensor:
        """Some entries of a tensor like R: columns on the left, rows on the right."""
        return values[:, along] if self.state.side == "left" else values[along]

    def _basis_of(self, block: RowBlock) -> Tensor:
        """The rows of P that a block is multiplied with."""
        rows = block.rows if self.state.side == "left" else block.columns
        return self._basis[inside(rows, self.plan.basis_span)]


def empty_like_state(param: Tensor) -> Tensor:
    """Gives the dtype in which a parameter is stepped, and its device."""
    return param.new_empty(0, dtype=compute_dtype(param.dtype))
