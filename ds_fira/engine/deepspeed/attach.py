"""How our optimizers come into a DeepSpeed engine; with `ds_fira.zero_*` the only code that touches its private parts.

Written against DeepSpeed 0.17 to 0.19. What it relies on, beside what `ds_fira.engine.deepspeed.flat_groups` does:

- stage 0: `FP16_UnfusedOptimizer` keeps an fp32 copy `fp32_groups[i][j]` of every parameter `fp16_groups[i][j]`; in
  fp32 the optimizer steps the module's own parameters.

lp means the module's low-precision parameters, hp the high-precision master weights the optimizer steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

from ds_fira.checkpoint.slices import Piece
from ds_fira.core.algorithms import KEY
from ds_fira.core.selection import shape_of
from ds_fira.engine.deepspeed.flat_groups import flat_groups
from ds_fira.engine.deepspeed.loss_scale import mend_loss_scaling
from ds_fira.engine.deepspeed.projection import kinds_of, project_as_flat
from ds_fira.engine.deepspeed.recorded_layers import watch_weights
from ds_fira.engine.deepspeed.save_load.files import normalized
from ds_fira.engine.deepspeed.save_load.load import register_checkpoint
from ds_fira.engine.deepspeed.save_load.save import guard_checkpoints
from ds_fira.engine.deepspeed.unsupported import (
    refuse_object,
    refuse_sharding,
    refuse_unsupported,
    refuse_unsupported_module,
)
from ds_fira.engine.deepspeed.versions import warn_if_untested
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.fira_adam import FiraAdam, GaLoreAdam
from ds_fira.optim.param_groups import build_groups, group_defaults
from ds_fira.optim.plug import FiraRMSProp
from ds_fira.optim.settings import check_params, refuse_auto
from ds_fira.optim.state_size import ParamRecord
from ds_fira.sharding.comm import Communicator, GatherExchange
from ds_fira.sharding.geometry import Partitioning
from ds_fira.sharding.local_matrices import LocalMatrices
from ds_fira.sharding.lowrank.step import LowRankMatrices
from ds_fira.sharding.plan import digest, plan_groups, plan_hash
from ds_fira.sharding.projection import is_projected

# What an engine may train with, by the type in its config.
TYPES: dict[str, type[LowRankOptimizer]] = {kind.__name__: kind for kind in (FiraAdam, GaLoreAdam, FiraRMSProp)}


def attach(engine: Any) -> None:
    """Tell the engine's optimizer what lies where, once the engine has built its optimizer wrapper.

    Raises:
        RuntimeError: ranks disagree about the layout, or the wrapper is one this package does not know.
    """
    optimizer: LowRankOptimizer = engine.basic_optimizer
    optimizer.communicator = Communicator(engine.seq_data_parallel_group)
    names = {id(param): name for name, param in normalized(dict(engine.module.named_parameters())).items()}
    if engine.zero_optimization_stage() == 0:
        lp_groups, held = _attach_replicated(engine, optimizer, names), []
    else:
        lp_groups, held = _attach_sharded(engine, optimizer, names)
    optimizer.members = [
        [(names.get(id(p), ""), shape_of(p)) for number, params in lp_groups if number == group for p in params]
        for group in range(len(optimizer.param_groups))
    ]
    structure = [
        (
            *(group.get("rank"), group["proj_type"], group["formulation"]),
            *((group[KEY],) if KEY in group else ()),
            # Of a group with a rank what it leaves unprojected, if anything.
            *((name for name, shape in listed if not is_projected(shape, group)) if "rank" in group else ()),
        )
        for group, listed in zip(optimizer.param_groups, optimizer.members, strict=True)
    ]
    kinds = [
        (number, optimizer.param_groups[number]["state_dtype"], sorted({str(param.dtype) for param in params}))
        for number, params in lp_groups
    ]
    where = (engine.zero_optimization_stage(), type(engine.optimizer).__name__, optimizer.communicator.dp_size)
    optimizer.layout_digest = digest(where, optimizer.members, held, optimizer.layouts, structure, kinds)
    optimizer.inventory_of_module = [
        ParamRecord.of(names.get(id(param), ""), shape_of(param), optimizer.param_groups[group])
        for group, params in lp_groups
        for param in params
    ]
    if optimizer.recorder is not None:
        watch_weights(engine, optimizer, names)


def _attach_replicated(
    engine: Any, optimizer: LowRankOptimizer, names: dict[int, str]
) -> list[tuple[int, list[Tensor]]]:
    """Stage 0: every rank steps every matrix; returns param groups by number with the module's parameters in them."""
    lp_groups = getattr(engine.optimizer, "fp16_groups", None)
    if lp_groups is None:
        lp_groups = [list(group["params"]) for group in optimizer.param_groups]
    optimizer.replicate(optimizer.communicator)
    for group, lp_params in zip(optimizer.param_groups, lp_groups, strict=True):
        for param, lp_param in zip(group["params"], lp_params, strict=True):
            optimizer.gradient_dtypes[param] = lp_param.dtype
            optimizer.pieces[param] = (Piece(names.get(id(lp_param), ""), 0, 0, param.numel()),)
    return list(enumerate(lp_groups))


