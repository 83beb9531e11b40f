"""How our optimizers come into a DeepSpeed engine: made from the config, checked, and told what lies where.

Written against DeepSpeed 0.17 to 0.19. What it relies on, beside what `flat_groups` in this folder does:

- stage 0: `FP16_UnfusedOptimizer` keeps an fp32 copy `fp32_groups[i][j]` of every parameter `fp16_groups[i][j]`; in
  fp32 the optimizer steps the module's own parameters.

lp means the module's low-precision parameters, hp the high-precision master weights the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_fira.core.algorithms import KEY
from ds_fira.core.param_shape import shape_of
from ds_fira.engine.deepspeed.chosen import checked_params, our_name, trains_ours
from ds_fira.engine.deepspeed.flat_groups import FlatGroup, flat_groups
from ds_fira.engine.deepspeed.projection import kinds_of, project_as_flat
from ds_fira.engine.deepspeed.recorded_layers import watch_weights
from ds_fira.engine.deepspeed.save_load.files import normalized
from ds_fira.engine.deepspeed.unsupported import (
    refuse_object,
    refuse_sharding,
    refuse_unsupported,
    refuse_unsupported_module,
    warn_if_untested,
)
from ds_fira.engine.deepspeed.weight_sync import refuse_partitioned_weights
from ds_fira.optim.attachment import EngineAttachment
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.param_groups import build_groups, group_defaults
from ds_fira.optim.registry import TYPES
from ds_fira.optim.settings import refuse_auto
from ds_fira.optim.state_size import ParamRecord
from ds_fira.sharding.comm import Communicator, GatherExchange
from ds_fira.sharding.geometry import ParamSlice
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
        warn_if_untested(deepspeed.__version__, name)
    refuse_auto(engine._config._param_dict)
    refuse_unsupported(engine)
    if from_json:
        checked_params(engine)


def build_optimizer(
    configure: Callable[..., torch.optim.Optimizer], engine: DeepSpeedEngine, model_parameters: Iterable[object]
) -> torch.optim.Optimizer:
    """`_configure_basic_optimizer`: makes an optimizer of this package from the config."""
    kind = TYPES.get(engine.optimizer_name())
    if kind is None:
        return configure(engine, model_parameters)
    refuse_unsupported_module(engine)
    settings = checked_params(engine)
    dp_size = dist.get_world_size(group=engine.seq_data_parallel_group)
    groups = build_groups(
        engine.module, model_parameters, settings, engine.zero_optimization_stage(), dp_size, kind.algorithm
    )
    whole_training = ("check_sync_every", "record_scaling_factors", "unpickle_checkpoints")
    optimizer = kind(groups, **group_defaults(settings), **{key: settings[key] for key in whole_training})
    optimizer.await_attachment(flat=False)  # its groups are of one kind each
    return optimizer


def attach_built(
    configure: Callable[..., None], engine: DeepSpeedEngine, client_optimizer: object, *args: object, **kwargs: object
) -> None:
    """`_configure_optimizer`: an optimizer of this package makes no step until it knows what lies where."""

    def await_engine(optimizer: object) -> object:
        if optimizer is not None:
            refuse_object(engine, optimizer)
        if isinstance(optimizer, LowRankOptimizer):
            refuse_unsupported(engine)
            refuse_unsupported_module(engine)
            optimizer.await_attachment(flat=engine.zero_optimization_stage() > 0)
        return optimizer

    if callable(client_optimizer):
        configure(engine, lambda params: await_engine(client_optimizer(params)), *args, **kwargs)
    else:
        configure(engine, await_engine(client_optimizer), *args, **kwargs)
    if trains_ours(engine):
        refuse_partitioned_weights(engine)
        attach(engine)


@dataclass(frozen=True, slots=True)
class _Group:
    """Parameters that the engine steps together.

    Attributes:
        number: of the optimizer's param group.
        lp_params: the module's parameters.
        slices: by stepped tensor, what it holds of them.
        gradient_dtypes: by stepped tensor, the dtype in which its gradient was computed.
        flat: where they lie in a flat tensor; None where every parameter is stepped by itself.
    """

    number: int
    lp_params: list[Tensor]
    slices: dict[Tensor, tuple[ParamSlice, ...]]
    gradient_dtypes: dict[Tensor, torch.dtype]
    flat: FlatGroup | None = None


def attach(engine: DeepSpeedEngine) -> None:
    """Tell the engine's optimizer what lies where, once the engine has built its optimizer wrapper; a collective call.

    Raises:
        RuntimeError: ranks disagree about the layout, or the wrapper is one this package does not know.
        ValueError: a rule that is not elementwise would be given parts of parameters.
    """
    optimizer: LowRankOptimizer = engine.basic_optimizer
    communicator, stage = Communicator(engine.seq_data_parallel_group), engine.zero_optimization_stage()
    names = {id(param): name for name, param in normalized(dict(engine.module.named_parameters())).items()}
    if stage == 0:
        groups, layouts, matrices = _replicated_groups(engine, optimizer, names), [], {}
    else:
        flats = flat_groups(engine.optimizer, communicator.dp_size)
        project_as_flat(optimizer, flats, communicator)
        groups = [_flat_group(flat, names, communicator.dp_rank) for flat in flats]
        layouts, matrices = _plan_flats(optimizer, flats, names, communicator, stage)
    members = [
        [(names.get(id(p), ""), shape_of(p)) for group in groups if group.number == number for p in group.lp_params]
        for number in range(len(optimizer.param_groups))
    ]
    optimizer.attach(
        EngineAttachment(
            communicator=communicator,
            replicated=stage == 0,
            members=members,
            inventory=[
                ParamRecord.of(names.get(id(param), ""), shape_of(param), optimizer.param_groups[group.number])
                for group in groups
                for param in group.lp_params
            ],
            layouts=layouts,
            slices={tensor: held for group in groups for tensor, held in group.slices.items()},
            matrices=matrices,
            gradient_dtypes={tensor: dtype for group in groups for tensor, dtype in group.gradient_dtypes.items()},
            digest=digest(
                (stage, type(engine.optimizer).__name__, communicator.dp_size),
                members,
                [group.flat.partitioning for group in groups if group.flat is not None],
                layouts,
                *_structure(optimizer, groups, members),
            ),
        )
    )
    if optimizer.recorder is not None:
        watch_weights(engine, optimizer, names)


def _replicated_groups(engine: DeepSpeedEngine, optimizer: LowRankOptimizer, names: dict[int, str]) -> list[_Group]:
    """The groups of stage 0, where every rank steps every parameter."""
    stepped = [list(group["params"]) for group in optimizer.param_groups]
    pairs = zip(stepped, getattr(engine.optimizer, "fp16_groups", stepped), strict=True)
    return [
        _Group(
            number,
            lp_params,
            {
                param: (ParamSlice(names.get(id(lp_param), ""), 0, 0, param.numel()),)
                for param, lp_param in zip(params, lp_params, strict=True)
            },
            {param: lp_param.dtype for param, lp_param in zip(params, lp_params, strict=True)},
        )
        for number, (params, lp_params) in enumerate(pairs)
    ]


def _flat_group(flat: FlatGroup, names: dict[int, str], dp_rank: int) -> _Group:
    """One group of the stages 1 to 3."""
    stepped, slices = flat.hp_partition, flat.slices(dp_rank, names)
    return _Group(flat.group, flat.lp_params, {stepped: slices}, {stepped: flat.lp_params[0].dtype}, flat)


def _plan_flats(
    optimizer: LowRankOptimizer, flats: list[FlatGroup], names: dict[int, str], communicator: Communicator, stage: int
) -> tuple[list[GroupLayout], dict[Tensor, LocalMatrices]]:
    """Plan the flat tensors that are projected, the same on every rank; and what this rank has in them."""
    projected = [flat for flat in flats if all(kinds_of(flat, optimizer.param_groups))]
    refuse_sharding(optimizer.algorithm, len(projected) < len(flats), stage)
    buffers = [(flat.matrices(names), flat.partitioning.partition_size) for flat in projected]
    settings = [optimizer.param_groups[flat.group] for flat in projected]
    layouts = plan_groups(buffers, communicator.dp_size, settings, spread=stage == 3)
    communicator.require_same(plan_hash(layouts))
    matrices = [next(iter(fragments.values())).name for planned, _ in buffers for fragments in planned]
    numbers = _numbers(matrices, names.values())
    bound = {}
    for flat, layout in zip(projected, layouts, strict=True):
        whole = layout.whole[communicator.dp_rank]
        exchanges = tuple(GatherExchange(turn, communicator) for turn in layout.base_turns)
        lean = LowRankMatrices(layout, communicator, numbers) if layout.lean_cuts else None
        indices = tuple(numbers[matrix.name] for matrix in (*whole, *layout.owned_cuts(communicator.dp_rank)))
        bound[flat.hp_partition] = LocalMatrices(whole, indices, exchanges, lean)
    return layouts, bound


def _numbers(matrices: list[str], names: Iterable[str]) -> dict[str, int]:
    """A number for every projected matrix by name, in the module's order: the same on any number of ranks."""
    order = {name: position for position, name in enumerate(names)}
    in_order = sorted(matrices, key=lambda matrix: order.get(matrix.partition("[")[0], len(order)))
    return {matrix: number for number, matrix in enumerate(in_order)}


def _structure(
    optimizer: LowRankOptimizer, groups: list[_Group], members: list[list[tuple[str, tuple[int, ...]]]]
) -> tuple[list[tuple[object, ...]], list[tuple[int, str, list[str]]]]:
    """Of the settings and dtypes what decides how states are laid out; state dicts are told apart by it."""
    structure = [
        (
            *(group.get("rank"), group["proj_type"], group["formulation"]),
            *((group[KEY],) if KEY in group else ()),
            # Of a group with a rank what it leaves unprojected, if anything.
            *((name for name, shape in listed if not is_projected(shape, group)) if "rank" in group else ()),
        )
        for group, listed in zip(optimizer.param_groups, members, strict=True)
    ]
    kinds = [
        (
            group.number,
            optimizer.param_groups[group.number]["state_dtype"],
            sorted({str(param.dtype) for param in group.lp_params}),
        )
        for group in groups
    ]
    return structure, kinds
