"""A rank's part of a split matrix whose step kernels make: views of it are made where something asks for them."""

from __future__ import annotations

from torch import Tensor

from ds_fira.core.kernels.split_part import SplitPart
from ds_fira.core.kernels.split_step import SplitStep
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.lowrank.shard_step import EntrySteps, ShardStep


class DevicePart(ShardStep):
    """`ShardStep` of a part of a flat parameter.

    Args:
        plan: as in `ShardStep`.
        param: the flat parameter with its gradient.
        state: as in `ShardStep`.
        settings: likewise.
        negligible_ratio: likewise.
    """

    def __init__(
        self,
        plan: LocalShardPlan,
        param: Tensor,
        state: MatrixState,
        settings: GroupSettings,
        negligible_ratio: float,
    ) -> None:
        self._param = param
        self.plan, self.state, self.settings, self.negligible_ratio = plan, state, settings, negligible_ratio
        self.low_rank = self.grad_sq = self.context = self.entries = self.phi = self._basis = None

    @property
    def weight(self) -> Tensor:
        """The fragment of the weights, a view."""
        return self.plan.fragment.fragment(self._param)

    @property
    def grad(self) -> Tensor:
        """The fragment of the gradient, a view."""
        return self.plan.fragment.fragment(self._param.grad)

    def look(self, memory: SplitStep, part: SplitPart) -> None:
        """Take from the memory of a step what `residual_square` and its exchange need."""
        words, doubles, r, state = memory.words, memory.doubles, part.rank, self.state

        def shaped(start: int, entries: int) -> Tensor:
            return words[start : start + r * entries].view((r, entries) if part.left else (entries, r))

        self.low_rank = shaped(part.low_rank, part.region)
        self._basis = state.basis.to(state.dtype)
        if part.basis is not None:
            rows = len(self.plan.basis_span)
            self._basis = words[part.basis : part.basis + rows * r].view(rows, r)
        phi = doubles[part.phi : part.phi + (1 if self.settings.has_one_factor else part.region)]
        self.phi = phi if self.settings.has_one_factor else None
        self.entries = None
        if part.kept:
            kept = slice(part.kept_start, part.kept_start + part.kept)
            own = phi.expand(part.kept) if self.settings.has_one_factor else phi[kept]
            low_rank = shaped(part.kept_low_rank, part.kept)
            # Its squares have gone into phi already.
            squares = doubles[part.direction_sq : part.direction_sq + part.kept]
            self.entries = EntrySteps(low_rank, low_rank, (squares, squares), own)
