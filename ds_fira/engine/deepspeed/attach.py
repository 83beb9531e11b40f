"""How our optimizers come into a DeepSpeed engine: made from the config, checked, and told what lies where.

`patches.py` says which methods of the engine this wraps, and `flat_groups.py` reads where DeepSpeed puts parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_fira.checkpoint.reconcile import Members
from ds_fira.core import kernels
from ds_fira.core.algorithms import KEY
from ds_fira.core.selection import shape_of
from ds_fira.core.settings import GroupSettings
from ds_fira.engine.deepspeed import unsupported
from ds_fira.engine.deepspeed.chosen import checked_params, our_name, trains_ours
from ds_fira.engine.deepspeed.flat_groups import FlatGroup, by_group, stepped_groups
from ds_fira.engine.deepspeed.holders import Holders
from ds_fira.engine.deepspeed.param_states import link_params
from ds_fira.engine.deepspeed.projection import kinds_of, project_as_flat
from ds_fira.engine.deepspeed.recorded_layers import record_weights
from ds_fira.engine.deepspeed.schedulers import show_user_groups
from ds_fira.engine.deepspeed.tensor_parallel import note_slices, sliced
from ds_fira.engine.deepspeed.thawed import note_frozen
from ds_fira.engine.deepspeed.weight_sync import refuse_partitioned_weights
from ds_fira.optim.attachment import EngineAttachment
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.param_groups import build_groups, group_defaults
from ds_fira.optim.rank_rule import grouped, parameters_of
from ds_fira.optim.registry import TYPES
from ds_fira.optim.settings import SaveSettings, refuse_auto
from ds_fira.optim.state_size import ParamRecord
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.gather import GatherExchange
from ds_fira.sharding.geometry import matrices_of
from ds_fira.sharding.local_matrices import LocalMatrices
from ds_fira.sharding.lowrank.step import LowRankMatrices
from ds_fira.sharding.plan import GroupLayout, digest, plan_groups, plan_hash
from ds_fira.sharding.projection import is_projected


def check_config(check: Callable[..., None], engine: DeepSpeedEngine) -> None:
    """`_do_sanity_check`: also refuses what low-rank states do not support, before anything is communicated."""
    check(engine)
    from_json = engine.client_optimizer is None
    name = our_name(engine.client_optimizer, engine.optimizer_name())
    if name is None or not (from_json or isinstance(engine.client_optimizer, LowRankOptimizer)):
        return  # what a function makes is checked once it is there
    if dist.get_rank() == 0:
        unsupported.warn_if_untested(deepspeed.__version__, name)
    refuse_auto(engine._config._param_dict)
    unsupported.refuse_unsupported(engine, name)
    if from_json:
        checked_params(engine)


def build_optimizer(
    configure: Callable[..., torch.optim.Optimizer], engine: DeepSpeedEngine, model_parameters: Iterable[object]
) -> torch.optim.Optimizer:
    """`_configure_basic_optimizer`: makes an optimizer of this package from the config."""
    if engine.optimizer_name() not in TYPES:
        return configure(engine, model_parameters)
    return make_optimizer(engine, model_parameters, dist.get_world_size(group=engine.seq_data_parallel_group))


def make_optimizer(engine: DeepSpeedEngine, model_parameters: Iterable[object], dp_size: int) -> LowRankOptimizer:
    """The optimizer of this package that the config names; makes no step before `attach`.

    Args:
        engine: with its config and its module.
        model_parameters: parameters, (name, parameter) pairs or param groups.
        dp_size: data-parallel ranks.

    Raises:
        ValueError: a setting, the module or a parameter is refused.
    """
    kind = TYPES[engine.optimizer_name()]
    unsupported.refuse_unsupported_module(engine, kind.algorithm.name)
    note_slices(engine, kind.algorithm.name)
    given = grouped(model_parameters)
    settings = checked_params(engine, given)
    groups = build_groups(engine.module, given, settings, engine.zero_optimization_stage(), dp_size, kind.algorithm)
    whole_training = ("check_sync_every", "record_scaling_factors", "unpickle_checkpoints", "kernels")
    whole_training += SaveSettings._fields
    optimizer = kind(groups, **group_defaults(settings), **{key: settings[key] for key in whole_training})
    optimizer.note_given(given)
    optimizer.await_attachment(flat=False)  # its groups are of one kind each
    return optimizer


def attach_built(
    configure: Callable[..., None], engine: DeepSpeedEngine, client_optimizer: object, *args: object, **kwargs: object
) -> None:
    """`_configure_optimizer`: an optimizer of this package makes no step until it knows what lies where."""
    # By whose order a checkpoint of stage 0 that has no names is read.
    listed = client_optimizer.param_groups if isinstance(client_optimizer, LowRankOptimizer) else grouped(args[0])
    engine.fira_given = [[id(param) for param in parameters_of(group["params"])] for group in listed]

    def await_engine(optimizer: object) -> object:
        if optimizer is not None:
            unsupported.refuse_object(engine, optimizer)
        if isinstance(optimizer, LowRankOptimizer):
            optimizer = optimizer.itself
            unsupported.refuse_unsupported(engine, optimizer.algorithm.name)
            unsupported.refuse_unsupported_module(engine, optimizer.algorithm.name)
            note_slices(engine, optimizer.algorithm.name)
            optimizer.await_attachment(flat=engine.zero_optimization_stage() > 0)
        return optimizer

    if callable(client_optimizer):
        configure(engine, lambda params: await_engine(client_optimizer(params)), *args, **kwargs)
    else:
        configure(engine, await_engine(client_optimizer), *args, **kwargs)
    if trains_ours(engine):
        refuse_partitioned_weights(engine)
        note_frozen(engine)
        attach(engine)
        link_params(engine)
        show_user_groups(engine)


def attach(engine: DeepSpeedEngine) -> None:
    """Tell the engine's optimizer what lies where, once the engine has built its optimizer wrapper; a collective call.

    Raises:
        RuntimeError: ranks disagree about the layout, or the wrapper is one this package does not know.
        ValueError: a rule that is not elementwise would be given parts of parameters.
    """
    optimizer: LowRankOptimizer = engine.basic_optimizer
    holders = engine.fira_holders = Holders(engine)
    stage = engine.zero_optimization_stage()
    communicator, flats = holders.everyone, stepped_groups(engine, holders.of)
    if stage > 0:
        project_as_flat(optimizer, flats, communicator)
    partitionings = [flat.partitioning for flat in flats if stage > 0]
    if holders.grid is not None:
        partitionings = holders.grid.learn(flats)
    plans, matrices = _plan_flats(optimizer, flats, holders, stage)
    groups = optimizer.param_groups
    trained = [
        (flat.group, name, shape_of(param)) for flat in flats for name, param in holders.everywhere(flat.lp_params)
    ]
    members = [[(name, shape) for group, name, shape in trained if group == number] for number in range(len(groups))]
    parts = [[flat] for flat in flats] if stage > 0 else by_group(flats)
    optimizer.attach(
        EngineAttachment(
            communicator=communicator,
            replicas={flat.hp_partition: ranks for flat in flats if (ranks := holders.replicas(flat)) is not None},
            members=members,
            inventory=[ParamRecord.of(name, shape, groups[group]) for group, name, shape in trained],
            layouts=[layout for _, layout in plans],
            slices={flat.hp_partition: flat.slices(flat.communicator.dp_rank, holders.labels) for flat in flats},
            matrices=matrices,
            names=holders.names,
            gradient_dtypes={flat.hp_partition: flat.lp_params[0].dtype for flat in flats},
            digest=digest(
                (stage, engine.optimizer.__class__.__name__, communicator.dp_size),
                members,
                partitionings,
                *_layouts_of_all(plans, communicator),
                [_structure(group, listed) for group, listed in zip(groups, members, strict=True)],
                [_precision(part, groups) for part in parts],
            ),
        )
    )
    _agree_on_kernels(optimizer, flats, communicator)
    if optimizer.recorder is not None:
        record_weights(engine, optimizer, flats, holders)


def _agree_on_kernels(optimizer: LowRankOptimizer, flats: Sequence[FlatGroup], communicator: Communicator) -> None:
    """Where the kernels do not run on some rank, no rank uses them: replicas would drift apart by their rounding.

    One rank says so, for all, with the reason of the first that has one to tell.
    """
    if optimizer.kernels == "off" or not flats:
        return
    found = communicator.gather_objects(kernels.fault(flats[0].hp_partition.device))
    faults = {rank: fault for rank, fault in enumerate(found) if fault is not None}
    if len(faults) == len(found):  # on devices that the kernels are not for, there is nothing to say
        faults = {rank: fault for rank, fault in faults.items() if not fault.known}
    if not faults:
        return
    optimizer.kernels = "off"
    if communicator.dp_rank == 0:
        rank, fault = min(faults.items(), key=lambda item: item[1].known)
        warnings.warn(f"{optimizer.algorithm.name}: on rank {rank} {fault.advice}", stacklevel=2)


def _structure(group: Mapping[str, object], members: Members) -> tuple[object, ...]:
    """The settings of a param group that decide how its states are laid out, and what it leaves unprojected."""
    return (
        *(group.get("rank"), group["proj_type"], group["formulation"]),
        *((group[KEY],) if KEY in group else ()),
        *((name for name, shape in members if not is_projected(shape, group)) if "rank" in group else ()),
    )


def _precision(flats: Sequence[FlatGroup], groups: Sequence[Mapping[str, object]]) -> tuple[int, object, list[str]]:
    """The dtypes of what is stepped together: of the states, and of the module's parameters."""
    number = flats[0].group
    return number, groups[number]["state_dtype"], sorted(set().union(*(flat.dtypes for flat in flats)))


