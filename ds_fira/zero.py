"""Where DeepSpeed keeps the parameters: only the files `zero*.py` touch DeepSpeed's private attributes.

Written against DeepSpeed 0.19.8. What it relies on:

- `DeepSpeedZeroOptimizer` (stages 1 and 2): the flat buffer of group i holds `round_robin_bit16_groups[i]` at
  `round_robin_bit16_offsets[i]`; this rank's master partition is `single_partition_of_fp32_groups[i]`.
- `BF16_Optimizer` (stage 1, bf16 with fp32 accumulation): `bf16_groups[i]` back to back in
  `fp32_groups_flat_partition[i]`.
- stage 0: `FP16_UnfusedOptimizer` keeps an fp32 copy `fp32_groups[i][j]` of every parameter `fp16_groups[i][j]`; in
  fp32 the optimizer steps the module's own parameters.

lp means the module's low-precision parameters, hp the high-precision master weights the optimizer steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import logger
from torch import Tensor

from ds_fira.binding import Binding
from ds_fira.comm import Channel, CutExchange
from ds_fira.groups import build_groups, group_defaults
from ds_fira.layout import digest, plan_groups, plan_hash
from ds_fira.lean import LeanCuts
from ds_fira.memory import ParamRecord
from ds_fira.optimizer import FiraAdam
from ds_fira.places import Piece
from ds_fira.settings import check_params, refuse_auto
from ds_fira.shard import MatrixShard, matrices_of
from ds_fira.zero_checkpoint import normalized, register_checkpoint
from ds_fira.zero_refuse import refuse_unsupported, refuse_unsupported_module


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """One of ZeRO's param groups: its flat master partition on this rank and what lies in the whole buffer."""

    hp_partition: Tensor
    lp_params: list[Tensor]
    offsets: list[int]  # of every lp parameter in the buffer
    partition_size: int

    def pieces(self, dp_rank: int) -> list[tuple[int, int, int, int]]:
        """What a rank's partition holds: (number of the lp parameter, offset in the partition, first element, end)."""
        begin, end = dp_rank * self.partition_size, (dp_rank + 1) * self.partition_size
        found = []
        for index, (param, offset) in enumerate(zip(self.lp_params, self.offsets, strict=True)):
            first, last = max(begin, offset), min(end, offset + param.numel())
            if first < last:
                found.append((index, first - begin, first - offset, last - offset))
        return found


def attach(engine: Any) -> None:
    """Tell the engine's FiraAdam what lies where, once the engine has built its optimizer wrapper.

    Raises:
        RuntimeError: ranks disagree about the layout, or the wrapper is one this package does not know.
    """
    optimizer: FiraAdam = engine.basic_optimizer
    optimizer.channel = Channel(engine.seq_data_parallel_group)
    names = {id(param): name for name, param in normalized(dict(engine.module.named_parameters())).items()}
    if engine.zero_optimization_stage() == 0:
        lp_groups, held = _attach_replicated(engine, optimizer, names), []
    else:
        lp_groups, held = _attach_sharded(engine, optimizer, names)
    optimizer.members = [[(names.get(id(param), ""), tuple(param.shape)) for param in params] for params in lp_groups]
    structure = [(group.get("rank"), group["proj_type"], group["formulation"]) for group in optimizer.param_groups]
    kinds = [
        (group["state_dtype"], *{str(param.dtype) for param in params})
        for group, params in zip(optimizer.param_groups, lp_groups, strict=True)
    ]
    where = (engine.zero_optimization_stage(), type(engine.optimizer).__name__, optimizer.channel.dp_size)
    optimizer.layout_digest = digest(where, optimizer.members, held, optimizer.layouts, structure, kinds)
    optimizer.inventory_of_module = [
        ParamRecord.of(names.get(id(param), ""), tuple(param.shape), group)
        for group, params in zip(optimizer.param_groups, lp_groups, strict=True)
        for param in params
    ]


def _attach_replicated(engine: Any, optimizer: FiraAdam, names: dict[int, str]) -> list[list[Tensor]]:
    """Stage 0: every rank steps every matrix; returns the module's parameters by param group."""
    lp_groups = getattr(engine.optimizer, "fp16_groups", None)
    if lp_groups is None:
        lp_groups = [list(group["params"]) for group in optimizer.param_groups]
    optimizer.replicate(optimizer.channel)
    for group, lp_params in zip(optimizer.param_groups, lp_groups, strict=True):
        for param, lp_param in zip(group["params"], lp_params, strict=True):
            optimizer.gradient_dtypes[param] = lp_param.dtype
            optimizer.pieces[param] = (Piece(names.get(id(lp_param), ""), 0, 0, param.numel()),)
    return lp_groups


