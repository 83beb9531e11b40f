"""A matrix that partition boundaries split: its owner, what a step sends, and which way is cheaper.

The ranks that hold a fragment of the matrix are its *sharers*; one of them is its *owner*. A step goes one of two ways:

*Gathered*: every sharer sends its fragments of gradient and weight to the owner, which steps the whole matrix and sends
the new weights back. The result equals that of an unsplit matrix to the bit.

*Low-rank*: gradients and weights stay where they are. Between refreshes only low-rank data crosses ranks: entries of R,
with one number each. `ds_fira.sharding.shared_entries` says who has which of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ds_fira.core.settings import GroupSettings
from ds_fira.core.subspace import effective_rank, projection_side
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.projection import state_numel
from ds_fira.sharding.shared_entries import SharedEntries

Way = Literal["gathered", "low_rank"]
# float64 sums over all ranks in a low-rank step: |G|^2 and whether a refresh is due, or kept rows of P are no longer
# true; then |R|^2 and two that depend on the scaling. Each counts as two float32 elements.
GRADIENT_SUMS = 2
LOW_RANK_SUMS = 3
SUMS_NUMEL = 2 * (GRADIENT_SUMS + LOW_RANK_SUMS)
# Sharers up to which the hash of a plan lists their fragments, as version 0.1.0 did; of more it says how they lie.
MOST_LISTED = 64
# The words in which version 0.1.0 named the ways.
FIRST_NAMES = {"gathered": "base", "low_rank": "lean"}


@dataclass(frozen=True, slots=True, repr=False)
class SplitMatrix(SharedEntries):
    """A matrix that partition boundaries split, with its owner.

    Attributes:
        way: how it is stepped.
    """

    way: Way = "gathered"

    def __repr__(self) -> str:
        """What the hash of a plan is made of: as version 0.1.0 wrote it, for its checkpoints hold such hashes."""
        fragments = tuple(self.fragments) if len(self.sharers) <= MOST_LISTED else self.cut
        return (
            f"CutMatrix(name={self.name!r}, shape={self.shape}, fragments={fragments}, owner={self.owner}, "
            f"side={self.side!r}, rank={self.rank}, way={FIRST_NAMES[self.way]!r}, spread={self.evenly_sharded})"
        )

    def state_numel(self, dp_rank: int) -> int:
        """Elements of basis, moments and limiter's norm that a rank holds; 0 for one that holds none of them."""
        if self.way == "gathered":
            return (dp_rank == self.owner) * state_numel(self.shape, self.rank, self.side, drawn=self.draws_basis)
        return self.low_rank_numel(dp_rank) if dp_rank in self.sharers else 0

    def step_numel(self) -> int:
        """Elements of R and borrowed P that a low-rank step needs beside the state, on the sharer that needs most."""
        return self.sums.step_numel

    def gathered_elements(self, dp_rank: int) -> int:
        """Elements that a rank sends in one gathered step: gradient and weight to the owner, weights back."""
        if dp_rank == self.owner:
            return sum(fragment.numel for holder, fragment in self.fragments if holder != dp_rank)
        return 2 * self.fragment(dp_rank).numel if dp_rank in self.sharers else 0

    def refresh_elements(self, dp_rank: int, settings: GroupSettings) -> int:
        """Elements that a rank sends in one low-rank refresh: gradients, and bases if needed, to the owner; P back."""
        if self.draws_basis or dp_rank not in self.sharers:
            return 0
        if dp_rank == self.owner:
            return sum(self.answer_numel(holder, settings) for holder in self.sharers if holder != dp_rank)
        bases = needs_old_basis(settings) and self.basis_is_split
        return self.fragment(dp_rank).numel + bases * len(self.basis_rows(dp_rank)) * self.rank

    @property
    def basis_is_split(self) -> bool:
        """Whether sharers hold different rows of P."""
        return self.evenly_sharded or self.side == "left"

    def answer_numel(self, dp_rank: int, settings: GroupSettings) -> int:
        """Elements that the owner sends another sharer at a refresh.

        Whether there is a new basis, 1; the rows of it that the sharer holds; and C of
        `ds_fira.core.basis.basis_change`, r x r, where those rows do not suffice to change the moments.
        """
        r = self.rank
        return 1 + len(self.basis_rows(dp_rank)) * r + r * r * self.sends_change(settings)

    def sends_change(self, settings: GroupSettings) -> bool:
        """Whether sharers that keep moments lack the whole bases to rotate them with."""
        return self.evenly_sharded and settings.refresh_moments == "rotate"

    @property
    def _lent_numel(self) -> int:
        """Elements of the fragments of all sharers but the owner."""
        return math.prod(self.shape) - self.fragment(self.owner).numel

    def _refresh_sum(self, settings: GroupSettings) -> int:
        """What `refresh_elements` gives for all sharers together."""
        if self.draws_basis:
            return 0
        others = len(self.sharers) - 1
        rows = self.rank * (self.sums.basis_rows - len(self.basis_rows(self.owner)))
        bases = needs_old_basis(settings) and self.basis_is_split
        answers = others * (1 + self.rank**2 * self.sends_change(settings)) + rows
        return self._lent_numel + bases * rows + answers

    def step_cost(self, way: Way, ranks: int, settings: GroupSettings) -> float:
        """Elements that a step sends over all ranks, with the cost of a refresh divided by the gap.

        An answer counts as C and phi whatever its form (`lowrank.answer_form`), so that a setting of the residual moves
        no matrix from one way to the other.

        Args:
            way: in which it is stepped.
            ranks: data-parallel ranks; all take part in the sums of a low-rank step.
            settings: of the param group.
        """
        if way == "gathered":
            return 3 * self._lent_numel  # gradients and weights to the owner, weights back
        sums = self.sums
        numbers = self.rank + settings.update_rank(self.rank) + 2
        borrowed = numbers * sums.borrowed_entries + self.rank * sums.borrowed_basis_rows
        return borrowed + ranks * SUMS_NUMEL + self._refresh_sum(settings) / settings.update_proj_gap

    def cheaper_way(self, ranks: int, settings: GroupSettings) -> Way:
        """The way of the lower `step_cost`; `exact_cuts` leaves only the gathered one."""
        if settings.exact_cuts:
            return "gathered"
        costs = [self.step_cost(way, ranks, settings) for way in ("low_rank", "gathered")]
        return "low_rank" if costs[0] < costs[1] else "gathered"


def needs_old_basis(settings: GroupSettings) -> bool:
    """Whether a refresh reads the basis it replaces: to start from, to align signs with, or to rotate moments from."""
    return settings.subspace != "svd" or settings.refresh_moments == "rotate"


def plan_split(
    fragments: Mapping[int, MatrixShard], owner: int, ranks: int, settings: GroupSettings, evenly_sharded: bool = False
) -> SplitMatrix:
    """The split matrix of given fragments and owner, stepped in the way that sends less.

    Args:
        fragments: by dp_rank, in the order of `SharedEntries.cut`.
        owner: one of them.
        ranks: data-parallel ranks.
        settings: of the param group.
        evenly_sharded: as in `SharedEntries`.
    """
    first = next(iter(fragments.values()))
    side = projection_side(first.shape, settings.proj_type, settings.formulation)
    r = effective_rank(first.shape, settings.rank)
    drawn = settings.draws_basis
    matrix = SplitMatrix(first.name, first.shape, fragments, owner, side, r, evenly_sharded, drawn)
    return replace(matrix, way=matrix.cheaper_way(ranks, settings))
