"""New bases for matrices that are stepped the lean way: the only time at which their gradients cross ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

from torch import Tensor

from ds_fira.comm import Channel, Message
from ds_fira.cuts import CutMatrix, needs_old_basis
from ds_fira.lean_part import Part, empty_like_state
from ds_fira.refresh import Refresher
from ds_fira.shard import MatrixShard
from ds_fira.tracking import StepMetrics


class LeanRefresh:
    """Gathers gradients to the owners of some matrices, and carries the bases that they compute to the sharers.

    Attributes:
        matrices: the lean matrices of a param group by their positions among its cuts.
        channel: the ranks; all of them take part.
    """

    def __init__(self, matrices: Mapping[int, CutMatrix], channel: Channel) -> None:
        self.matrices = matrices
        self.channel = channel

    def refresh(
        self,
        due: list[int],
        param: Tensor,
        parts: dict[int, Part],
        group: dict[str, Any],
        refresher: Refresher,
        metrics: StepMetrics,
    ) -> None:
        """New bases for the matrices at some positions, the same on all ranks."""
        queues: dict[int, list[int]] = defaultdict(list)
        for position in due:
            queues[self.matrices[position].owner].append(position)
        if not due:
            return
        # In rounds of one matrix an owner: all owners compute at once, and none holds more than one whole gradient.
        with metrics.refreshing(param.device):
            for turn in zip_longest(*queues.values()):
                self._turn([p for p in turn if p is not None], param, parts, group, refresher, metrics)

    def _turn(
        self,
        turn: list[int],
        param: Tensor,
        parts: dict[int, Part],
        group: dict[str, Any],
        refresher: Refresher,
        metrics: StepMetrics,
    ) -> None:
        """Gradients to the owners, one matrix each, and bases back; without a basis everything stays as it is."""
        grads = self._assemble(turn, parts, param.grad)
        previous: dict[int, Tensor] = {}
        if needs_old_basis(group):
            previous = self._assemble_bases(turn, parts, empty_like_state(param))
        parcels, adopted = {}, {}
        for position, grad in grads.items():
            part, old = parts[position], previous.get(position)
            basis = refresher.attempt(lambda p=part, g=grad, o=old: p.new_basis(g, o), group["subspace"])
            if basis is not None:
                adopted[position] = (part.basis_for(basis, self.channel.dp_rank), basis, old)
                metrics.refreshes += 1
            flag = empty_like_state(param).new_full((1,), float(basis is not None))
            for holder, _ in part.share.matrix.fragments:
                shape = part.share.matrix.basis_shape(holder)
                own = flag.new_zeros(shape) if basis is None else part.basis_for(basis, holder)
                parcels[position, holder] = [flag, own]
        messages = [
            Message(matrix.owner, holder, (position, holder), 1 + rows * r)
            for position, matrix, holder, _ in self._others(turn)
            for rows, r in (matrix.basis_shape(holder),)
        ]
        for (position, _), arrived in self.channel.deliver(messages, parcels, empty_like_state(param)).items():
            part = parts[position]
            if arrived[0]:
                own = arrived[1:].view_as(part.state.basis)
                # On the right a sharer has both bases whole; on the left one that is not the owner keeps no moments.
                adopted[position] = (own, own, part.state.basis.to(own.dtype))
        for position, bases in adopted.items():
            parts[position].adopt(*bases)

    def _others(self, turn: list[int]) -> Iterator[tuple[int, CutMatrix, int, MatrixShard]]:
        """(position, matrix, holder, fragment) of all sharers that are not the owner."""
        for position in turn:
            matrix = self.matrices[position]
            for holder, fragment in matrix.fragments:
                if holder != matrix.owner:
                    yield position, matrix, holder, fragment

    def _assemble(self, turn: list[int], parts: dict[int, Part], like: Tensor) -> dict[int, Tensor]:
        """The whole gradients, (m, n), of the matrices that this rank owns."""
        messages = [
            Message(holder, matrix.owner, (position, holder), fragment.numel)
            for position, matrix, holder, fragment in self._others(turn)
        ]
        rank = self.channel.dp_rank
        arrived = self.channel.deliver(messages, {(p, rank): [part.grad] for p, part in parts.items()}, like)
        whole = {}
        for position in turn:
            matrix = self.matrices[position]
            if matrix.owner == rank:
                flat = like.new_empty(matrix.shape[0] * matrix.shape[1])
                for holder, fragment in matrix.fragments:
                    part = parts[position].grad if holder == rank else arrived[position, holder]
                    flat[fragment.start : fragment.stop] = part
                whole[position] = flat.view(matrix.shape)
        return whole

    def _assemble_bases(self, turn: list[int], parts: dict[int, Part], like: Tensor) -> dict[int, Tensor]:
        """The whole bases of the matrices that this rank owns and that have one; on the right nothing is sent."""
        messages = [
            Message(holder, matrix.owner, (position, holder), len(matrix.touched_rows(holder)) * matrix.rank)
            for position, matrix, holder, _ in self._others(turn)
            if matrix.side == "left"
        ]
        rank = self.channel.dp_rank
        held = {position: part.state.basis.to(like.dtype) for position, part in parts.items() if position in turn}
        arrived = self.channel.deliver(messages, {(p, rank): [basis] for p, basis in held.items()}, like)
        whole = {}
        for position, own in held.items():
            matrix, part = self.matrices[position], parts[position]
            if matrix.owner != rank or not part.known:
                continue
            if matrix.side == "right":
                whole[position] = own
                continue
            whole[position] = like.new_empty(matrix.shape[0], matrix.rank)
            for holder, _ in matrix.fragments:
                rows = matrix.touched_rows(holder)
                basis = own if holder == rank else arrived[position, holder].view(len(rows), matrix.rank)
                whole[position][rows.start : rows.stop] = basis
        return whole