def _attach_sharded(
    engine: Any, optimizer: FiraAdam, names: dict[int, str]
) -> tuple[list[list[Tensor]], list[list[list[tuple[int, int, int, int]]]]]:
    """Stages 1 and 2: plan every group with a rank, bind its flat partition.

    Returns:
        The module's parameters by param group, and by group and rank what lies in its partition (`FlatGroup.pieces`).
    """
    channel = optimizer.channel
    flat_groups = _flat_groups(engine.optimizer)
    projected = [pair for pair in zip(optimizer.param_groups, flat_groups, strict=True) if "rank" in pair[0]]
    buffers = [(_matrices(flat, names), flat.partition_size) for _, flat in projected]
    layouts = plan_groups(buffers, channel.dp_size, [group for group, _ in projected])
    channel.require_same(plan_hash(layouts))
    numbers = _numbers([matrix for matrices, _ in buffers for matrix in matrices], names.values())
    for (_, flat), layout in zip(projected, layouts, strict=True):
        exchange = CutExchange(layout, channel) if layout.base_cuts else None
        lean = LeanCuts(layout, channel, numbers) if layout.lean_cuts else None
        owned = (*layout.whole[channel.dp_rank], *layout.owned_cuts(channel.dp_rank))
        indices = tuple(numbers[matrix.name] for matrix in owned)
        optimizer.bind(flat.hp_partition, Binding(layout.whole[channel.dp_rank], indices, exchange, lean))
        optimizer.gradient_dtypes[flat.hp_partition] = flat.lp_params[0].dtype
    optimizer.layouts = layouts
    held = [[flat.pieces(dp_rank) for dp_rank in range(channel.dp_size)] for flat in flat_groups]
    for flat, by_rank in zip(flat_groups, held, strict=True):
        optimizer.pieces[flat.hp_partition] = tuple(
            Piece(names.get(id(flat.lp_params[index]), ""), *place) for index, *place in by_rank[channel.dp_rank]
        )
    return [flat.lp_params for flat in flat_groups], held


def _flat_groups(wrapper: Any) -> list[FlatGroup]:
    """The param groups of a ZeRO optimizer wrapper, in the optimizer's order."""
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        return [
            FlatGroup(hp_partition, list(params), list(offsets), int(size))
            for hp_partition, params, offsets, size in zip(
                wrapper.single_partition_of_fp32_groups,
                wrapper.round_robin_bit16_groups,
                wrapper.round_robin_bit16_offsets,
                wrapper.partition_size,
                strict=True,
            )
        ]
    if hasattr(wrapper, "fp32_groups_flat_partition"):
        groups = []
        for hp_partition, params in zip(wrapper.fp32_groups_flat_partition, wrapper.bf16_groups, strict=True):
            sizes = [param.numel() for param in params]
            offsets = [sum(sizes[:i]) for i in range(len(sizes))]
            groups.append(FlatGroup(hp_partition, list(params), offsets, hp_partition.numel()))
        return groups
    raise RuntimeError(
        f"FiraAdam: DeepSpeed wrapped the optimizer in {type(wrapper).__name__}, whose layout is not known; use ZeRO "
        "stage 0, 1 or 2 of a supported DeepSpeed version."
    )


def _matrices(flat: FlatGroup, names: dict[int, str]) -> list[MatrixShard]:
    return [
        matrix
        for param, offset in zip(flat.lp_params, flat.offsets, strict=True)
        for matrix in matrices_of(names.get(id(param), f"parameter at {offset}"), tuple(param.shape), offset)
    ]


