"""New bases for matrices that are stepped the low-rank way: the only time at which their gradients cross ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_fira.core.basis import awaits_basis, basis_change, basis_of, take_basis, take_drawn_basis
from ds_fira.core.settings import GroupSettings
from ds_fira.sharding.comm import Communicator, Pending
from ds_fira.sharding.gather import GatherExchange
from ds_fira.sharding.lowrank.shard_step import ShardStep, empty_like_state
from ds_fira.sharding.plan import owner_turns
from ds_fira.sharding.refresher import Refresher
from ds_fira.sharding.split_matrix import SplitMatrix, needs_old_basis

# By position, what this rank holds of the matrices.
Parts = Mapping[int, ShardStep]


class LowRankRefresh:
    """Gathers gradients to the owners of some matrices, and carries the bases that they compute to the sharers.

    Attributes:
        matrices: the low-rank matrices of a param group by their positions among its split ones.
        communicator: the ranks; all of them take part.
        replicas: the ranks that hold the same parts as this one, to which the first of them sends what it computes as
            an owner; None for this one alone.
    """

    def __init__(
        self, matrices: Mapping[int, SplitMatrix], communicator: Communicator, replicas: Communicator | None = None
    ) -> None:
        self.matrices = matrices
        self.communicator = communicator
        self.replicas = replicas if replicas is not None and replicas.dp_size > 1 else None

    def refresh(
        self, due: Sequence[int], param: Tensor, parts: Parts, settings: GroupSettings, refresher: Refresher
    ) -> None:
        """Refresh the matrices that are due; a collective call.

        Args:
            due: their positions; the same on all ranks.
            param: the flat parameter with its gradient.
            parts: by position, this rank's parts of all matrices; their states are changed.
            settings: of the param group.
            refresher: computes the bases and counts them.
        """
        if not due:
            return
        if settings.draws_basis:
            self._draw([parts[position] for position in due if position in parts], settings, refresher)
            return
        owned = [self.matrices[position].shape for position in self._owned(due)]
        refresher.announce(owned, param.device, empty_like_state(param).dtype, settings)
        # In turns of one matrix an owner: all owners compute at once, and none holds more than one whole gradient.
        with refresher.listener.refreshing(param.device):
            for turn in owner_turns([(self.matrices[position], position) for position in due], limit=1):
                self._refresh_turn(turn, param, parts, settings, refresher)

    def _draw(self, parts: Sequence[ShardStep], settings: GroupSettings, refresher: Refresher) -> None:
        """Draw other bases from now on, on every rank by itself."""
        for part in parts:
            take_drawn_basis(part.state, settings)
            if part.plan.owns and (self.replicas is None or self.replicas.dp_rank == 0):
                refresher.listener.count_refresh()

    def _refresh_turn(
        self, turn: Sequence[int], param: Tensor, parts: Parts, settings: GroupSettings, refresher: Refresher
    ) -> None:
        """Gradients to the owners, one matrix each, and bases back; without a basis everything stays as it is."""
        rank, like = self.communicator.dp_rank, empty_like_state(param)
        held = {p: parts[p].state.basis.to(like.dtype) for p in turn if p in parts} if needs_old_basis(settings) else {}
        sending = self._send_bases(turn, held, like, needed=needs_old_basis(settings))
        grads = GatherExchange([self.matrices[p] for p in turn], self.communicator).to_owners(param.grad)
        previous = self._assemble_bases(turn, parts, held, sending.wait())
        answers: list[tuple[int, list[Tensor]]] = []
        adopted: dict[int, tuple[Tensor, Tensor | None]] = {}
        for position, (grad,) in zip(self._owned(turn), grads, strict=True):
            part, matrix, old = parts[position], self.matrices[position], previous.get(position)
            basis = self._computed(part, grad, old, settings, refresher)
            change = None if basis is None else basis_change(basis, old, part.state, settings)
            if basis is not None:
                adopted[position] = (_rows(basis, matrix.basis_rows(rank)), change)
                if self.replicas is None or self.replicas.dp_rank == 0:
                    refresher.listener.count_refresh()
            for sharer in matrix.sharers:
                if sharer != rank:
                    rows, numel = _sent_rows(matrix, sharer, part), _answer_numel(matrix, sharer, part, settings)
                    answers.append((sharer, _answer(basis, rows, change, numel, like)))
        shared = {position: self.matrices[position] for position in turn if position in parts}
        others = {position: matrix for position, matrix in shared.items() if matrix.owner != rank}
        expected = [(m.owner, p, _answer_numel(m, rank, parts[p], settings)) for p, m in others.items()]
        for position, answer in self.communicator.deliver(answers, expected, like).items():
            if answer[0]:
                adopted[position] = _unpacked(parts[position], shared[position], answer[1:], settings)
        for position, (basis, change) in adopted.items():
            take_basis(parts[position].state, settings, basis, change)

    def _computed(
        self, part: ShardStep, grad: Tensor, old: Tensor | None, settings: GroupSettings, refresher: Refresher
    ) -> Tensor | None:
        """The new basis of a matrix that this rank owns, whole, None for none; on all replicas that of the first."""
        replicas, basis = self.replicas, None
        if replicas is None or replicas.dp_rank == 0:
            basis = refresher.attempt(lambda: basis_of(grad, part.state, settings, old), settings.subspace)
        return basis if replicas is None else shared_basis(basis, part.plan.matrix, grad, part.state.dtype, replicas)

    def _owned(self, turn: Sequence[int]) -> list[int]:
        return [position for position in turn if self.matrices[position].owner == self.communicator.dp_rank]

    def _send_bases(
        self, turn: Sequence[int], held: Mapping[int, Tensor], like: Tensor, needed: bool
    ) -> Pending[dict[tuple[int, int], Tensor]]:
        """Start to send the owners the rows of P that they lack; nothing is sent where all hold P, or none is read."""
        rank = self.communicator.dp_rank
        split = [position for position in turn if needed and self.matrices[position].basis_is_split]
        sent, expected = [], []
        for position in split:
            matrix = self.matrices[position]
            if matrix.owner == rank:
                others = (sharer for sharer in matrix.sharers if sharer != rank)
                expected += [(k, (position, k), len(matrix.basis_rows(k)) * matrix.rank) for k in others]
            elif position in held:
                sent.append((matrix.owner, [held[position]]))
        return self.communicator.start_deliver(sent, expected, like, needed=bool(split))

    def _assemble_bases(
        self,
        turn: Sequence[int],
        parts: Parts,
        held: Mapping[int, Tensor],
        arrived: Mapping[tuple[int, int], Tensor],
    ) -> dict[int, Tensor]:
        """The whole bases of the matrices that this rank owns, of those that have one and where `held` has it."""
        rank, assembled = self.communicator.dp_rank, {}
        for position in self._owned(turn):
            matrix, own = self.matrices[position], held.get(position)
            if own is None or not parts[position].state.has_basis:
                continue
            assembled[position] = own
            if matrix.basis_is_split:
                assembled[position] = own.new_empty(matrix.shape[matrix.side == "right"], matrix.rank)
                for sharer in matrix.sharers:
                    rows = _rows(assembled[position], matrix.basis_rows(sharer))
                    rows.copy_(own if sharer == rank else arrived[position, sharer].view_as(rows))
        return assembled


def shared_basis(
    basis: Tensor | None, matrix: SplitMatrix, grad: Tensor, dtype: torch.dtype, replicas: Communicator
) -> Tensor | None:
    """The basis that the first of some replicas has, if it has one, on all of them; a collective call."""
    shape = matrix.shape[matrix.side == "right"], matrix.rank
    packed = grad.new_zeros(1 + shape[0] * shape[1], dtype=dtype)
    if basis is not None:
        packed[0] = 1.0
        packed[1:] = basis.reshape(-1)
    packed = replicas.broadcast(packed, 0)
    return packed[1:].view(shape) if packed[0] else None


def _rows(basis: Tensor, rows: range) -> Tensor:
    return basis[rows.start : rows.stop]


def _sent_rows(matrix: SplitMatrix, sharer: int, part: ShardStep) -> range:
    """The rows of a new basis that the owner sends: all, where the sharer has moments of G to project on it."""
    all_rows = matrix.evenly_sharded and awaits_basis(part.state)
    return range(matrix.shape[matrix.side == "right"]) if all_rows else matrix.basis_rows(sharer)


def _answer_numel(matrix: SplitMatrix, sharer: int, part: ShardStep, settings: GroupSettings) -> int:
    """Elements that the owner sends another sharer; `part` is this rank's, and all ranks' await a basis alike."""
    if awaits_basis(part.state):
        return 1 + len(_sent_rows(matrix, sharer, part)) * matrix.rank
    return matrix.answer_numel(sharer, settings)


def _answer(basis: Tensor | None, rows: range, change: Tensor | None, numel: int, like: Tensor) -> list[Tensor]:
    """What the owner sends a sharer that holds some rows of P; always `SplitMatrix.answer_numel` elements.

    Args:
        basis: the new one, whole; None for none.
        rows: that it is sent.
        change: C; None where moments are not rotated, or there were none before.
        numel: elements to send; zeros stand for what there is not.
        like: gives dtype and device.
    """
    found = [] if basis is None else [like.new_ones(1), _rows(basis, rows)]
    room = numel - sum(tensor.numel() for tensor in found)
    return [*found, change if change is not None and room else like.new_zeros(room)]


def _unpacked(
    part: ShardStep, matrix: SplitMatrix, answer: Tensor, settings: GroupSettings
) -> tuple[Tensor, Tensor | None]:
    """The part of the new basis that a sharer holds, and C where it needs it and moments are rotated."""
    held = part.state.basis
    if awaits_basis(part.state):
        rows = _sent_rows(matrix, part.plan.dp_rank, part)
        sent = answer.view(len(rows), matrix.rank)
        # On the left one that is not the owner keeps no moments, unless all keep as many.
        own = sent if len(rows) == len(held) else _rows(sent, matrix.basis_rows(part.plan.dp_rank))
        return own, basis_change(sent, None, part.state, settings)
    own = answer[: held.numel()].view_as(held)
    if matrix.sends_change(settings):
        return own, answer[held.numel() :].view(matrix.rank, matrix.rank)
    # Otherwise a sharer has both bases whole on the right; on the left one that is not the owner keeps no moments.
    previous = held.to(own.dtype) if matrix.side == "right" and part.state.has_basis else None
    return own, basis_change(own, previous, part.state, settings)
