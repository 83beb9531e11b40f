"""A model's param groups over ZeRO's ranks, planned as the engine plans them: shapes only, no processes, no memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from ds_fira.core.algorithms import FIRA_ADAM, Algorithm, algorithm_of
from ds_fira.core.settings import GroupSettings, ParamGroup
from ds_fira.core.state import allocate, allocate_matrices, allocate_unprojected
from ds_fira.optim.expert_groups import holders_key, ranks_of
from ds_fira.optim.param_groups import build_groups, by_kind, group_defaults
from ds_fira.optim.presets import take_mark, values_of
from ds_fira.optim.settings import check_params
from ds_fira.optim.state_size import ParamRecord
from ds_fira.sharding.geometry import MatrixShard, Partitioning, matrices_of
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.plan import GroupLayout, plan_groups
from ds_fira.sharding.projection import is_projected, state_numel
from ds_fira.sharding.split_matrix import SplitMatrix

# ZeRO pads a buffer to a multiple of this many elements for each rank: 4 bytes of a 16-bit dtype.
ALIGNMENT = 2


class FlatBuffer(Partitioning):
    """The flat buffer of one param group, and where its parameters lie; one partition where it is not sharded."""

    @classmethod
    def of(cls, numels: Iterable[int], ranks: int, zero_stage: int) -> FlatBuffer:
        """The buffer that ZeRO makes of parameters of these sizes; as they are at stage 0."""
        numels = tuple(numels)
        if zero_stage == 3:
            return cls.of_slices(numels, ranks)
        *offsets, total = accumulate(numels, initial=0)
        if zero_stage == 0:
            return cls(numels, tuple(offsets), total, 1, sliced=False)
        return cls(numels, tuple(offsets), math.ceil(total / (ALIGNMENT * ranks)) * ALIGNMENT, ranks, sliced=False)

    def held(self, dp_rank: int) -> int:
        """Elements of the parameters, each counted whole, that a rank's partition holds any element of.

        That is what ZeRO-2 keeps of the gradients until the step.
        """
        assert not self.sliced
        first, last = dp_rank * self.partition_size, (dp_rank + 1) * self.partition_size
        places = zip(self.offsets, self.numels, strict=True)
        return sum(numel for offset, numel in places if offset + numel > first and offset < last)

    @property
    def padded(self) -> int:
        """Elements of the whole buffer."""
        return self.partition_size * self.ranks


@dataclass(frozen=True)
class PlannedGroup:
    """One param group of a planned run.

    Attributes:
        settings: of the group, defaults filled in.
        names: of its parameters in the module.
        shapes: of its parameters.
        buffer: of its parameters.
        layout: of projected groups, None for AdamW's, and for those whose rank saves nothing.
    """

    settings: ParamGroup
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    buffer: FlatBuffer
    layout: GroupLayout | None = None

    @property
    def partition_size(self) -> int:
        """Elements that every rank holds of the flat buffer."""
        return self.buffer.partition_size

    def state_bytes(self, dp_rank: int, dtype: torch.dtype, sharded: bool) -> int:
        """Bytes of FiraAdam's state that a rank holds of the group: what the optimizer allocates, on the meta device.

        Args:
            dp_rank: the rank; 0 for all where nothing is sharded.
            dtype: of the master weights.
            sharded: whether the group is one flat partition.
        """
        weight = torch.empty(0, dtype=dtype, device="meta")
        kept, algorithm = self.settings["state_dtype"], algorithm_of(self.settings)
        if self.layout is None:
            shapes = [(self.partition_size,)] if sharded else self.shapes
            flats = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
            return sum(_bytes(allocate_unprojected(flat, kept, algorithm).values()) for flat in flats)
        settings = GroupSettings.of(self.settings)
        owned = (*self.layout.unsplit[dp_rank], *self.layout.gathered_by(dp_rank))
        held = _bytes(allocate(weight, [matrix.shape for matrix in owned], settings, True, algorithm).values())
        for matrix in self._low_rank_parts(dp_rank):
            plan = LocalShardPlan.of(matrix, 0, 0, dp_rank)
            shapes = matrix.basis_shape(dp_rank), plan.low_rank_shape
            part = allocate_matrices(weight, *shapes, kept, (), algorithm, plan.averages(settings))
            held += _bytes(part.values())
        return held

    def state_elements(self, dp_rank: int) -> int:
        """Elements of FiraAdam's bases, moments and norms that a rank holds of the group; no averages."""
        if self.layout is None:
            return 2 * self.partition_size
        rank, side = self.settings["rank"], (self.settings["proj_type"], self.settings["formulation"])
        whole = sum(state_numel(matrix.shape, rank, *side) for matrix in self.layout.unsplit[dp_rank])
        return whole + sum(matrix.state_numel(dp_rank) for matrix in self.layout.split)

    def _low_rank_parts(self, dp_rank: int) -> list[SplitMatrix]:
        return [matrix for matrix in self.layout.low_rank.values() if dp_rank in matrix.sharers]


