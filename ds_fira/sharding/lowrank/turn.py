"""One turn of a low-rank step: some matrices of a param group, from their projection to their new weights.

A turn is a generator that stops where it would wait for other ranks. `overlapped` advances two of them alternately: one
computes while what the other has started travels. Where they stop is the same on every rank, whatever it holds, and so
is the order of all collectives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_fira.core import functional as F
from ds_fira.core.scalars import Scalar
from ds_fira.core.settings import GroupSettings
from ds_fira.core.step import Quotient, StepStats
from ds_fira.sharding.comm import Pending
from ds_fira.sharding.lowrank.agreement import Agreement, start_sum
from ds_fira.sharding.lowrank.answer_form import forms_of, needs_sums
from ds_fira.sharding.lowrank.answers import (
    answer,
    answer_in_parts,
    borrowed_answer,
    factors_before_limit,
    squares_of,
    step_stats,
)
from ds_fira.sharding.lowrank.exchange import Answers, LowRankExchange, Payloads
from ds_fira.sharding.lowrank.kept_rows import KeptRows
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.lowrank.shard_step import ShardStep
from ds_fira.sharding.row_blocks import Transfer
from ds_fira.sharding.split_matrix import LOW_RANK_SUMS, SplitMatrix

# Turns that are under way at the same time, each with the tensors of its matrices: what one sends, another computes.
AT_ONCE = 2

# Of one matrix in one step: this rank's plan, the numbers of the whole step, and the `quotient` of the entries that the
# rank keeps, None where it keeps none.
ShardStats = tuple[LocalShardPlan, StepStats, Quotient | None]


def overlapped(turns: Iterable[Iterator[None]]) -> None:
    """Run generators to their ends, `AT_ONCE` at a time, each as far as it gets without waiting."""
    queued, live = deque(turns), deque()
    while queued or live:
        if queued and len(live) < AT_ONCE:
            live.appendleft(queued.popleft())  # it sends something before another one waits
        turn = live.popleft()
        try:
            next(turn)
        except StopIteration:
            continue
        live.append(turn)


@dataclass(slots=True)
class GroupStep:
    """One step of a param group, which its turns share.

    Attributes:
        matrices: all low-rank matrices of the group by position.
        exchange: between the ranks.
        agreement: of all ranks, about the whole group.
        param: the flat parameter with its gradient.
        settings: of the param group.
        parts: by position, this rank's parts that no turn has taken yet.
        kept: rows of P that have been borrowed before.
        done: the numbers of the matrices that this rank has stepped its part of.
    """

    matrices: Mapping[int, SplitMatrix]
    exchange: LowRankExchange
    agreement: Agreement
    param: Tensor
    settings: GroupSettings
    parts: dict[int, ShardStep]
    kept: KeptRows
    done: list[ShardStats] = field(default_factory=list)


class Turn:
    """The matrices at some positions, in one step.

    Attributes:
        positions: the same on every rank.
        step: of the group.
    """

    def __init__(self, positions: Sequence[int], step: GroupStep) -> None:
        self.positions, self.step = positions, step
        self._forms = forms_of(positions, step.matrices, step.settings)
        # Of what is stepped, by position: |S|^2 and |phi * G|^2; the divisor; C and phi of the entries kept.
        self._scaled: dict[int, Sequence[Tensor]] = {}
        self._divisors: dict[int, Scalar | None] = {}
        self._answers: dict[int, tuple[Tensor, Tensor] | None] = {}
        self._norms_before: dict[int, Tensor] = {}

    def run(self) -> Iterator[None]:
        """Everything but the sums of the group and its refreshes; collectives, with a stop before each wait."""
        agreement = self.step.agreement
        ahead = not agreement.settled
        yield from self._sum_low_rank(self.positions)
        agreement.settle()
        again = [position for position in self.positions if position in agreement.refreshed]
        if ahead and again:
            self.step.kept.forget(again)
            yield from self._sum_low_rank(again)
        yield from self._step()

    def _step(self) -> Iterator[None]:
        """Lines 9 to 16, R being complete."""
        step, agreement = self.step, self.step.agreement
        parts = {position: step.parts.pop(position) for position in self.positions if position in step.parts}
        stepped = {p: part for p, part in parts.items() if p in agreement.finite and part.state.has_basis}
        rows = {position: row for position, part in stepped.items() if (row := part.advance()) is not None}
        adding = self._start_sum(self.positions, LOW_RANK_SUMS, rows)
        answering = self._answer_early(parts, stepped, rows)
        yield
        sums, arrived = adding.wait(), answering.wait()
        late = self._limit(stepped, sums, arrived)
        for position, part in stepped.items():
            if position in late or self._forms[position] == "in_parts":
                self._answers[position] = answer(part, self._divisors[position])
        if late:
            answering = self._send(late, parts, self._whole_answers(stepped, late))
            yield
            arrived |= answering.wait()
        for index, position in enumerate(self.positions):
            if position in stepped:
                self._finish(position, stepped[position], sums[index, 0], arrived[position])
            elif position in parts and position in agreement.finite:
                parts[position].decay()

    def _sum_low_rank(self, positions: Sequence[int]) -> Iterator[None]:
        """Line 8: R and the squared norms, complete on the ranks that keep the entries."""
        step = self.step
        parts = {position: step.parts[position] for position in positions if position in step.parts}
        known = step.kept.has(positions)
        borrowing = Pending(dict) if known else step.exchange.borrow_bases(positions, step.param, parts)
        step.agreement.watch(borrowing)
        step.agreement.start()
        if not known and any(step.matrices[position].shares_basis for position in positions):
            yield
        arrived = borrowing.wait()
        if step.kept.takes(positions):
            arrived = step.kept.keep(positions, parts, arrived) if not known else step.kept.rows
        for position, part in parts.items():
            part.borrow_basis(arrived.get(position, {}))
            part.project()
        collecting = step.exchange.collect(positions, step.param, parts)
        step.agreement.watch(collecting)
        yield
        for (position, transfer), payload in collecting.wait().items():
            parts[position].add(transfer, payload)

    def _answer_early(
        self, parts: Mapping[int, ShardStep], stepped: Mapping[int, ShardStep], rows: Mapping[int, Sequence[Tensor]]
    ) -> Pending[Answers]:
        """Start to send what is known before the sums."""
        step, payloads = self.step, {}
        for position, part in stepped.items():
            if self._forms[position] == "early" and position in rows:
                if needs_sums(step.settings):  # the one keeper's numbers are the sums
                    own, total = torch.stack(tuple(rows[position])), step.agreement.totals[position]
                    squares = squares_of(own.unsqueeze(0), total.unsqueeze(0), step.settings)[0]
                    self._scaled[position] = part.scale(own, squares)
                    if step.settings.has_limiter:
                        self._norms_before[position] = part.state.residual_norm.clone()
                    self._divisors[position] = part.limit(*self._scaled[position])
                measured = step.settings.measures_residual
                self._answers[position] = answer(part, self._divisors.get(position), again=measured)
            elif self._forms[position] == "in_parts" and position in rows:
                payloads |= {(position, t): answer_in_parts(part, t) for t in part.plan.lent}
        early = [position for position in self.positions if self._forms[position] != "late"]
        return self._send(early, parts, payloads | self._whole_answers(stepped, self._answers))

    def _limit(self, stepped: Mapping[int, ShardStep], sums: Tensor, arrived: Answers) -> list[int]:
        """Lines 12 to 14 with the sums over all ranks.

        Returns:
            The positions whose C and phi are to be sent now.
        """
        step = self.step
        totals = torch.stack([step.agreement.totals[position] for position in self.positions])
        squares = squares_of(sums, totals, step.settings)
        for index, position in enumerate(self.positions):
            if position in stepped and position not in self._scaled:
                self._scaled[position] = stepped[position].scale(sums[index], squares[index])
        needed = self._inexact(squares)
        for position, residual_sq in self._exact_squares(needed, stepped, arrived).items():
            self._scaled[position] = (residual_sq, self._scaled[position][1])
            self._divisors.pop(position, None)
            if position in self._norms_before:
                stepped[position].state.residual_norm.copy_(self._norms_before[position])
        for position, part in stepped.items():
            if position not in self._divisors:
                self._divisors[position] = part.limit(*self._scaled[position])
        return [
            position
            for position, form in self._forms.items()
            if form == "late" or (form == "early" and position in needed)
        ]

    def _inexact(self, squares: Tensor) -> list[int]:
        """The positions at which the difference of squares has lost its digits; the host reads this, on every rank."""
        if not self.step.settings.measures_residual:
            return []
        flags = F.residual_needed(*squares.unbind(1)).tolist()
        return [position for position, flag in zip(self.positions, flags, strict=True) if flag]

    def _exact_squares(
        self, needed: Sequence[int], stepped: Mapping[int, ShardStep], arrived: Answers
    ) -> dict[int, Tensor]:
        """|S|^2 from the residual itself, by position; all ranks know from the same sums where it is needed.

        R and phi of borrowed entries are sent for it, unless they have come already.
        """
        if not needed:
            return {}
        parts = {position: stepped[position] for position in needed if position in stepped}
        kept = {position: part.kept_residual() for position, part in parts.items()}
        asked = [position for position in needed if self._forms[position] != "in_parts"]
        borrowed: Answers = {}
        if asked:
            payloads = {
                (p, t): parts[p].payload(t, *kept[p], parts[p].plan.kept)
                for p in asked
                if p in parts
                for t in parts[p].plan.lent
            }
            borrowed = self._send(asked, parts, payloads).wait()
        rows = {}
        for position, part in parts.items():
            if self._forms[position] == "in_parts":
                borrowed[position] = {
                    t: (low_rank, factors_before_limit(part, phi))
                    for t, (_, low_rank, phi) in arrived[position].items()
                }
            rows[position] = (part.residual_square(*part.complete(kept[position], borrowed[position])),)
        sums = self._start_sum(needed, 1, rows).wait()
        return {position: sums[index, 0] for index, position in enumerate(needed) if position in parts}

    def _finish(
        self, position: int, part: ShardStep, low_rank_square: Tensor, arrived: dict[Transfer, tuple[Tensor, ...]]
    ) -> None:
        """Line 16, with C and phi over all entries that the rank works on."""
        step, divisor = self.step, self._divisors[position]
        if self._forms[position] == "in_parts":
            arrived = {transfer: borrowed_answer(part, parts, divisor) for transfer, parts in arrived.items()}
        part.apply(*part.complete(self._answers.get(position), arrived))
        total, residual_sq = step.agreement.totals[position], self._scaled[position][0]
        step.done.append((part.plan, step_stats(total, low_rank_square, residual_sq, divisor), part.quotient()))

    def _start_sum(self, positions: Sequence[int], width: int, rows: Mapping[int, Sequence[Tensor]]) -> Pending[Tensor]:
        return start_sum(self.step.exchange.communicator, positions, self.step.param, width, rows)

    def _send(self, positions: Sequence[int], parts: Mapping[int, ShardStep], payloads: Payloads) -> Pending[Answers]:
        """Start to send what belongs to the entries kept, of those of `parts` that are at some positions."""
        own = {position: parts[position] for position in positions if position in parts}
        in_parts = {position for position in positions if self._forms[position] == "in_parts"}
        return self.step.exchange.answer(positions, self.step.param, own, payloads, in_parts)

    def _whole_answers(
        self, stepped: Mapping[int, ShardStep], positions: Iterable[int]
    ) -> dict[tuple[int, Transfer], Sequence[Tensor]]:
        """C and phi of the entries that others borrow at some positions, where the rank has them."""
        return {
            (p, t): stepped[p].payload(t, *self._answers[p], stepped[p].plan.kept)
            for p in positions
            if p in stepped and self._answers.get(p) is not None
            for t in stepped[p].plan.lent
        }
