"""What a load writes into an engine beside optimizer states: its weights, frozen ones, buffers, the loss scale.

What it relies on, of DeepSpeed 0.17 to 0.19: `update_lp_params` and `_link_all_hp_params` of stages 1 and 2;
`_reassign_or_swap_out_partitioned_parameters` of a sub-group of stage 3, and `invalidate_secondary_tensor`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from ds_fira.checkpoint.named_state import SavedState
from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles, normalized
from ds_fira.engine.deepspeed.save_load.fill import FROZEN
from ds_fira.sharding.geometry import ParamSlice

# The path that was loaded, and the client state.
Loaded = tuple[str | None, dict[str, object] | None]
# What a dynamic loss scaler counts, in every wrapper that has one.
SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@contextmanager
def stepped_params(engine: DeepSpeedEngine) -> Iterator[None]:
    """Where stage 3 keeps the stepped tensors out of the param groups, put them there for a while."""
    wrapper = getattr(engine, "optimizer", None)
    if not hasattr(wrapper, "_set_fp32_optimizer_param_groups"):
        yield
        return
    wrapper._set_fp32_optimizer_param_groups()
    try:
        yield
    finally:
        wrapper._clear_fp32_optimizer_param_groups()


def write_back(engine: DeepSpeedEngine) -> None:
    """Give the module the weights of the master copies, as a step does; a collective call."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "update_lp_params"):  # stages 1 and 2
        wrapper.update_lp_params()
        wrapper._link_all_hp_params()
    elif hasattr(wrapper, "fp16_partitioned_groups_flat"):  # stage 3
        for index in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(index)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
        # ZeRO++'s second copy within a node, which a forward pass would take.
        wrapper.invalidate_secondary_tensor()
    elif hasattr(wrapper, "fp32_groups"):  # stage 0 in bf16 and fp16
        for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for param, master in zip(group, masters, strict=True):
                param.data.copy_(master.data)


def carry_loss_scale(wrapper: object, saved: Mapping[str, object]) -> None:
    """Go on with the loss scale, and with the steps counted towards the next change of it, if both runs have one."""
    source = saved.get("loss_scaler", saved)
    target = getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)
    if target is None or not saved.get("dynamic_loss_scale") or not getattr(wrapper, "dynamic_loss_scale", True):
        return
    for name in SCALE_FIELDS:
        value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
        if value is not None and hasattr(target, name):
            setattr(target, name, value)


def untrained_values(files: CheckpointFiles) -> dict[str, Tensor]:
    """Buffers and frozen weights by name, of the slice that the files are of."""
    if files.of_pipeline:
        return normalized(files.untrained_of_stages())
    models = [files.model(number) for number in range(len(files.models) if files.partitioned else 1)]
    found = {name: value for name, value in models[0]["module"].items() if isinstance(value, Tensor)}
    shapes = models[0].get("frozen_param_shapes") if files.partitioned else None
    for name, shape in (shapes or {}).items():
        whole = torch.cat([model[FROZEN][name].reshape(-1) for model in models])
        found[name] = whole[: shape.numel()].view(shape)
    return normalized(found)


def of_one_file(files: CheckpointFiles) -> dict[str, object]:
    """Attributes that let DeepSpeed, for a while, take the run's state from one file of the model's states.

    It would put together what is of other slices than its own.
    """
    path, saved = str(files.models[0]), int(files.model().get("mp_world_size") or 1)
    names = [path] * saved  # their number is checked
    return {"_get_all_ckpt_names": lambda *_: names, "mp_world_size": saved, "checkpoint_mp_rank": 0}


def load_layers(engine: DeepSpeedEngine, saved: SavedState, folder: Path) -> None:
    """Load the layers of a pipeline from their files, and let a checkpoint whose only weights they are have those.

    Args:
        engine: that trains one.
        saved: gets the weights of this rank's stage, those that the layers have now.
        folder: of the tag.
    """
    engine.module.load_state_dir(load_dir=str(folder), strict=True, checkpoint_engine=engine.checkpoint_engine)
    for param in engine.module.parameters():
        name, numel = engine.fira_holders.names[id(param)], param.numel()
        saved.weights[name] = [(ParamSlice(name, 0, 0, numel), param.detach().clone().reshape(-1))]


def load_untrained(
    engine: DeepSpeedEngine,
    values: Mapping[str, Tensor],
    wanted: Collection[str],
    names: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """Set the buffers and those weights that are wanted; what is trained comes from the masters. A collective call.

    Args:
        engine: that loads.
        values: by name.
        wanted: the names of weights.
        names: of parameters by their `id`, where values have other names than the module gives.
    """
    module: nn.Module = engine.module
    kept = normalized(module.state_dict(keep_vars=True)).keys()
    for name, buffer in normalized(dict(module.named_buffers())).items():
        if name in kept and name in values:
            buffer.data.copy_(values[name])
    for own, param in normalized(dict(module.named_parameters())).items():
        name = names.get(id(param), own)
        if name in wanted and name in values:
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                if param.numel() == values[name].numel():
                    param.data.copy_(values[name])