@dataclass(frozen=True)
class PlannedRun:
    """A model's param groups over the data-parallel ranks.

    Attributes:
        ranks: data-parallel ranks.
        sharded: whether ZeRO partitions the groups (stages 1 to 3).
        groups: in the optimizer's order.
        records: every parameter with its settings.
    """

    ranks: int
    sharded: bool
    groups: list[PlannedGroup]
    records: list[ParamRecord]

    def state_bytes(self, dp_rank: int, dtype: torch.dtype) -> int:
        """Bytes of FiraAdam's state that a rank holds, for master weights of `dtype`."""
        return sum(group.state_bytes(self._place(group, dp_rank), dtype, self.sharded) for group in self.groups)

    def _place(self, group: PlannedGroup, dp_rank: int) -> int:
        """A rank's number among those that hold a group's parameters: of a layer's experts every ep_size-th rank."""
        return dp_rank * group.buffer.ranks // self.ranks if self.sharded else dp_rank


def plan_run(
    module: nn.Module, ranks: int, zero_stage: int = 2, method: Algorithm = FIRA_ADAM, **params: object
) -> PlannedRun:
    """Plan a model under DeepSpeed as the engine would, with the settings of a JSON `params` block.

    Args:
        module: on any device; of its parameters only shapes are read.
        ranks: data-parallel ranks.
        zero_stage: 0 to 3; 1 and 2 have the same plan.
        method: the optimizer.
        **params: its settings.

    Raises:
        ValueError: a setting is not legal.
    """
    settings = check_params(params, algorithm=method)
    sharded = zero_stage > 0
    drafts: list[tuple[PlannedGroup, list[dict[int, MatrixShard]]]] = []
    records = []
    named = {id(param): name for name, param in module.named_parameters()}
    groups = build_groups(module, module.parameters(), settings, zero_stage, ranks, method)
    preset = values_of(take_mark(groups, settings, method.name))
    defaults = {**preset, **group_defaults(settings), **method.group_values}
    # At stage 0, where nothing is flat, a group may hold both kinds.
    for group in [part for mixed in groups for part in by_kind(mixed, defaults)]:
        own = {**defaults, **{key: value for key, value in group.items() if key != "params"}}
        shapes = tuple(tuple(param.shape) for param in group["params"])
        holders = ranks_of(own, ranks)
        buffer = FlatBuffer.of(map(math.prod, shapes), holders, zero_stage)
        matrices = []
        names = tuple(named[id(param)] for param in group["params"])
        for index, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            records += [ParamRecord.of(name, shape, own)] * (ranks // holders)  # other ranks have others of its kind
            if is_projected(shape, own):
                whole = matrices_of(name, shape)
                matrices += [buffer.fragments(index, matrix) for matrix in whole]
        drafts.append((PlannedGroup(own, names, shapes, buffer), matrices))
    planned = [group for group, _ in drafts]
    # Those of the same ranks together, as the engine plans them.
    for key in dict.fromkeys(holders_key(group.settings) for group in planned):
        places = [place for place, group in enumerate(planned) if holders_key(group.settings) == key]
        unprojected = [planned[place].partition_size for place in places if not drafts[place][1]]
        layouts = plan_groups(
            [(drafts[place][1], planned[place].partition_size) for place in places],
            planned[places[0]].buffer.ranks,
            [GroupSettings.of(planned[place].settings) for place in places],
            evenly_sharded=zero_stage == 3,
            beside=len(method.states) * sum(unprojected),
        )
        for place, layout in zip(places, layouts, strict=True):
            planned[place] = replace(planned[place], layout=layout if drafts[place][1] else None)
    return PlannedRun(ranks, sharded, planned, records)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
