"""New bases for matrices that are stepped the lean way: the only time at which their gradients cross ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import zip_longest

from torch import Tensor

from ds_fira.core.basis import aligned_basis, basis_change, change_moments, reset_limiter
from ds_fira.core.settings import GroupSettings
from ds_fira.core.subspace import compute_basis
from ds_fira.sharding.comm import Communicator, Message
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.lowrank.shard_step import ShardStep, empty_like_state
from ds_fira.sharding.refresher import Refresher
from ds_fira.sharding.split_matrix import SplitMatrix, needs_old_basis


class LowRankRefresh:
    """Gathers gradients to the owners of some matrices, and carries the bases that they compute to the sharers.

    Attributes:
        matrices: the lean matrices of a param group by their positions among its cuts.
        communicator: the ranks; all of them take part.
    """

    def __init__(self, matrices: Mapping[int, SplitMatrix], communicator: Communicator) -> None:
        self.matrices = matrices
        self.communicator = communicator

    def refresh(
        self,
        due: list[int],
        param: Tensor,
        parts: dict[int, ShardStep],
        settings: GroupSettings,
        refresher: Refresher,
    ) -> None:
        """New bases for the matrices at some positions, the same on all ranks."""
        queues: dict[int, list[int]] = defaultdict(list)
        for position in due:
            queues[self.matrices[position].owner].append(position)
        if not due:
            return
        # In rounds of one matrix an owner: all owners compute at once, and none holds more than one whole gradient.
        with refresher.listener.refreshing(param.device):
            for turn in zip_longest(*queues.values()):
                self._turn([p for p in turn if p is not None], param, parts, settings, refresher)

    def _turn(
        self,
        turn: list[int],
        param: Tensor,
        parts: dict[int, ShardStep],
        settings: GroupSettings,
        refresher: Refresher,
    ) -> None:
        """Gradients to the owners, one matrix each, and bases back; without a basis everything stays as it is."""
        grads = self._assemble(turn, parts, param.grad)
        previous: dict[int, Tensor] = {}
        if needs_old_basis(settings):
            previous = self._assemble_bases(turn, parts, empty_like_state(param))
        payloads, adopted = {}, {}
        like = empty_like_state(param)
        for position, grad in grads.items():
            part, old = parts[position], previous.get(position)
            basis = refresher.attempt(lambda p=part, g=grad, o=old: _new_basis(p, g, o), settings.subspace)
            change = None
            if basis is not None:
                change = None if old is None else basis_change(basis, old, settings)
                adopted[position] = (_held(part, basis, self.communicator.dp_rank), change)
                refresher.listener.count_refresh()
            for holder, _ in part.plan.matrix.fragments:
                payloads[position, holder] = _answer(part, basis, change, holder, like)
        messages = [
            Message(matrix.owner, holder, (position, holder), matrix.answer_numel(holder, settings))
            for position, matrix, holder, _ in self._others(turn)
        ]
        for (position, _), arrived in self.communicator.deliver(messages, payloads, like).items():
            if arrived[0]:
                adopted[position] = _unpacked(parts[position], arrived[1:])
        for position, bases in adopted.items():
            _adopt(parts[position], *bases)

    def _others(self, turn: list[int]) -> Iterator[tuple[int, SplitMatrix, int, MatrixShard]]:
        """(position, matrix, holder, fragment) of all sharers that are not the owner."""
        for position in turn:
            matrix = self.matrices[position]
            for holder, fragment in matrix.fragments:
                if holder != matrix.owner:
                    yield position, matrix, holder, fragment

    def _assemble(self, turn: list[int], parts: dict[int, ShardStep], like: Tensor) -> dict[int, Tensor]:
        """The whole gradients, (m, n), of the matrices that this rank owns."""
        messages = [
            Message(holder, matrix.owner, (position, holder), fragment.numel)
            for position, matrix, holder, fragment in self._others(turn)
        ]
        rank = self.communicator.dp_rank
        arrived = self.communicator.deliver(messages, {(p, rank): [part.grad] for p, part in parts.items()}, like)
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

    def _assemble_bases(self, turn: list[int], parts: dict[int, ShardStep], like: Tensor) -> dict[int, Tensor]:
        """The whole bases of the matrices that this rank owns and that have one; nothing is sent where all hold P."""
        messages = [
            Message(holder, matrix.owner, (position, holder), len(matrix.basis_rows(holder)) * matrix.rank)
            for position, matrix, holder, _ in self._others(turn)
            if matrix.side == "left" or matrix.spread
        ]
        rank = self.communicator.dp_rank
        held = {position: part.state.basis.to(like.dtype) for position, part in parts.items() if position in turn}
        arrived = self.communicator.deliver(messages, {(p, rank): [basis] for p, basis in held.items()}, like)
        whole = {}
        for position, own in held.items():
            matrix, part = self.matrices[position], parts[position]
            if matrix.owner != rank or not part.state.has_basis:
                continue
            if matrix.side == "right" and not matrix.spread:
                whole[position] = own
                continue
            whole[position] = like.new_empty(matrix.shape[matrix.side == "right"], matrix.rank)
            for holder, _ in matrix.fragments:
                rows = matrix.basis_rows(holder)
                basis = own if holder == rank else arrived[position, holder].view(len(rows), matrix.rank)
                whole[position][rows.start : rows.stop] = basis
        return whole


def _new_basis(part: ShardStep, grad: Tensor, previous: Tensor | None) -> Tensor:
    """The basis of a whole gradient, on the owner.

    Args:
        part: the owner's.
        grad: G, (m, n), finite and not zero.
        previous: the basis before, whole; None where there is none or nothing needs it.

    Raises:
        torch.linalg.LinAlgError: the decomposition failed.
    """
    state, settings = part.state, part.settings
    strict = settings.matmul_precision == "float32"
    basis = compute_basis(grad.to(state.dtype), settings.rank, state.side, settings.subspace, previous, strict)
    return basis if previous is None else aligned_basis(basis, previous, settings)


def _held(part: ShardStep, basis: Tensor, holder: int) -> Tensor:
    """The part of a whole basis that a sharer holds."""
    rows = part.plan.matrix.basis_rows(holder)
    return basis[rows.start : rows.stop]


def _answer(part: ShardStep, basis: Tensor | None, change: Tensor | None, holder: int, like: Tensor) -> list[Tensor]:
    """What the owner sends a sharer, as long with a new basis as without; see `SplitMatrix.answer_numel`."""
    matrix = part.plan.matrix
    if basis is None:
        return [like.new_zeros(matrix.answer_numel(holder, part.settings))]
    answer = [like.new_ones(1), _held(part, basis, holder)]
    if matrix.sends_change(part.settings):
        # Before the first basis there are no moments to bring over.
        answer.append(like.new_zeros(matrix.rank, matrix.rank) if change is None else change)
    return answer


def _unpacked(part: ShardStep, arrived: Tensor) -> tuple[Tensor, Tensor | None]:
    """The part of the new basis that a sharer holds, and C where it needs it and moments are rotated."""
    matrix, state = part.plan.matrix, part.state
    own = arrived[: state.basis.numel()].view_as(state.basis)
    if matrix.sends_change(part.settings):
        return own, arrived[state.basis.numel() :].view(matrix.rank, matrix.rank)
    # Otherwise a sharer has both bases whole on the right; on the left one that is not the owner keeps no moments.
    return own, basis_change(own, state.basis.to(own.dtype), part.settings) if state.side == "right" else None


def _adopt(part: ShardStep, basis: Tensor, change: Tensor | None) -> None:
    """Take the new basis, and bring moments and limiter over; the refresh is done.

    Args:
        part: its state is changed.
        basis: the part of the new P that this rank holds.
        change: C of `ds_fira.core.basis.basis_change`; None where moments are not rotated.
    """
    if part.state.has_basis:
        if len(part.plan.kept):
            change_moments(part.state, part.settings, change)
        reset_limiter(part.state, part.settings)
    part.state.basis.copy_(basis)
    part.state.refresh_step.copy_(part.state.step)