def _numbers(matrices: list[MatrixShard], names: Iterable[str]) -> dict[str, int]:
    """A number for every projected matrix by name, in the module's order: the same on any number of ranks."""
    order = {name: position for position, name in enumerate(names)}
    in_order = sorted(matrices, key=lambda matrix: order.get(matrix.name.partition("[")[0], len(order)))
    return {matrix.name: number for number, matrix in enumerate(in_order)}


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on CPU: tens of seconds and a C++ compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def fira_of(engine_or_optimizer: Any) -> FiraAdam:
    """The FiraAdam inside a DeepSpeed engine or optimizer wrapper, or the one given.

    Raises:
        ValueError: there is none.
    """
    found = engine_or_optimizer
    for attribute in ("basic_optimizer", "optimizer"):
        if not isinstance(found, FiraAdam) and getattr(found, attribute, None) is not None:
            found = getattr(found, attribute)
    if not isinstance(found, FiraAdam):
        raise ValueError(
            f"FiraAdam: {type(engine_or_optimizer).__name__} does not train with FiraAdam; set optimizer.type to "
            "'FiraAdam' in its DeepSpeed config."
        )
    return found


def _uses_fira(engine: Any) -> bool:
    """Whether an engine trains with FiraAdam, from its JSON or from the optimizer it was given."""
    if engine.client_optimizer is None:
        return engine.optimizer_name() == FiraAdam.__name__
    return isinstance(engine.client_optimizer, FiraAdam)


def _checked_params(engine: Any) -> dict[str, Any]:
    return check_params(engine.optimizer_params() or {}, "FiraAdam in the DeepSpeed config")


def register() -> None:
    """Make `"type": "FiraAdam"` a DeepSpeed optimizer; called by `import ds_fira`, and again without effect.

    DeepSpeed looks a JSON type outside its own list up in `torch.optim`, gives it parameters without names, and wraps
    it without telling it what lies where. So the name goes to `torch.optim`, the class to ZeRO's tested optimizers,
    and three methods of the engine are extended: they stay as they are for every other optimizer.
    """
    torch.optim.FiraAdam = FiraAdam
    if FiraAdam in ZERO_SUPPORTED_OPTIMIZERS:
        return
    ZERO_SUPPORTED_OPTIMIZERS.append(FiraAdam)
    register_checkpoint()
    sanity_check = DeepSpeedEngine._do_sanity_check
    configure_basic = DeepSpeedEngine._configure_basic_optimizer
    configure = DeepSpeedEngine._configure_optimizer

    @functools.wraps(sanity_check)
    def _do_sanity_check(engine: Any) -> None:
        sanity_check(engine)
        if _uses_fira(engine):
            refuse_auto(engine._config._param_dict)
            refuse_unsupported(engine)
            if engine.client_optimizer is None:
                _checked_params(engine)

    @functools.wraps(configure_basic)
    def _configure_basic_optimizer(engine: Any, model_parameters: Any) -> Any:
        if engine.optimizer_name() != FiraAdam.__name__:
            return configure_basic(engine, model_parameters)
        refuse_unsupported_module(engine.module, engine.has_moe_layers)
        settings = _checked_params(engine)
        dp_size = dist.get_world_size(group=engine.seq_data_parallel_group)
        groups = build_groups(engine.module, model_parameters, settings, engine.zero_optimization_stage(), dp_size)
        if not any("rank" in group for group in groups):
            logger.warning(
                "FiraAdam: no rank is set, so nothing is projected: this is AdamW. Set optimizer.params.rank."
            )
        optimizer = FiraAdam(groups, **group_defaults(settings))
        optimizer.suspended = True
        return optimizer

    @functools.wraps(configure)
    def _configure_optimizer(engine: Any, client_optimizer: Any, model_parameters: Any) -> None:
        def suspend(optimizer: Any) -> Any:
            if isinstance(optimizer, FiraAdam):
                refuse_unsupported(engine)
                refuse_unsupported_module(engine.module, engine.has_moe_layers)
                # Some wrappers make a step with zero gradients as they are built; it must not decay the weights.
                optimizer.suspended = True
            return optimizer

        if callable(client_optimizer):
            make_optimizer = client_optimizer
            configure(engine, lambda params: suspend(make_optimizer(params)), model_parameters)
        else:
            configure(engine, suspend(client_optimizer), model_parameters)
        if isinstance(engine.basic_optimizer, FiraAdam):
            attach(engine)
            engine.basic_optimizer.suspended = False

    DeepSpeedEngine._do_sanity_check = _do_sanity_check
    DeepSpeedEngine._configure_basic_optimizer = _configure_basic_optimizer
    DeepSpeedEngine._configure_optimizer = _configure_optimizer
