"""What all ranks have to agree on before a moment changes: which gradients are finite, which bases are due."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ds_fira.sharding.comm import Communicator, Pending
from ds_fira.sharding.lowrank.shard_step import ShardStep
from ds_fira.sharding.split_matrix import GRADIENT_SUMS

# What a rank adds to the second sum of a matrix: its owner that a refresh is due, and every rank that lends rows of P
# that those which others keep are no longer true. The sum tells both.
DUE, CHANGED = 1.0, 2.0


class Agreement:
    """The first sums of a step of a param group. They travel while the first turns project with the bases they have.

    Attributes:
        settled: whether the sums are known and the bases that were due renewed.
        found: |G|^2 of every matrix of the group by position, on the host; empty before.
        finite: the positions whose gradients are finite.
        refreshed: the positions whose bases are not those that turns under way have projected with: those that may have
            been renewed in this step, and those of which ranks kept rows that are no longer true.
    """

    def __init__(
        self,
        communicator: Communicator,
        positions: Sequence[int],
        param: Tensor,
        parts: Mapping[int, ShardStep],
        is_due: Callable[[ShardStep], bool],
        refresh: Callable[[Sequence[int]], None],
        dtype: torch.dtype,
        measure: Callable[[Mapping[int, float]], Tensor] | None = None,
        changed: Collection[int] = (),
    ) -> None:
        """Take what is needed for both; nothing is sent yet.

        Args:
            communicator: the ranks.
            positions: of all matrices of the group.
            param: the flat parameter with its gradient.
            parts: by position, this rank's.
            is_due: whether the basis of a matrix that this rank owns is due.
            refresh: renews the bases at some positions, the same on all ranks; a collective call.
            dtype: in which the parameter is stepped.
            measure: gives what this rank adds to the sums, (positions, 2), from the second number of every part; its
                memory may be overwritten. None to ask the parts.
            changed: the positions at which other ranks keep rows of P that this rank has no more.
        """
        self._measure, self._changed = measure, changed
        self._communicator, self._positions, self._param = communicator, positions, param
        self._parts, self._is_due, self._refresh = parts, is_due, refresh
        self._largest = torch.finfo(dtype).max
        self._sums: Pending[Tensor] | None = None
        self._ahead: list[Pending] = []
        self.settled = False
        self.found: dict[int, float] = {}
        self.finite: set[int] = set()
        self.refreshed: set[int] = set()

    def start(self) -> None:
        """Start the sums, unless an earlier turn has."""
        if self._sums is not None:
            return
        rows = {}
        # The owner decides: by the refresher's bound of its step count, so that few steps read one from a device.
        flags = {
            position: DUE * (part.plan.owns and self._is_due(part)) + CHANGED * (position in self._changed)
            for position, part in self._parts.items()
        }
        if self._measure is not None:
            self._sums = self._communicator.start_all_reduce(self._measure(flags), keep=False)
            return
        for position, part in self._parts.items():
            grad_sq = part.grad_square()
            rows[position] = (grad_sq, torch.full_like(grad_sq, flags[position]))
        self._sums = start_sum(self._communicator, self._positions, self._param, GRADIENT_SUMS, rows)

    def watch(self, pending: Pending) -> None:
        """Keep in mind what travels before the sums are known: it may be made of bases that a refresh replaces."""
        if not self.settled:
            self._ahead.append(pending)

    def settle(self) -> None:
        """Wait for the sums and renew the bases that are due, unless an earlier turn has; the one read by the host."""
        if self.settled:
            return
        sums = self._sums.wait()
        found = sums.tolist()
        self.found = {position: total for position, (total, _) in zip(self._positions, found, strict=True)}
        # NaN compares as false.
        self.finite = {p for p, (total, _) in zip(self._positions, found, strict=True) if total < self._largest}
        possible = [
            position
            for position, (total, flags) in zip(self._positions, found, strict=True)
            if flags % CHANGED and position in self.finite and total > 0.0
        ]
        if possible:
            for pending in self._ahead:
                pending.wait()
            self._refresh(possible)
        changed = {p for p, (_, flags) in zip(self._positions, found, strict=True) if flags >= CHANGED}
        self.refreshed = changed.union(possible)
        self._ahead.clear()
        self.settled = True

    @cached_property
    def totals(self) -> dict[int, Tensor]:
        """`found` as 0-dim tensors on the parameter's device."""
        return dict(zip(self._positions, self._sums.wait()[:, 0].unbind(), strict=True))

    def origin(self, position: int) -> tuple[Tensor, int]:
        """Where a matrix's |G|^2 lies on the device: a tensor, and the place in it."""
        return self._sums.wait(), GRADIENT_SUMS * self._positions.index(position)


def start_sum(
    communicator: Communicator,
    positions: Sequence[int],
    param: Tensor,
    width: int,
    rows: Mapping[int, Sequence[Tensor]],
) -> Pending[Tensor]:
    """Start to sum a few float64 of some matrices over all ranks.

    Args:
        communicator: the ranks.
        positions: of the matrices.
        param: gives the device.
        width: numbers for each matrix.
        rows: by position, this rank's part of them, 0-dim; nothing is added for the others.

    Returns:
        The sums, (number of positions, width).
    """
    none = torch.zeros(width, dtype=torch.float64, device=param.device)
    own = [torch.stack(tuple(rows[position])) if position in rows else none for position in positions]
    return communicator.start_all_reduce(torch.stack(own))
