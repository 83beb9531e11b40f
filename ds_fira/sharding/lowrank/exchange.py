"""What crosses ranks in a step of lean matrices, but for sums and refreshes: see `ds_fira.sharding.lowrank.step`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ds_fira.sharding.comm import Communicator, Message
from ds_fira.sharding.lowrank.shard_step import ShardStep, empty_like_state
from ds_fira.sharding.split_matrix import SplitMatrix, Transfer


class LowRankExchange:
    """Carries rows of P, parts of R and their answers between the ranks that share lean matrices.

    Every algorithm is a collective call about the matrices at some positions, the same on all ranks.
    """

    def __init__(self, matrices: Mapping[int, SplitMatrix], communicator: Communicator) -> None:
        """Look up between which ranks something is to be sent at all.

        Args:
            matrices: the lean matrices of a param group by their positions among its cuts.
            communicator: the ranks.
        """
        self.communicator = communicator
        # Whether any rank borrows of a matrix: entries of R, rows of P.
        self._lends = {position: any(True for _ in matrix.links()) for position, matrix in matrices.items()}
        self._spreads = {position: any(True for _ in matrix.basis_links()) for position, matrix in matrices.items()}

    def borrow_bases(self, turn: Sequence[int], param: Tensor, parts: dict[int, ShardStep]) -> None:
        """Put the rows of P that the parts need together; nothing is sent where every rank holds those it needs."""
        messages, payloads = [], {}
        for position, part in parts.items():
            plan = part.plan
            for link in (*plan.basis_borrowed, *plan.basis_lent):
                numel = len(link.entries) * plan.matrix.rank
                messages.append(Message(link.keeper, link.borrower, (position, link), numel))
            payloads |= {(position, link): part.basis_payload(link) for link in plan.basis_lent}
        needed = any(self._spreads[position] for position in turn)
        arrived = self.communicator.deliver(messages, payloads, empty_like_state(param), needed)
        for position, part in parts.items():
            part.borrow_basis({link: arrived[position, link] for link in part.plan.basis_borrowed})

    def collect(self, turn: Sequence[int], param: Tensor, parts: dict[int, ShardStep]) -> None:
        """Add up R and the squared norms of the entries where they are kept."""
        payloads = {}
        for position, part in parts.items():
            # Norms, not squares: those of small gradients would underflow in float32.
            norms = part.grad_sq.sqrt()
            for link in part.plan.borrowed:
                payloads[position, link] = part.payload(link, part.low_rank, norms, part.plan.region)
        arrived = self._carry(turn, param, parts, payloads, to_keepers=True)
        for position, part in parts.items():
            for link in part.plan.lent:
                part.add(link, arrived[position, link])

    def send_back(
        self,
        turn: Sequence[int],
        param: Tensor,
        parts: dict[int, ShardStep],
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
            (position, link): part.payload(link, *kept[position], part.plan.kept)
            if position in kept
            else [part.low_rank.new_zeros(_numel(part, link))]
            for position, part in parts.items()
            for link in part.plan.lent
        }
        arrived = self._carry(turn, param, parts, payloads, to_keepers=False)
        return {p: {link: arrived[p, link] for link in part.plan.borrowed} for p, part in parts.items()}

    def _carry(
        self,
        turn: Sequence[int],
        param: Tensor,
        parts: dict[int, ShardStep],
        payloads: dict[Any, Any],
        to_keepers: bool,
    ) -> dict[Any, Tensor]:
        """Send payloads over the links of R, by (position, link), to those who keep the entries or from them."""
        messages = []
        for position, part in parts.items():
            for link in (*part.plan.borrowed, *part.plan.lent):
                ends = (link.borrower, link.keeper) if to_keepers else (link.keeper, link.borrower)
                messages.append(Message(*ends, (position, link), _numel(part, link)))
        needed = any(self._lends[position] for position in turn)
        return self.communicator.deliver(messages, payloads, empty_like_state(param), needed)


def _numel(part: ShardStep, link: Transfer) -> int:
    """Elements of a payload: R and one number for each entry."""
    return (part.plan.matrix.rank + 1) * len(link.entries)
