"""How an optimizer of this package trains what FSDP2 has sharded: by ZeRO-3's plan, over one dimension of a mesh."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from ds_fira.checkpoint.reconcile import Members
from ds_fira.core.settings import GroupSettings, ParamGroup
from ds_fira.engine.binding import agree_on_kernels, bind_layout, structure_of
from ds_fira.engine.fsdp2.refusals import refuse_rule, refuse_settings
from ds_fira.engine.fsdp2.shards import Box, Packed, Shards, boxes_of, coordinate, local_of, own_box, sharded_dims
from ds_fira.engine.fsdp2.stand_ins import FlatStandIn, LocalStandIn
from ds_fira.engine.fsdp2.state_form import ShardedStates
from ds_fira.optim.attachment import EngineAttachment, StandIn
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.state_size import ParamRecord
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.geometry import MatrixShard, ParamSlice, matrices_of
from ds_fira.sharding.plan import GroupLayout, digest, plan_groups, split_by_size
from ds_fira.sharding.projection import is_projected

# Elements that a rank holds of matrices that are stepped together, or one matrix: where weights and gradients of them
# are copied for a step, 256 MiB in float32.
MAX_FLAT_NUMEL = 2**25


@dataclass
class Found:
    """What this rank knows of its parameters before the ranks agree.

    Attributes:
        communicator: the ranks that those which are projected are cut over.
        copies: the same ranks, as those that hold what is not cut.
        flats: with the number of their param group.
        stand_ins: as in `EngineAttachment`.
        slices: likewise.
        replicas: of parameters that are not cut, by what stands in for them.
        layouts: of `flats`.
    """

    communicator: Communicator
    copies: Communicator
    flats: list[tuple[int, FlatStandIn]] = field(default_factory=list)
    stand_ins: dict[int, list[list[StandIn]]] = field(default_factory=dict)
    slices: dict[Tensor, tuple[ParamSlice, ...]] = field(default_factory=dict)
    replicas: dict[Tensor, Communicator] = field(default_factory=dict)
    layouts: list[GroupLayout] = field(default_factory=list)


def attach(optimizer: LowRankOptimizer, units: Sequence[Sequence[Tensor]] = ()) -> None:
    """Tell an optimizer what lies where; a collective call of all ranks of its parameters' mesh.

    Args:
        optimizer: that has these parameters.
        units: parameters that have their gradients at the same time; what stands in for some is of one unit.

    Raises:
        ValueError: something is not supported, the same on every rank.
        RuntimeError: ranks disagree about the layout.
    """
    name, members = optimizer.algorithm.name, optimizer._members()
    sharded = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, DTensor)]
    first = max(sharded, key=lambda param: param.device_mesh.size())  # others may be on a part of its mesh
    everyone = Communicator(_ranks_of(first.device_mesh, range(first.device_mesh.ndim)))
    names = [[own for own, _ in listed] for listed in members]
    boxes = dict(everyone.gather_objects((dist.get_rank(), _own_boxes(optimizer, names))))
    numbered = {id(param): number for number, unit in enumerate(units) for param in unit}
    found, fault = None, None
    try:
        found = _find(optimizer, names, boxes, numbered)
    except ValueError as error:
        fault = str(error)
    refused = next((each for each in everyone.gather_objects(fault) if each is not None), None)
    if refused is not None:
        raise ValueError(refused)
    structure = [structure_of(group, listed) for group, listed in zip(optimizer.param_groups, members, strict=True)]
    plan = digest(found.communicator.dp_size, members, structure, found.layouts)
    everyone.require_same(plan, name)
    numbers = _numbers(optimizer.param_groups, members)
    communicator = found.communicator
    layouts = {flat.tensor: layout for (_, flat), layout in zip(found.flats, found.layouts, strict=True)}
    bound = {tensor: bind_layout(layout, communicator, numbers) for tensor, layout in layouts.items()}
    optimizer.attach(
        EngineAttachment(
            communicator=communicator,
            replicas=found.replicas,
            members=members,
            inventory=[
                ParamRecord.of(own, shape, group)
                for group, listed in zip(optimizer.param_groups, members, strict=True)
                for own, shape in listed
            ],
            layouts=found.layouts,
            slices=found.slices,
            matrices=bound,
            names={
                id(param): own
                for group, listed in zip(optimizer.param_groups, members, strict=True)
                for param, (own, _) in zip(group["params"], listed, strict=True)
            },
            digest=plan,
            stand_ins=found.stand_ins,
            vectors={
                each.tensor: each.params[0].dim() < 2
                for batches in found.stand_ins.values()
                for batch in batches
                for each in batch
            },
            form=ShardedStates(optimizer, everyone, layouts),
        )
    )
    agree_on_kernels(optimizer, first.to_local().device, everyone)


def _ranks_of(mesh: DeviceMesh, dims: Sequence[int]) -> dist.ProcessGroup | None:
    """The process group of the ranks along some dimensions of a mesh; None for all that there are."""
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    if len(dims) < mesh.ndim:
        mesh = mesh[tuple(mesh.mesh_dim_names[dim] for dim in dims)]
    return None if mesh.size() == dist.get_world_size() else mesh._flatten().get_group()


def _own_boxes(optimizer: LowRankOptimizer, names: Sequence[Sequence[str]]) -> dict[str, Box]:
    """What this rank holds, by name, of parameters with several cuts."""
    listed = zip(optimizer.param_groups, names, strict=True)
    params = [pair for group, owned in listed for pair in zip(group["params"], owned, strict=True)]
    return {
        name: own_box(param)
        for param, name in params
        if isinstance(param, DTensor) and sum(type(each) is not Replicate for each in param.placements) > 1
    }


def _find(
    optimizer: LowRankOptimizer,
    names: Sequence[Sequence[str]],
    boxes: Mapping[int, Mapping[str, Box]],
    units: Mapping[int, int],
) -> Found:
    """What this rank holds of the parameters, and the plan for those that are projected.

    Args:
        optimizer: has the parameters.
        names: of them, by param group.
        boxes: what every rank holds, by rank and name, of parameters with several cuts.
        units: by the `id` of a parameter the number of its unit; 0 for those that are not among them.

    Raises:
        ValueError: something is not supported.
    """
    name = optimizer.algorithm.name
    refuse_settings(optimizer)
    dims = {
        own: sharded_dims(param, name, own)
        for group, listed in zip(optimizer.param_groups, names, strict=True)
        for param, own in zip(group["params"], listed, strict=True)
    }
    found = _communicators(optimizer, names, dims)
    buffers, settings, beside = [], [], 0
    for number, (group, listed) in enumerate(zip(optimizer.param_groups, names, strict=True)):
        found.stand_ins[number] = []
        for pairs in _by_unit(zip(group["params"], listed, strict=True), units):
            single: list[StandIn] = []
            cut: list[tuple[nn.Parameter, Shards]] = []
            for param, own in pairs:
                shards = _shards(param, dims[own], own, boxes, name)
                if shards is not None and is_projected(tuple(param.shape), group):
                    cut.append((param, shards))
                else:
                    single.append(_local(found, param, own, shards, dims[own]))
                    beside += param.numel() if shards is None else len(shards.rows[0]) * len(shards.columns[0])
            refuse_rule(optimizer, single)
            for flat in _flats(cut, found.communicator):
                found.flats.append((number, flat))
                found.slices[flat.tensor], fragments, size = _places(flat)
                buffers.append((fragments, size))
                settings.append(GroupSettings.of(group))
                found.stand_ins[number].append([flat])
            found.stand_ins[number] += [single] if single else []
    beside *= len(optimizer.algorithm.states)
    found.layouts = plan_groups(buffers, found.communicator.dp_size, settings, evenly_sharded=True, beside=beside)
    return found


def _by_unit(
    pairs: Iterable[tuple[nn.Parameter, str]], units: Mapping[int, int]
) -> Iterator[list[tuple[nn.Parameter, str]]]:
    """The parameters of a group with their names, those of one unit together."""
    found: dict[int, list[tuple[nn.Parameter, str]]] = {}
    for param, name in pairs:
        found.setdefault(units.get(id(param), 0), []).append((param, name))
    yield from found.values()


def _communicators(optimizer: LowRankOptimizer, names: Sequence[Sequence[str]], dims: Mapping[str, list[int]]) -> Found:
    """The ranks that projected parameters are cut over, the same for all of them; else those of any parameter."""
    others: Communicator | None = None
    found: Communicator | None = None
    for group, listed in zip(optimizer.param_groups, names, strict=True):
        for param, own in zip(group["params"], listed, strict=True):
            if not dims[own] or not (others is None or is_projected(tuple(param.shape), group)):
                continue
            ranks = Communicator(_ranks_of(param.device_mesh, dims[own]))
            others = others or ranks
            if is_projected(tuple(param.shape), group):
                _require_same_ranks(found or ranks, ranks, optimizer.algorithm.name, own)
                found = found or ranks
    communicator = found or others or Communicator(None)
    return Found(communicator, Communicator(communicator.group))


def _require_same_ranks(first: Communicator, other: Communicator, optimizer: str, name: str) -> None:
    ranks, others = _members_of(first.group), _members_of(other.group)
    if ranks != others:
        raise ValueError(
            f"{optimizer}: {name} is sharded over ranks {others} and other matrices over {ranks}; shard all that are "
            "projected over one mesh, or give those of each mesh an optimizer of their own."
        )


def _members_of(group: dist.ProcessGroup | None) -> list[int]:
    return dist.get_process_group_ranks(group or dist.group.WORLD)


def _shards(
    param: nn.Parameter, dims: Sequence[int], name: str, boxes: Mapping[int, Mapping[str, Box]], optimizer: str
) -> Shards | None:
    """How a parameter is cut; None for one that is not."""
    if not dims:
        return None
    ranks = _members_of(_ranks_of(param.device_mesh, dims))
    if ranks.index(dist.get_rank()) != coordinate(param, dims):
        raise ValueError(
            f"{optimizer}: {name} is sharded on a mesh whose ranks {param.device_mesh.mesh.tolist()} are not in "
            "ascending order; build the mesh by init_device_mesh."
        )
    if not local_of(param).is_contiguous():
        raise ValueError(
            f"{optimizer}: what this rank holds of {name} has strides {local_of(param).stride()}; make its DTensor of "
            "contiguous parts."
        )
    return Shards.of(param, dims, name, boxes_of(boxes, ranks, name))


def _local(found: Found, param: nn.Parameter, name: str, shards: Shards | None, dims: Sequence[int]) -> StandIn:
    """What stands in for a parameter that is not projected, or not cut."""
    stand_in = LocalStandIn(param, shards, coordinate(param, dims) if dims else 0)
    if shards is None and isinstance(param, DTensor) and found.copies.dp_size > 1:
        found.replicas[stand_in.tensor] = found.copies
    parts = zip(accumulate(map(len, stand_in.held), initial=0), stand_in.held, strict=False)
    found.slices[stand_in.tensor] = tuple(ParamSlice(name, at, own.start, own.stop) for at, own in parts)
    return stand_in


def _flats(cut: Sequence[tuple[nn.Parameter, Shards]], communicator: Communicator) -> Iterator[FlatStandIn]:
    """The matrices of a param group, those of one dtype and device together, as many as there is room for."""
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[int, tuple[nn.Parameter, Shards]]]] = {}
    for param, shards in cut:
        most = shards.stepped_numel(0)  # no rank has more than the first
        kinds.setdefault((param.dtype, param.device), []).append((most, (param, shards)))
    for sized in kinds.values():
        for part in split_by_size(sized, MAX_FLAT_NUMEL):
            yield FlatStandIn([param for param, _ in part], [shards for _, shards in part], communicator)


def _places(flat: FlatStandIn) -> tuple[tuple[ParamSlice, ...], list[Mapping[int, MatrixShard]], int]:
    """What lies where in a flat tensor: of this rank the elements of parameters, of all the fragments of matrices."""
    packed, rank = Packed(flat.shards), flat.communicator.dp_rank
    slices = []
    for number, shards in enumerate(flat.shards):
        held = shards.stepped(rank)
        places = accumulate(map(len, held), initial=packed.begin(number, rank))
        slices += [ParamSlice(shards.name, at, own.start, own.stop) for at, own in zip(places, held, strict=False)]
    # No rank has more than the first.
    return (
        tuple(each for each in slices if each.start < each.stop),
        packed.fragments(),
        packed.begin(len(flat.shards), 0),
    )


def _numbers(groups: Sequence[ParamGroup], members: Sequence[Members]) -> dict[str, int]:
    """A number for every projected matrix by name, in the order in which one process would step them."""
    matrices = [
        matrix.name
        for group, listed in zip(groups, members, strict=True)
        for name, shape in listed
        if is_projected(shape, group)
        for matrix in matrices_of(name, shape)
    ]
    return {matrix: number for number, matrix in enumerate(matrices)}
