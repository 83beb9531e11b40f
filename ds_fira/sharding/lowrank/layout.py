"""Where everything of a turn lies in the memory of a step by kernels: a plan without tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from ds_fira.core.kernels.fragments import Edge, Edges
from ds_fira.core.kernels.numbers import NUMBERS
from ds_fira.core.kernels.split_part import SplitPart
from ds_fira.core.settings import GroupSettings
from ds_fira.sharding.lowrank.answer_form import AnswerForm
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.row_blocks import RowBlock

# Elements of float32 whose multiples tensors begin at: whole 64-byte lines.
UNIT = 16
# Of a float64 in float32.
WORDS = 2
Planned = TypeVar("Planned")


class _Room:
    """Elements of a memory that are given out in parts."""

    def __init__(self, unit: int) -> None:
        self.size, self._unit = 0, unit

    def take(self, numel: int) -> int:
        start = self.size
        self.size += -(-numel // self._unit) * self._unit
        return start


class TurnLayout:
    """The parts of a turn that one rank holds.

    Attributes:
        plans: by position, in the order of the turn.
        parts: likewise.
        forms: of the answers, by position.
        sizes: elements of the memory, float32 and float64.
        has_gaps: whether a region has entries that the rank's fragment does not touch, whose sums begin at zero.
    """

    def __init__(
        self, plans: Sequence[LocalShardPlan], settings: GroupSettings, forms: Mapping[int, AnswerForm]
    ) -> None:
        """Reserve the memory.

        Args:
            plans: of the parts, in the order of the turn.
            settings: of the param group.
            forms: of the answers, by position.
        """
        self.plans = {plan.position: plan for plan in plans}
        self.forms, self._measures = forms, settings.measures_residual
        words, doubles = _Room(UNIT), _Room(UNIT // WORDS)
        # Those alike follow each other, so that their tensors are at equal distances.
        found = {plan.position: self._part(plan, words.take, doubles.take) for plan in sorted(plans, key=_order)}
        self.parts = {plan.position: found[plan.position] for plan in plans}
        self.sizes = words.size, doubles.size
        self.has_gaps = any(plan.region != plan.matrix.touched(plan.dp_rank) for plan in plans)
        self._known: dict[Hashable, object] = {}

    def known(self, key: Hashable, make: Callable[[], Planned]) -> Planned:
        """What `make` gave when it was first asked for."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _part(self, plan: LocalShardPlan, words: Callable[[int], int], doubles: Callable[[int], int]) -> SplitPart:
        matrix = plan.matrix
        left, r, region, kept = matrix.side == "left", matrix.rank, len(plan.region), len(plan.kept)
        body, edges = _blocks(plan)
        numel = r * region
        low_rank = words(numel)
        direction = kept_low_rank = low_rank_update = low_rank
        if not left:
            direction = low_rank_update = words(numel)
            kept_low_rank = low_rank + (plan.kept.start - plan.region.start) * r
        elif self.forms[plan.position] == "in_parts":
            # N and R are put together over the region, and C made of them there.
            kept_low_rank, direction, low_rank_update = words(r * kept), words(r * kept), words(numel)
        elif kept == region:
            direction = low_rank_update = words(numel)
        elif kept:
            kept_low_rank, direction = words(r * kept), words(r * kept)
        early = kept and self.forms[plan.position] == "early" and self._measures
        scales = words(region)
        grad_sq = doubles(region)
        return SplitPart(
            kind=_kind(plan),
            side=matrix.side,
            shape=matrix.shape,
            rank=r,
            width=len(plan.fragment.span),
            rows=0 if body is None else len(body.rows),
            body=0 if body is None else plan.fragment.offset + body.offset,
            body_line=0 if left or body is None else body.rows.start - plan.region.start,
            body_basis=0 if not left or body is None else body.rows.start - plan.basis_span.start,
            region=region,
            kept=kept,
            kept_start=plan.kept.start - plan.region.start if kept else 0,
            basis=None if plan.basis_span == plan.basis_rows else words(len(plan.basis_span) * r),
            low_rank=low_rank,
            kept_low_rank=kept_low_rank,
            direction=direction,
            low_rank_update=low_rank_update,
            spare=words(r * kept) if early else None,
            scales=scales,
            grad_sq=grad_sq,
            direction_sq=doubles(kept),
            low_rank_sq=doubles(kept),
            phi=doubles(region),
            numbers=doubles(NUMBERS),
            exact=doubles(1),
            edges=_edges(plan, edges, body, (low_rank, grad_sq, low_rank_update, scales)) if edges else None,
        )


def _blocks(plan: LocalShardPlan) -> tuple[RowBlock | None, list[RowBlock]]:
    """The whole rows of a fragment, None for none, and the parts of rows; of a slice its own rows."""
    n = len(plan.fragment.span)
    full = [block for block in plan.blocks if len(block.columns) == n]
    return (full[0] if full else None), [block for block in plan.blocks if len(block.columns) < n]


def _edges(
    plan: LocalShardPlan, blocks: Sequence[RowBlock], body: RowBlock | None, places: tuple[int, int, int, int]
) -> Edges:
    left, pair = plan.matrix.side == "left", []
    for block in blocks:
        along, rows = (block.columns, block.rows) if left else (block.rows, block.columns)
        line, row = along.start - plan.region.start, rows.start - plan.basis_span.start
        pair.append(Edge(plan.fragment.offset + block.offset, len(block.columns), line, row))
    head, tail = [*pair, Edge()][:2]
    low_rank, squares, low_rank_update, scales = places
    return Edges(low_rank, squares, len(plan.region), int(body is not None), low_rank_update, scales, (head, tail))


def _kind(plan: LocalShardPlan) -> tuple[int, ...]:
    """What parts alike have in common, but for their states."""
    body, edges = _blocks(plan)
    rows = (-1, 0) if body is None else (len(body.rows), body.rows.start)
    kept = (plan.kept.start - plan.region.start, len(plan.kept)) if len(plan.kept) else (0, 0)
    spans = (plan.region, plan.basis_span, plan.basis_rows)
    held = (len(plan.fragment.span), *(number for span in spans for number in (span.start, len(span))))
    return (*plan.matrix.shape, plan.matrix.side == "left", plan.matrix.rank, *rows, *kept, *held, len(edges))


def _order(plan: LocalShardPlan) -> tuple[tuple[int, ...], int]:
    return _kind(plan), plan.position
