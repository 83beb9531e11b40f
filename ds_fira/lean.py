"""The lean way to step cut matrices: what crosses ranks between refreshes is no larger than R.

A step of a param group, on all ranks of the channel and in this order:

1. sum |G|^2 over the ranks: is the gradient finite, is a refresh due;
2. where one is due: gradients to the owners, bases back, in rounds of one matrix an owner;
3. parts of R and of the squared norms to the ranks that keep the entries; these update the moments;
4. sum |R|^2 and the squares for the limiter;
5. rarely: R and phi back, and the sum of the residual itself;
6. C and phi back to the ranks that touch the entries; every rank updates its own weights.

All ranks see the same sums, so step counts, refreshes and the limiter are the same on all that share a matrix without
being sent. A rank that holds no part takes part in the same collectives. Sizes are known from the plan, and what the
plan leaves empty is not sent at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_fira import functional as F
from ds_fira.comm import Channel, Message
from ds_fira.cuts import GRADIENT_SUMS, LOW_RANK_SUMS, Link, Share
from ds_fira.layout import GroupLayout
from ds_fira.lean_part import Part, empty_like_state
from ds_fira.lean_refresh import LeanRefresh
from ds_fira.matrix_step import inner_alpha
from ds_fira.refresh import Refresher, phase
from ds_fira.state import STEP, allocate_matrices, compute_dtype, state_views
from ds_fira.subspace import refresh_due
from ds_fira.tracking import StepMetrics


class LeanCuts:
    """The cut matrices of one param group that are stepped where they lie, as one rank sees them."""

    def __init__(self, layout: GroupLayout, channel: Channel, numbers: Mapping[str, int]) -> None:
        """Plan the exchange.

        Args:
            layout: of the group.
            channel: the ranks.
            numbers: by name, every matrix's number in the model.
        """
        self.channel = channel
        self._matrices = {i: matrix for i, matrix in enumerate(layout.cuts) if matrix.way == "lean"}
        rank = channel.dp_rank
        self.shares = [
            Share.of(matrix, position, numbers[matrix.name], rank)
            for position, matrix in self._matrices.items()
            if rank in dict(matrix.fragments)
        ]
        self._refresh = LeanRefresh(self._matrices, channel)
        self._links = {position: matrix.links() for position, matrix in self._matrices.items()}

    def allocate(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Zero state for this rank's parts; the keys of a matrix end in ".cut" and its number among the group's cuts.

        Args:
            param: the flat parameter.
            group: the param group.
        """
        state = {}
        for share in self.shares:
            basis = share.matrix.basis_shape(share.dp_rank)
            parts = allocate_matrices(param, basis, share.low_rank_shape, group["state_dtype"], ())
            state |= {key + _mark(share): value for key, value in parts.items()}
        return state

    def step(
        self,
        param: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
        resolution: float,
        refresher: Refresher,
        metrics: StepMetrics,
    ) -> None:
        """Make one step of all lean matrices of the group; a collective call.

        Args:
            param: the flat parameter with its gradient.
            state: of the parameter; what `allocate` made is in it.
            group: the param group.
            resolution: below this share of |phi * G| a residual is rounding.
            refresher: computes bases.
            metrics: counts on the owner of each matrix.

        Raises:
            ValueError: the state was loaded from a run that stepped these matrices another way.
        """
        for share in self.shares:
            if STEP + _mark(share) not in state:
                raise ValueError(
                    f"FiraAdam: the loaded state has no part of {share.matrix.name}, which was cut or stepped another "
                    "way in the run that saved it; resume on as many ranks with the settings it had (rank, proj_type, "
                    "update_proj_gap, subspace, refresh_moments, exact_cuts)."
                )
        parts = {
            share.position: Part(
                share,
                share.fragment.fragment(param),
                share.fragment.fragment(param.grad),
                state_views(state, share.matrix.side, _mark(share)),
                group,
                resolution,
            )
            for share in self.shares
        }
        totals, due = self._decide(param, parts, group)
        # NaN compares as false.
        limit = torch.finfo(compute_dtype(param.dtype)).max
        usable = [position for position, total in totals.items() if total < limit]
        possible = [position for position in usable if position in due and totals[position] > 0.0]
        self._refresh.refresh(possible, param, parts, group, refresher, metrics)
        for part in parts.values():
            if part.low_rank is None:
                part.project()
        self._collect(param, parts)
        stepped = {position: parts[position] for position in usable if position in parts and parts[position].known}
        sums = self._sum(
            param, LOW_RANK_SUMS, {position: torch.stack(part.advance()) for position, part in stepped.items()}
        )
        squares = squares_of(sums, totals, group)
        scaled = {position: part.scale(sums[position], squares[position]) for position, part in stepped.items()}
        exact = self._exact_squares(param, stepped, squares, group)
        answers = {}
        for position, part in stepped.items():
            square, whole = scaled[position]
            square = exact.get(position, square)
            answers[position] = part.finish(square, whole, sums[position][0], totals[position], metrics)
        arrived = self._send_back(param, stepped, answers, self._links)
        for position in usable:
            if position in stepped:
                part = stepped[position]
                part.apply(*part.complete(answers[position], arrived.get((position, self.channel.dp_rank))))
            elif position in parts:
                parts[position].decay()

    def _sum(self, param: Tensor, width: int, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        """Sum a few float64 of every lean matrix over all ranks.

        Args:
            param: gives the device.
            width: numbers for each matrix.
            rows: by position, this rank's part of them, (width,); nothing is added for the others.

        Returns:
            By position, for all lean matrices, the sums, (width,).
        """
        none = torch.zeros(width, dtype=torch.float64, device=param.device)
        added = self.channel.all_reduce(torch.stack([rows.get(position, none) for position in self._matrices]))
        return dict(zip(self._matrices, added, strict=True))

    def _decide(
        self, param: Tensor, parts: dict[int, Part], group: dict[str, Any]
    ) -> tuple[dict[int, float], list[int]]:
        """|G|^2 of every lean matrix by position, and the positions of those whose refresh is due; alike on all ranks.

        Leaves R of this rank's part where no refresh is due, since the norms come with it.
        """
        rows = {}
        for position, part in parts.items():
            moved = phase(group, part.share.number)
            last = int(part.state.refresh_step)
            waits = refresh_due(int(part.state.step), last, group["update_proj_gap"], moved)
            if not waits:
                part.project()
            square = part.grad_square()
            rows[position] = torch.stack([square, torch.full_like(square, waits and part.share.owns)])
        found = torch.stack(list(self._sum(param, GRADIENT_SUMS, rows).values())).tolist()
        totals = {position: total for position, (total, _) in zip(self._matrices, found, strict=True)}
        return totals, [position for position, (_, due) in zip(self._matrices, found, strict=True) if due]

    def _collect(self, param: Tensor, parts: dict[int, Part]) -> None:
        """Add up R and the squared norms of the entries where they are kept."""
        messages = [
            Message(link.borrower, link.keeper, (position, link.borrower), self._numel(position, link))
            for position, links in self._links.items()
            for link in links
        ]
        parcels = {}
        for position, part in parts.items():
            if part.share.borrowed is not None:
                # Norms, not squares: those of small gradients would underflow in float32.
                norms = part.grad_sq.sqrt()
                parcels[position, self.channel.dp_rank] = part.parcel(
                    part.share.borrowed, part.low_rank, norms, part.share.region
                )
        arrived = self.channel.deliver(messages, parcels, empty_like_state(param))
        for position, part in parts.items():
            for link in part.share.lent:
                part.add(link, arrived[position, link.borrower])

    def _send_back(
        self,
        param: Tensor,
        stepped: dict[int, Part],
        kept: Mapping[int, tuple[Tensor, Tensor] | None],
        links: Mapping[int, Sequence[Link]],
    ) -> dict[Any, Tensor]:
        """Send what belongs to the entries kept to those who borrow them.

        Args:
            param: gives dtype and device.
            stepped: the parts that are stepped; for the others zeros are sent.
            kept: by position, of those, a tensor like R and one number for each entry, over the entries kept.
            links: by position, those to be served; the same on all ranks.

        Returns:
            By position and this rank, the parcels for it.
        """
        like = empty_like_state(param)
        messages, parcels = [], {}
        for position, link in ((position, link) for position, many in links.items() for link in many):
            key, numel = (position, link.borrower), self._numel(position, link)
            messages.append(Message(link.keeper, link.borrower, key, numel))
            if link.keeper == self.channel.dp_rank:
                part = stepped.get(position)
                parcels[key] = (
                    [like.new_zeros(numel)] if part is None else part.parcel(link, *kept[position], part.share.kept)
                )
        return self.channel.deliver(messages, parcels, like)

    def _exact_squares(
        self, param: Tensor, stepped: dict[int, Part], squares: dict[int, Tensor], group: dict[str, Any]
    ) -> dict[int, Tensor]:
        """|S|^2 from the residual itself, by position, where the difference of squares has lost its digits.

        Which matrices these are all ranks know from the same sums; where there is none nothing is sent.
        """
        if group["limiter"] != "growth":
            return {}
        square, whole = torch.stack(list(squares.values())).unbind(1)
        flags = F.residual_needed(square, whole).tolist()
        needed = [position for position, flag in zip(squares, flags, strict=True) if flag]
        if not needed:
            return {}
        kept = {position: part.kept_residual() for position, part in stepped.items()}
        links = {position: self._links[position] for position in needed}
        arrived = self._send_back(param, stepped, kept, links)
        rows = {}
        for position in needed:
            if position in stepped:
                part = stepped[position]
                complete = part.complete(kept[position], arrived.get((position, self.channel.dp_rank)))
                rows[position] = part.residual_square(*complete).unsqueeze(0)
        sums = self._sum(param, 1, rows)
        return {position: sums[position][0] for position in needed}

    def _numel(self, position: int, link: Link) -> int:
        return (self._matrices[position].rank + 1) * len(link.entries)


def squares_of(sums: dict[int, Tensor], totals: dict[int, float], group: dict[str, Any]) -> dict[int, Tensor]:
    """|S|^2 as a difference of squares and |phi * G|^2 by position, (2,): as summed, or with phi = 1 from |R|^2.

    With one scaling factor for a matrix its squares are found without it, so that ranks which hold no part of the
    matrix know too whether digits are lost.
    """
    if group["scaling"] == "column":
        return {position: part[1:] for position, part in sums.items()}
    alpha, found = inner_alpha(group), {}
    for position, part in sums.items():
        pair = F.difference_of_squares(part.new_tensor([totals[position]]), part[:1], torch.ones_like(part[:1]), alpha)
        found[position] = torch.stack(pair)
    return found


def _mark(share: Share) -> str:
    return f".cut{share.position}"
