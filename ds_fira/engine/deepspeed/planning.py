"""What every rank has to step of an engine's tensors: plans of those that are cut, and the collectives they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ds_fira.core.selection import shape_of
from ds_fira.core.settings import GroupSettings
from ds_fira.engine.binding import bind_layout
from ds_fira.engine.deepspeed import unsupported
from ds_fira.engine.deepspeed.flat_groups import FlatGroup, held_matrices
from ds_fira.engine.deepspeed.holders import Holders
from ds_fira.engine.deepspeed.projection import kinds_of
from ds_fira.engine.deepspeed.tensor_parallel import sliced
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.geometry import matrices_of
from ds_fira.sharding.local_matrices import LocalMatrices
from ds_fira.sharding.plan import GroupLayout, plan_groups, plan_hash


def plan_flats(
    optimizer: LowRankOptimizer, flats: list[FlatGroup], holders: Holders, stage: int
) -> tuple[list[tuple[Communicator, GroupLayout]], dict[Tensor, LocalMatrices]]:
    """Plan the tensors that are projected and cut, those of the same ranks together; and what this rank has in them.

    Returns:
        Of every such tensor its ranks and its layout, the same on all of them; the matrices of this rank, by tensor.
    """
    cut = [(number, flat) for number, flat in enumerate(flats) if stage > 0 or sliced(flat.lp_params)]
    projected = [(number, flat) for number, flat in cut if all(kinds_of(flat, optimizer.param_groups))]
    unsupported.refuse_sharding(optimizer.algorithm, len(projected) < len(cut), stage)
    plans: dict[int, tuple[Communicator, GroupLayout]] = {}
    bound: dict[Tensor, LocalMatrices] = {}
    # A collective call of all stages of a pipeline, also of one in which nothing is projected.
    numbers = _numbers([flat for flat in flats if all(kinds_of(flat, optimizer.param_groups))], holders)
    if stage == 0 and (projected or holders.shared_out):
        bound |= _whole(optimizer, flats, numbers, holders)
    if not projected:
        return [], bound
    ranks = [holders.sharers(flat) for _, flat in projected]
    # But for slices, which need not be of one size on all ranks.
    whole = [flat for _, flat in cut if not sliced(flat.lp_params)]
    unprojected = [flat for flat in whole if not all(kinds_of(flat, optimizer.param_groups))]
    for communicator in dict.fromkeys(ranks):
        places = [place for place, own in enumerate(ranks) if own is communicator]
        found = [projected[place] for place in places]
        buffers = [holders.buffer(number, flat) for number, flat in found]
        settings = [GroupSettings.of(optimizer.param_groups[flat.group]) for _, flat in found]
        evenly = stage == 3 or any(sliced(flat.lp_params) for _, flat in found)
        others = [flat for flat in unprojected if flat.communicator is communicator]
        beside = len(optimizer.algorithm.states) * sum(flat.partitioning.partition_size for flat in others)
        layouts = plan_groups(buffers, communicator.dp_size, settings, evenly, beside)
        communicator.require_same(plan_hash(layouts), optimizer.algorithm.name)
        for place, (_, flat), layout in zip(places, found, layouts, strict=True):
            plans[place] = (communicator, layout)
            bound[flat.hp_partition] = bind_layout(layout, communicator, numbers, holders.replicas(flat))
    return [plans[place] for place in range(len(projected))], bound


def _whole(
    optimizer: LowRankOptimizer, flats: Sequence[FlatGroup], numbers: Mapping[str, int], holders: Holders
) -> dict[Tensor, LocalMatrices]:
    """The matrices that no slice is of, at stage 0, by numbers that count the sliced ones too."""
    found = {}
    for flat in flats:
        (param,) = flat.lp_params
        if all(kinds_of(flat, optimizer.param_groups)) and not sliced(flat.lp_params):
            shards = tuple(held_matrices("", param))
            listed = held_matrices(holders.names[id(param)], param)
            indices = tuple(numbers[matrix.name] for matrix in listed)
            found[flat.hp_partition] = LocalMatrices(shards, indices, batched=param.ndim == 3, flat=False)
    return found


def layouts_of_all(plans: Sequence[tuple[Communicator, GroupLayout]], everyone: Communicator) -> list[object]:
    """The layouts for a digest that is the same on every rank; a collective call where ranks have different ones."""
    common = [layout for communicator, layout in plans if communicator is everyone]
    own = [layout for communicator, layout in plans if communicator is not everyone]
    return [common, everyone.gather_objects(plan_hash(own))] if own else [common]


def _numbers(projected: Sequence[FlatGroup], holders: Holders) -> dict[str, int]:
    """A number for every projected matrix by name, in the module's order: the same on any number of ranks."""
    order = {name: position for position, name in enumerate(holders.order)}
    matrices = holders.of_all(
        {
            matrix.name: None
            for flat in projected
            for name, param in holders.everywhere(flat.lp_params)
            for matrix in matrices_of(name, shape_of(param))
        }
    )
    in_order = sorted(matrices, key=lambda matrix: order.get(matrix.partition("[")[0], len(order)))
    return {matrix: number for number, matrix in enumerate(in_order)}