def _attach_sharded(
    engine: Any, optimizer: LowRankOptimizer, names: dict[int, str]
) -> tuple[list[tuple[int, list[Tensor]]], list[Partitioning]]:
    """Stages 1 to 3: plan every group with a rank, bind its flat partitions.

    Returns:
        As `_attach_replicated`, and what lies where in each of the flat tensors.
    """
    communicator = optimizer.communicator
    flats = flat_groups(engine.optimizer, communicator.dp_size)
    project_as_flat(optimizer, flats)
    projected = [flat for flat in flats if all(kinds_of(flat, optimizer.param_groups))]
    refuse_sharding(optimizer.algorithm, len(projected) < len(flats), engine.zero_optimization_stage())
    buffers = [(flat.matrices(names), flat.partitioning.partition_size) for flat in projected]
    settings = [optimizer.param_groups[flat.group] for flat in projected]
    layouts = plan_groups(buffers, communicator.dp_size, settings, spread=engine.zero_optimization_stage() == 3)
    communicator.require_same(plan_hash(layouts))
    first_fragments = [next(iter(fragments.values())) for matrices, _ in buffers for fragments in matrices]
    numbers = _numbers([fragment.name for fragment in first_fragments], names.values())
    for flat, layout in zip(projected, layouts, strict=True):
        exchanges = tuple(GatherExchange(turn, communicator) for turn in layout.base_turns)
        lean = LowRankMatrices(layout, communicator, numbers) if layout.lean_cuts else None
        owned = (*layout.whole[communicator.dp_rank], *layout.owned_cuts(communicator.dp_rank))
        indices = tuple(numbers[matrix.name] for matrix in owned)
        optimizer.bind(flat.hp_partition, LocalMatrices(layout.whole[communicator.dp_rank], indices, exchanges, lean))
        optimizer.gradient_dtypes[flat.hp_partition] = flat.lp_params[0].dtype
    optimizer.layouts = layouts
    for flat in flats:
        optimizer.pieces[flat.hp_partition] = tuple(
            Piece(names.get(id(flat.lp_params[piece.index]), ""), piece.offset, piece.start, piece.stop)
            for piece in flat.pieces(communicator.dp_rank)
        )
    return [(flat.group, flat.lp_params) for flat in flats], [flat.partitioning for flat in flats]


def _numbers(matrices: list[str], names: Iterable[str]) -> dict[str, int]:
    """A number for every projected matrix by name, in the module's order: the same on any number of ranks."""
    order = {name: position for position, name in enumerate(names)}
    in_order = sorted(matrices, key=lambda matrix: order.get(matrix.partition("[")[0], len(order)))
    return {matrix: number for number, matrix in enumerate(in_order)}


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on CPU: tens of seconds and a C++ compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def fira_of(engine_or_optimizer: Any) -> LowRankOptimizer:
    """The FiraAdam, or another of our optimizers, inside a DeepSpeed engine or optimizer wrapper, or the one given.

    Raises:
        ValueError: there is none.
    """
    found = engine_or_optimizer
    for attribute in ("basic_optimizer", "optimizer"):
        if not isinstance(found, LowRankOptimizer) and getattr(found, attribute, None) is not None:
            found = getattr(found, attribute)
    if not isinstance(found, LowRankOptimizer):
        raise ValueError(
            f"FiraAdam: {type(engine_or_optimizer).__name__} does not train with FiraAdam or its kin; set "
            f"optimizer.type to {' or '.join(map(repr, TYPES))} in its DeepSpeed config."
        )
    return found