def _plan_flats(
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
    if not projected:
        return [], bound
    numbers = _numbers([flat for flat in flats if all(kinds_of(flat, optimizer.param_groups))], holders)
    if stage == 0:
        bound |= _whole(optimizer, flats, numbers, holders)
    ranks = [holders.sharers(flat) for _, flat in projected]
    for communicator in dict.fromkeys(ranks):
        places = [place for place, own in enumerate(ranks) if own is communicator]
        found = [projected[place] for place in places]
        buffers = [holders.buffer(number, flat) for number, flat in found]
        settings = [GroupSettings.of(optimizer.param_groups[flat.group]) for _, flat in found]
        evenly = stage == 3 or any(sliced(flat.lp_params) for _, flat in found)
        layouts = plan_groups(buffers, communicator.dp_size, settings, evenly)
        communicator.require_same(plan_hash(layouts), optimizer.algorithm.name)
        for place, (_, flat), layout in zip(places, found, layouts, strict=True):
            plans[place] = (communicator, layout)
            bound[flat.hp_partition] = _bind(layout, communicator, numbers, holders.replicas(flat))
    return [plans[place] for place in range(len(projected))], bound


def _whole(
    optimizer: LowRankOptimizer, flats: Sequence[FlatGroup], numbers: Mapping[str, int], holders: Holders
) -> dict[Tensor, LocalMatrices]:
    """The matrices that no slice is of, at stage 0, by numbers that count the sliced ones too."""
    found = {}
    for flat in flats:
        (param,) = flat.lp_params
        if all(kinds_of(flat, optimizer.param_groups)) and not sliced(flat.lp_params):
            shards = tuple(matrices_of("", shape_of(param)))
            listed = matrices_of(holders.names[id(param)], shape_of(param))
            indices = tuple(numbers[matrix.name] for matrix in listed)
            found[flat.hp_partition] = LocalMatrices(shards, indices, batched=param.ndim == 3, flat=False)
    return found


def _bind(
    layout: GroupLayout, communicator: Communicator, numbers: Mapping[str, int], replicas: Communicator | None
) -> LocalMatrices:
    """What a rank steps of a flat tensor, and the collectives that it takes part in for it."""
    whole = layout.unsplit[communicator.dp_rank]
    exchanges = tuple(GatherExchange(turn, communicator) for turn in layout.gathered_turns)
    low_rank = LowRankMatrices(layout.low_rank, communicator, numbers, replicas) if layout.low_rank else None
    indices = tuple(numbers[matrix.name] for matrix in (*whole, *layout.gathered_by(communicator.dp_rank)))
    return LocalMatrices(whole, indices, exchanges, low_rank)


def _layouts_of_all(plans: Sequence[tuple[Communicator, GroupLayout]], everyone: Communicator) -> list[object]:
    """The layouts for a digest that is the same on every rank; a collective call where ranks have different ones."""
    common = [layout for communicator, layout in plans if communicator is everyone]
    own = [layout for communicator, layout in plans if communicator is not everyone]
    return [common, everyone.gather_objects(plan_hash(own))] if own else [common]


def _numbers(projected: Sequence[FlatGroup], holders: Holders) -> dict[str, int]:
    """A number for every projected matrix by name, in the module's order: the same on any number of ranks."""
    order = {name: position for position, name in enumerate(holders.order)}
    matrices = [
        matrix.name
        for flat in projected
        for name, param in holders.everywhere(flat.lp_params)
        for matrix in matrices_of(name, shape_of(param))
    ]
    in_order = sorted(matrices, key=lambda matrix: order.get(matrix.partition("[")[0], len(order)))
    return {matrix: number for number, matrix in enumerate(in_order)}
