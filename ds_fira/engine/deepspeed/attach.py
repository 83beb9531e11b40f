"""How our optimizers come into a DeepSpeed engine: made from the config, checked, and told what lies where.

`patches.py` says which methods of the engine this wraps, and `flat_groups.py` reads where DeepSpeed puts parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule

from ds_fira.core.selection import shape_of
from ds_fira.engine.binding import agree_on_kernels, structure_of
from ds_fira.engine.deepspeed import objects, unsupported
from ds_fira.engine.deepspeed.chosen import checked_params, our_name, trains_ours
from ds_fira.engine.deepspeed.flat_groups import FlatGroup, by_group, stepped_groups
from ds_fira.engine.deepspeed.holders import Holders
from ds_fira.engine.deepspeed.param_states import link_params
from ds_fira.engine.deepspeed.pipeline import refuse_shared
from ds_fira.engine.deepspeed.planning import layouts_of_all, plan_flats
from ds_fira.engine.deepspeed.projection import holds_vectors, project_as_flat, warn_of_mixed
from ds_fira.engine.deepspeed.recorded_layers import record_weights
from ds_fira.engine.deepspeed.schedulers import show_user_groups
from ds_fira.engine.deepspeed.tensor_parallel import note_slices
from ds_fira.engine.deepspeed.thawed import note_frozen
from ds_fira.engine.deepspeed.weight_sync import refuse_partitioned_weights
from ds_fira.optim.attachment import EngineAttachment
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.expert_groups import note_experts
from ds_fira.optim.param_groups import build_groups, group_defaults
from ds_fira.optim.rank_rule import grouped, parameters_of
from ds_fira.optim.registry import TYPES
from ds_fira.optim.settings import SaveSettings, refuse_auto
from ds_fira.optim.state_size import ParamRecord
from ds_fira.sharding.plan import digest


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
    note_experts(engine.module, kind.algorithm.name)
    if dist.get_rank() == 0:
        unsupported.warn_of_state_dtype(engine, kind.algorithm.name)
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
    objects.refuse_forgotten(engine, client_optimizer)
    # By whose order a checkpoint of stage 0 that has no names is read.
    listed = client_optimizer.param_groups if isinstance(client_optimizer, LowRankOptimizer) else grouped(args[0])
    engine.fira_given = [[id(param) for param in parameters_of(group["params"])] for group in listed]

    def await_engine(optimizer: object) -> object:
        objects.refuse_copied_groups(optimizer)
        if isinstance(optimizer, LowRankOptimizer):
            optimizer = optimizer.itself
            unsupported.refuse_unsupported(engine, optimizer.algorithm.name)
            unsupported.refuse_unsupported_module(engine, optimizer.algorithm.name)
            note_slices(engine, optimizer.algorithm.name)
            note_experts(engine.module, optimizer.algorithm.name)
            objects.accept_object(engine)
            optimizer.await_attachment(flat=engine.zero_optimization_stage() > 0)
        return optimizer

    if callable(client_optimizer):
        configure(engine, lambda params: await_engine(client_optimizer(params)), *args, **kwargs)
    else:
        configure(engine, await_engine(client_optimizer), *args, **kwargs)
    if trains_ours(engine):
        refuse_partitioned_weights(engine)
        if getattr(engine.optimizer, "elastic_checkpoint", False):
            # Files of ours are loaded on any number of ranks. DeepSpeed's elastic ones hold a list of what each rank
            # has, of which it gives every rank rank 0's bases and low-rank moments.
            engine.optimizer.elastic_checkpoint = False
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
    refuse_shared(engine, optimizer, flats)
    if stage > 0:
        project_as_flat(optimizer, flats, holders.planners)
        warn_of_mixed(optimizer, flats, holders.planners)
    partitionings = [flat.partitioning for flat in flats if stage > 0]
    if holders.grid is not None:
        partitionings = holders.grid.learn(flats, optimizer.algorithm.name)
    plans, matrices = plan_flats(optimizer, flats, holders, stage)
    groups = optimizer.param_groups
    trained = [
        (flat.group, name, shape_of(param)) for flat in flats for name, param in holders.everywhere(flat.lp_params)
    ]
    members = [[(name, shape) for group, name, shape in trained if group == number] for number in range(len(groups))]
    parts = [[flat] for flat in flats] if stage > 0 else by_group(flats)
    inventory = [ParamRecord.of(name, shape, groups[group]) for group, name, shape in trained]
    if holders.staged:
        inventory = list(holders.of_all({record.name: record for record in inventory}).values())
    own = digest(
        (stage, engine.optimizer.__class__.__name__, holders.planners.dp_size),
        members,
        partitionings,
        *layouts_of_all(plans, holders.planners),
        [structure_of(group, listed) for group, listed in zip(groups, members, strict=True)],
        [_precision(part, groups) for part in parts],
    )
    optimizer.attach(
        EngineAttachment(
            communicator=communicator,
            replicas={flat.hp_partition: ranks for flat in flats if (ranks := holders.replicas(flat)) is not None},
            members=members,
            inventory=inventory,
            layouts=[layout for _, layout in plans],
            slices={flat.hp_partition: flat.slices(flat.communicator.dp_rank, holders.labels) for flat in flats},
            vectors={flat.hp_partition: holds_vectors(flat) for flat in flats},
            matrices=matrices,
            names=holders.names,
            gradient_dtypes={flat.hp_partition: flat.lp_params[0].dtype for flat in flats},
            digest=_of_stages(own, engine, holders),
        )
    )
    if flats:
        agree_on_kernels(optimizer, flats[0].hp_partition.device, communicator)
    if optimizer.recorder is not None:
        record_weights(engine, optimizer, flats, holders)


def _of_stages(own: str, engine: DeepSpeedEngine, holders: Holders) -> str:
    """The digest of all stages of a pipeline, whose files are other ones than those of another module; else the own."""
    if not isinstance(engine.module, PipelineModule):
        return own
    parts = set(holders.everyone.gather_objects((holders.stage, own)))
    return digest(("pipeline", engine.module.num_stages), sorted(parts))


def _precision(flats: Sequence[FlatGroup], groups: Sequence[Mapping[str, object]]) -> tuple[int, object, list[str]]:
    """The dtypes of what is stepped together: of the states, and of the module's parameters."""
    number = flats[0].group
    return number, groups[number]["state_dtype"], sorted(set().union(*(flat.dtypes for flat in flats)))
