"""What crosses ranks in a low-rank step, but for sums and refreshes: see `ds_fira.sharding.lowrank.step`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from ds_fira.sharding.comm import Communicator, Pending
from ds_fira.sharding.lowrank.answer_form import numel_in_parts
from ds_fira.sharding.lowrank.answers import unpack_parts
from ds_fira.sharding.lowrank.shard_step import ShardStep, empty_like_state
from ds_fira.sharding.row_blocks import Transfer
from ds_fira.sharding.split_matrix import SplitMatrix

# By position and transfer, what goes over it.
Payloads = Mapping[tuple[int, Transfer], Sequence[Tensor]]
# By position and borrowed transfer: like R and one number for each entry, or N, R and phi.
Answers = dict[int, dict[Transfer, tuple[Tensor, ...]]]


class LowRankExchange:
    """Carries rows of P, parts of R and their answers between the ranks that share low-rank matrices.

    Every method starts a collective about the matrices at some positions, the same on all ranks, and returns at once.
    """

    def __init__(self, matrices: Mapping[int, SplitMatrix], communicator: Communicator) -> None:
        """Look up between which ranks something is to be sent at all.

        Args:
            matrices: the low-rank matrices of a param group by their positions among its split ones.
            communicator: the ranks.
        """
        self.communicator = communicator
        # The positions at which some rank borrows entries of R, or rows of P.
        self._borrowing = {position for position, matrix in matrices.items() if matrix.sums.borrowed_entries}
        self._borrowing_bases = {position for position, matrix in matrices.items() if matrix.sums.borrowed_basis_rows}

    def borrows(self, turn: Sequence[int]) -> bool:
        """Whether some rank borrows entries of R of the matrices at some positions."""
        return not self._borrowing.isdisjoint(turn)

    def borrows_bases(self, turn: Sequence[int]) -> bool:
        """Whether some rank borrows rows of P of them."""
        return not self._borrowing_bases.isdisjoint(turn)

    def borrow_bases(
        self, turn: Sequence[int], param: Tensor, parts: Mapping[int, ShardStep]
    ) -> Pending[dict[int, dict[Transfer, Tensor]]]:
        """Start to send the rows of P that the parts need; nothing is sent where every rank holds those it needs.

        Returns:
            By position of this rank's parts, what they borrow.
        """
        sent = [(t.borrower, part.basis_payload(t)) for part in parts.values() for t in part.plan.basis_lent]
        expected = [
            (transfer.keeper, (position, transfer), len(transfer.entries) * part.plan.matrix.rank)
            for position, part in parts.items()
            for transfer in part.plan.basis_borrowed
        ]
        needed, like = self.borrows_bases(turn), empty_like_state(param)
        return self.communicator.start_deliver(sent, expected, like, needed).then(
            lambda arrived: {p: {t: arrived[p, t] for t in part.plan.basis_borrowed} for p, part in parts.items()}
        )

    def collect(
        self, turn: Sequence[int], param: Tensor, parts: Mapping[int, ShardStep]
    ) -> Pending[dict[tuple[int, Transfer], Tensor]]:
        """Start to send R and the norms of borrowed entries to where they are kept.

        Returns:
            By position and transfer, what `ShardStep.add` takes.
        """
        payloads = {}
        for position, part in parts.items():
            # Norms, not squares: those of small gradients would underflow in float32.
            norms = part.grad_sq.sqrt()
            for transfer in part.plan.borrowed:
                payloads[position, transfer] = part.payload(transfer, part.low_rank, norms, part.plan.region)
        return self._carry(turn, param, parts, payloads, lambda _, transfer, part: _numel(part, transfer), True)

    def answer(
        self,
        turn: Sequence[int],
        param: Tensor,
        parts: Mapping[int, ShardStep],
        payloads: Payloads,
        in_parts: Collection[int] = (),
    ) -> Pending[Answers]:
        """Start to send what belongs to the entries kept to those who borrow them.

        Args:
            turn: positions of the matrices; the same on all ranks.
            param: gives dtype and device.
            parts: this rank's parts of them.
            payloads: by position and transfer that this rank lends, what goes over it; zeros for those missing.
            in_parts: the positions whose answers come in parts.

        Returns:
            What this rank's parts borrow, taken apart.
        """
        dtype = empty_like_state(param)

        def numel(position: int, transfer: Transfer, part: ShardStep) -> int:
            rank = part.settings.update_rank(part.plan.matrix.rank)
            if position in in_parts:
                return numel_in_parts(rank, transfer, dtype.element_size())
            return (rank + 1) * len(transfer.entries)

        lent = {
            (position, transfer): payloads[position, transfer]
            if (position, transfer) in payloads
            else [dtype.new_zeros(numel(position, transfer, part))]
            for position, part in parts.items()
            for transfer in part.plan.lent
        }

        def take_apart(arrived: Mapping[tuple[int, Transfer], Tensor]) -> Answers:
            return {
                p: {
                    t: unpack_parts(part, t, arrived[p, t]) if p in in_parts else part.unpack(t, arrived[p, t])
                    for t in part.plan.borrowed
                }
                for p, part in parts.items()
            }

        return self._carry(turn, param, parts, lent, numel, False).then(take_apart)

    def _carry(
        self,
        turn: Sequence[int],
        param: Tensor,
        parts: Mapping[int, ShardStep],
        payloads: Payloads,
        numel: Callable[[int, Transfer, ShardStep], int],
        to_keepers: bool,
    ) -> Pending[dict[tuple[int, Transfer], Tensor]]:
        """Start to send payloads to those who keep the entries, or from them to those who borrow."""
        sent = [(t.keeper if to_keepers else t.borrower, payload) for (_, t), payload in payloads.items()]
        expected = [
            (t.borrower if to_keepers else t.keeper, (position, t), numel(position, t, part))
            for position, part in parts.items()
            for t in (part.plan.lent if to_keepers else part.plan.borrowed)
        ]
        return self.communicator.start_deliver(sent, expected, empty_like_state(param), self.borrows(turn))


def _numel(part: ShardStep, transfer: Transfer) -> int:
    """Elements of a payload: R and one number for each entry."""
    return (part.plan.matrix.rank + 1) * len(transfer.entries)