def _uses_fira(engine: Any) -> bool:
    """Whether an engine trains with an optimizer of this package, from its JSON or from the optimizer it was given."""
    if engine.client_optimizer is None:
        return engine.optimizer_name() in TYPES
    return isinstance(engine.client_optimizer, LowRankOptimizer)


def _checked_params(engine: Any) -> dict[str, Any]:
    name = engine.optimizer_name()
    return check_params(engine.optimizer_params() or {}, f"{name} in the DeepSpeed config", TYPES[name].algorithm)


def register(*types: type[LowRankOptimizer]) -> None:
    """Make `"type": "FiraAdam"` a DeepSpeed optimizer; called by `import ds_fira`, and again without effect.

    Args:
        *types: further optimizers of this package's kind, each by its class's name.

    DeepSpeed looks a JSON type outside its own list up in `torch.optim`, gives it parameters without names, and wraps
    it without telling it what lies where. So the name goes to `torch.optim`, the class to ZeRO's tested optimizers,
    and three methods of the engine are extended: they stay as they are for every other optimizer.
    """
    TYPES.update({kind.__name__: kind for kind in types})
    for name, kind in TYPES.items():
        setattr(torch.optim, name, kind)
        if kind not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(kind)
    if hasattr(DeepSpeedEngine._configure_optimizer, "__wrapped__"):
        return
    register_checkpoint(attach)
    sanity_check = DeepSpeedEngine._do_sanity_check
    configure_basic = DeepSpeedEngine._configure_basic_optimizer
    configure = DeepSpeedEngine._configure_optimizer

    @functools.wraps(sanity_check)
    def _do_sanity_check(engine: Any) -> None:
        sanity_check(engine)
        if _uses_fira(engine):
            if dist.get_rank() == 0:
                warn_if_untested(deepspeed.__version__)
            refuse_auto(engine._config._param_dict)
            refuse_unsupported(engine)
            if engine.client_optimizer is None:
                _checked_params(engine)

    @functools.wraps(configure_basic)
    def _configure_basic_optimizer(engine: Any, model_parameters: Any) -> Any:
        name = engine.optimizer_name()
        if name not in TYPES:
            return configure_basic(engine, model_parameters)
        refuse_unsupported_module(engine.module, engine.has_moe_layers)
        settings = _checked_params(engine)
        dp_size = dist.get_world_size(group=engine.seq_data_parallel_group)
        groups = build_groups(
            engine.module, model_parameters, settings, engine.zero_optimization_stage(), dp_size, TYPES[name].algorithm
        )
        whole_training = {
            key: settings[key] for key in ("check_sync_every", "record_scaling_factors", "unpickle_checkpoints")
        }
        optimizer = TYPES[name](groups, **group_defaults(settings), **whole_training)
        optimizer.suspended = True
        return optimizer

    @functools.wraps(configure)
    def _configure_optimizer(engine: Any, client_optimizer: Any, model_parameters: Any) -> None:
        def suspend(optimizer: Any) -> Any:
            if optimizer is not None:
                refuse_object(engine, optimizer, isinstance(optimizer, LowRankOptimizer))
            if isinstance(optimizer, LowRankOptimizer):
                refuse_unsupported(engine)
                refuse_unsupported_module(engine.module, engine.has_moe_layers)
                # Some wrappers make a step with zero gradients as they are built; it must not decay the weights.
                optimizer.suspended = True
                if engine.zero_optimization_stage() > 0:
                    optimizer.separate()
            return optimizer

        if callable(client_optimizer):
            make_optimizer = client_optimizer
            configure(engine, lambda params: suspend(make_optimizer(params)), model_parameters)
        else:
            configure(engine, suspend(client_optimizer), model_parameters)
        if isinstance(engine.basic_optimizer, LowRankOptimizer):
            attach(engine)
            mend_loss_scaling(engine)
            engine.basic_optimizer.suspended = False

    DeepSpeedEngine._do_sanity_check = _do_sanity_check
    DeepSpeedEngine._configure_basic_optimizer = _configure_basic_optimizer
    DeepSpeedEngine._configure_optimizer = _configure_optimizer
    guard_checkpoints(_uses_fira)
