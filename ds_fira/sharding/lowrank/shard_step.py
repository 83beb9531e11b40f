"""One rank's part of a matrix that is stepped the lean way: everything of the step but the communication.

A rank that shares a cut matrix works on a *region* of R: the entries that its fragment touches and those that it keeps
for all (`ds_fira.sharding.split_matrix`). Where it touches what another rank keeps, it gives its part of the sums away
and gets phi and C for it; `ShardStep.payload` and `ShardStep.complete` are the two ends of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_fira.core import functional as F
from ds_fira.core.algorithms import without_residual
from ds_fira.core.state import MatrixState, compute_dtype
from ds_fira.core.step import (
    LowRankStep,
    adapt,
    carry_step,
    decay_factor,
    inner_alpha,
    limit,
    operands,
    scaling_factors,
    step_factor,
    total_square,
)
from ds_fira.observe.metrics import StepMetrics
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.row_blocks import RowBlock, common, inside
from ds_fira.sharding.split_matrix import Transfer


@dataclass(slots=True)
class ShardStep:
    """A share in one step: views of weight and gradient, the state, and the results of the step so far.

    Attributes:
        share: the plan.
        weight: the fragment of the weights, 1-D, updated in place.
        grad: the fragment of the gradient, 1-D.
        state: the basis is the part of P that the share needs; moments are of the entries it keeps, {} for none.
        group: the param group.
        resolution: below this share of |phi * G| a residual is rounding.
        low_rank: R over the region, (r, region) left or (region, r) right; None before `project`.
        grad_sq: squared norms of G's columns or rows over the region, float64.
        phi: scaling factors of the entries kept, before the limiter, float64.
        step: of the entries kept.
    """

    share: LocalShardPlan
    weight: Tensor
    grad: Tensor
    state: MatrixState
    group: dict[str, Any]
    resolution: float
    low_rank: Tensor | None = None
    grad_sq: Tensor | None = None
    step: LowRankStep | None = None
    _basis: Tensor | None = field(default=None, repr=False)

    @property
    def known(self) -> bool:
        """Whether the matrix has had a refresh."""
        return int(self.state.refresh_step) >= 0

    @property
    def _axis(self) -> int:
        return 1 if self.share.matrix.side == "left" else 0

    def grad_square(self) -> Tensor:
        """|G|^2 of the fragment, float64, 0-dim."""
        return sum(total_square(piece.view(self.grad), self.state) for piece in self.share.blocks)

    def basis_payload(self, link: Transfer) -> tuple[Tensor]:
        """The rows of P that go over a link of `LocalShardPlan.basis_lent`."""
        return (self.state.basis[inside(link.entries, self.share.basis_rows)].to(self.state.dtype),)

    def borrow_basis(self, arrived: Mapping[Transfer, Tensor]) -> None:
        """Put the rows of P that the step needs together: those held and those borrowed; `project` comes after it.

        Args:
            arrived: the payloads of `LocalShardPlan.basis_borrowed`.
        """
        share, state = self.share, self.state
        self._basis = state.basis.to(state.dtype)
        if share.basis_span == share.basis_rows:
            return
        held, own = self._basis, common(share.basis_rows, share.basis_span)
        self._basis = held.new_empty(len(share.basis_span), share.matrix.rank)
        self._basis[inside(own, share.basis_span)] = held[inside(own, share.basis_rows)]
        for link, rows in arrived.items():
            self._basis[inside(link.entries, share.basis_span)] = rows.view(len(link.entries), -1)

    def project(self) -> None:
        """This rank's part of R and of the squared norms, over its region; zero while there is no basis."""
        region, r, state = self.share.region, self.share.matrix.rank, self.state
        shape = (r, len(region)) if state.side == "left" else (len(region), r)
        self.low_rank = state.basis.new_zeros(shape, dtype=state.dtype)
        self.grad_sq = torch.zeros(len(region), dtype=torch.float64, device=state.basis.device)
        if not self.known:
            return
        for piece in self.share.blocks:
            part, squares = F.project(
                piece.view(self.grad), self._basis_of(piece), state.side, self.group["matmul_precision"]
            )
            along = self._along(piece)
            self._entries(self.low_rank, along).add_(part)
            self.grad_sq[along] += squares

    def payload(self, link: Transfer, values: Tensor, scales: Tensor, over: range) -> tuple[Tensor, Tensor]:
        """What goes over a link: the entries' part of a tensor like R, and of one number for each entry.

        Args:
            link: one that this rank borrows or lends by.
            values: like R over `over`.
            scales: one for each entry of `over`.
            over: the region, or the entries kept.
        """
        along = inside(link.entries, over)
        return self._entries(values, along), scales[along].to(self.state.dtype)

    def unpack(self, link: Transfer, arrived: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of a payload: entries like R, one number for each entry."""
        r, count = self.share.matrix.rank, len(link.entries)
        values, scales = arrived.split([r * count, count])
        return values.view((r, count) if self.state.side == "left" else (count, r)), scales

    def add(self, link: Transfer, arrived: Tensor) -> None:
        """Add a borrower's part of R and of the norms to this rank's."""
        values, norms = self.unpack(link, arrived)
        along = inside(link.entries, self.share.region)
        self._entries(self.low_rank, along).add_(values)
        self.grad_sq[along] += norms.double().square()

    def complete(self, kept: tuple[Tensor, Tensor] | None, arrived: Mapping[Transfer, Tensor]) -> tuple[Tensor, Tensor]:
        """Like R and one number for each entry, over the region: the entries kept and those borrowed put together.

        Args:
            kept: of the entries kept; None where this rank keeps none.
            arrived: the payloads of those borrowed.
        """
        share, state = self.share, self.state
        if kept is not None and share.kept == share.region:
            return kept
        parts = [(link.entries, *self.unpack(link, payload)) for link, payload in arrived.items()]
        if kept is not None:
            parts.append((share.kept, *kept))
        values = torch.zeros_like(self.low_rank)
        scales = torch.zeros(len(share.region), dtype=state.dtype, device=values.device)
        for entries, part, scale in parts:
            along = inside(entries, share.region)
            self._entries(values, along).copy_(part)
            scales[along] = scale.to(state.dtype)
        return values, scales

    def advance(self) -> list[Tensor]:
        """Count the step and update the moments with R; the gradient is finite and R complete over the entries kept.

        Returns:
            What all ranks have to add up, 0-dim: |R|^2; then |S|^2 as a difference of squares and |phi * G|^2 with a
            scaling factor for each entry, else |N|^2 and 0.
        """
        state, group, kept = self.state, self.group, self.share.kept
        state.step += 1
        zero = torch.zeros((), dtype=torch.float64, device=self.grad.device)
        if not len(kept):
            return [zero, zero, zero]
        along = inside(kept, self.share.region)
        low_rank, grad_sq = self._entries(self.low_rank, along), self.grad_sq[along]
        usable = torch.ones((), dtype=torch.bool, device=self.grad.device)
        direction, direction_sq, low_rank_sq = adapt(low_rank, state, group, usable)
        correction = step_factor(state.step, group)
        self.step = LowRankStep(low_rank, direction, low_rank_sq, zero, zero, zero, correction, direction_sq)
        if group["scaling"] != "column":
            return [low_rank_sq.sum(), direction_sq.sum(), zero]
        self.step.phi = scaling_factors(direction_sq, low_rank_sq, correction, group)
        return [low_rank_sq.sum(), *F.difference_of_squares(grad_sq, low_rank_sq, self.step.phi, inner_alpha(group))]

    def scale(self, sums: Tensor, squares: Tensor) -> Tensor:
        """Where one scaling factor is for all entries: take it from the sums over all ranks.

        Args:
            sums: of what `advance` returns, (3,).
            squares: |S|^2 as a difference of squares and |phi * G|^2; of phi = 1 where it is only found here.

        Returns:
            `squares` of the phi that the step is made with.
        """
        if self.group["scaling"] == "column":
            return squares
        correction = step_factor(self.state.step, self.group)
        phi = scaling_factors(sums[1:2], sums[0:1], correction, self.group)
        if self.step is not None:
            self.step.phi = phi.expand(len(self.share.kept))
        return squares * phi.square()

    def kept_residual(self) -> tuple[Tensor, Tensor] | None:
        """R and phi of the entries kept, which `residual_square` needs over the region; None for no entries."""
        return None if self.step is None else (self.step.low_rank, self.step.phi)

    def residual_square(self, low_rank: Tensor, phi: Tensor) -> Tensor:
        """|phi * (G - a P R)|^2 of the fragment, from the residual itself; float64, 0-dim.

        Args:
            low_rank: R over the region, summed over all ranks.
            phi: likewise.
        """
        needed = torch.ones((), dtype=torch.bool, device=self.grad.device)
        total = torch.zeros((), dtype=torch.float64, device=self.grad.device)
        for piece in self.share.blocks:
            along = self._along(piece)
            total += F.residual_square(
                piece.view(self.grad),
                self._basis_of(piece),
                self._entries(low_rank, along),
                phi[along].double(),
                side=self.state.side,
                alpha=inner_alpha(self.group),
                needed=needed,
                precision=self.group["matmul_precision"],
            )
        return total

    def finish(
        self, square: Tensor, whole: Tensor, low_rank_square: Tensor, grad_square: float, metrics: StepMetrics
    ) -> tuple[Tensor, Tensor] | None:
        """The limiter, alike on all sharers; C and phi of the entries kept, None for no entries.

        Args:
            square: |S|^2 of the whole matrix, 0-dim.
            whole: |phi * G|^2, likewise.
            low_rank_square: |R|^2, likewise.
            grad_square: |G|^2, likewise.
            metrics: counts the step on the owner.
        """
        usable = torch.ones((), dtype=torch.bool, device=self.grad.device)
        divisor = limit(square, whole, self.resolution, self.state, self.group, usable)
        if self.share.owns:
            total = low_rank_square.new_tensor(grad_square)
            metrics.record(low_rank_square, total, square, divisor, usable, self.group["residual_scale"])
        if self.step is None:
            return None
        phi, carried = carry_step(self.step, divisor, self.state, self.group)
        return carried, phi

    def apply(self, carried: Tensor, phi: Tensor) -> None:
        """W <- keep * W - (phi * G + P C) on the fragment, C and phi given over the region."""
        side = self.state.side
        usable = torch.ones((), dtype=torch.bool, device=self.grad.device)
        for piece in self.share.blocks:
            along = self._along(piece)
            F.apply_update_(
                piece.view(self.weight),
                piece.view(self.grad),
                *operands(self._basis_of(piece), self._entries(carried, along), side),
                None if without_residual(self.group) else phi[along],
                by_row=side == "right",
                keep=decay_factor(self.group),
                usable=usable,
                precision=self.group["matmul_precision"],
            )

    def decay(self) -> None:
        """Weight decay alone, while there is no basis."""
        self.weight.mul_(decay_factor(self.group))

    def _along(self, piece: RowBlock) -> slice:
        """Where a piece lies along the axis of R, in the region."""
        return inside(piece.columns if self.state.side == "left" else piece.rows, self.share.region)

    def _entries(self, values: Tensor, along: slice) -> Tensor:
        return values[:, along] if self.state.side == "left" else values[along]

    def _basis_of(self, piece: RowBlock) -> Tensor:
        """The rows of P that a piece is multiplied with."""
        rows = piece.rows if self.state.side == "left" else piece.columns
        return self._basis[inside(rows, self.share.basis_span)]


def empty_like_state(param: Tensor) -> Tensor:
    """Gives the dtype in which a parameter is stepped, and its device."""
    return param.new_empty(0, dtype=compute_dtype(param.dtype))
