"""What crosses ranks in a low-rank step, but for sums and refreshes: see `ds_fira.sharding.lowrank.step`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.lowrank.shard_step import ShardStep, empty_like_state
from ds_fira.sharding.split_matrix import SplitMatrix, Transfer

# By position and transfer, what goes over it.
Payloads = Mapping[tuple[int, Transfer], Sequence[Tensor]]


class LowRankExchange:
    """Carries rows of P, parts of R and their answers between the ranks that share low-rank matrices.

    Every method is a collective call about the matrices at some positions, the same on all ranks.
    """

    def __init__(self, matrices: Mapping[int, SplitMatrix], communicator: Communicator) -> None:
        """Look up between which ranks something is to be sent at all.

        Args:
            matrices: the low-rank matrices of a param group by their positions among its split ones.
            communicator: the ranks.
        """
        self.communicator = communicator
        # The positions at which some rank borrows entries of R, or rows of P.
        self._borrowing = {position for position, matrix in matrices.items() if matrix.borrowed_entries}
        self._borrowing_bases = {position for position, matrix in matrices.items() if matrix.borrowed_basis_rows}

    def borrow_bases(self, turn: Sequence[int], param: Tensor, parts: Mapping[int, ShardStep]) -> None:
        """Complete the rows of P that the parts need; nothing is sent where every rank holds those it needs."""
        sent = [(t.borrower, part.basis_payload(t)) for part in parts.values() for t in part.plan.basis_lent]
        expected = [
            (transfer.keeper, (position, transfer), len(transfer.entries) * part.plan.matrix.rank)
            for position, part in parts.items()
            for transfer in part.plan.basis_borrowed
        ]
        needed = not self._borrowing_bases.isdisjoint(turn)
        arrived = self.communicator.deliver(sent, expected, empty_like_state(param), needed)
        for position, part in parts.items():
            part.borrow_basis({transfer: arrived[position, transfer] for transfer in part.plan.basis_borrowed})

    def collect(self, turn: Sequence[int], param: Tensor, parts: Mapping[int, ShardStep]) -> None:
        """Add up R and the squared norms of the entries where they are kept."""
        payloads = {}
        for position, part in parts.items():
            # Norms, not squares: those of small gradients would underflow in float32.
            norms = part.grad_sq.sqrt()
            for transfer in part.plan.borrowed:
                payloads[position, transfer] = part.payload(transfer, part.low_rank, norms, part.plan.region)
        arrived = self._carry(turn, param, parts, payloads, to_keepers=True)
        for (position, transfer), payload in arrived.items():
            parts[position].add(transfer, payload)

    def send_back(
        self,
        turn: Sequence[int],
        param: Tensor,
        parts: Mapping[int, ShardStep],
        kept: Mapping[int, tuple[Tensor, Tensor] | None],
    ) -> dict[int, dict[Transfer, Tensor]]:
        """Send what belongs to the entries kept to those who borrow them.

        Args:
            turn: positions of the matrices; the same on all ranks.
            param: gives dtype and device.
            parts: this rank's parts of them.
            kept: by position, of those stepped, a tensor like R and one number for each entry, over the entries kept.
                For the others zeros are sent.

        Returns:
            By position of this rank's parts, the payloads for it.
        """
        payloads = {
            (position, transfer): part.payload(transfer, *kept[position], part.plan.kept)
            if position in kept
            else [part.low_rank.new_zeros(_numel(part, transfer))]
            for position, part in parts.items()
            for transfer in part.plan.lent
        }
        arrived = self._carry(turn, param, parts, payloads, to_keepers=False)
        return {p: {transfer: arrived[p, transfer] for transfer in part.plan.borrowed} for p, part in parts.items()}

    def _carry(
        self, turn: Sequence[int], param: Tensor, parts: Mapping[int, ShardStep], payloads: Payloads, to_keepers: bool
    ) -> dict[tuple[int, Transfer], Tensor]:
        """Send payloads of R to those who keep the entries, or from them to those who borrow."""
        sent = [(t.keeper if to_keepers else t.borrower, payload) for (_, t), payload in payloads.items()]
        expected = [
            (t.borrower if to_keepers else t.keeper, (position, t), _numel(part, t))
            for position, part in parts.items()
            for t in (part.plan.lent if to_keepers else part.plan.borrowed)
        ]
        needed = not self._borrowing.isdisjoint(turn)
        return self.communicator.deliver(sent, expected, empty_like_state(param), needed)


def _numel(part: ShardStep, transfer: Transfer) -> int:
    """Elements of a payload: R and one number for each entry."""
    return (part.plan.matrix.rank + 1) * len(transfer.entries)
