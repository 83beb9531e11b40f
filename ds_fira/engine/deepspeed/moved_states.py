"""`engine.offload_states` and `reload_states`: low-rank states leave the GPU and come back, as Adam's do.

DeepSpeed has them for its FusedAdam at stage 3, whose two moments it moves, and for any optimizer at stages 1 and 2,
where it moves every tensor of a state and back to the GPU those too that were on the host before.

Written against DeepSpeed 0.18 and 0.19. What it relies on:

- `DeepSpeedZeroOptimizer_Stage3.offload_states` asserts that `optimizer` is of the class FusedAdam, moves its states by
  their names, and adds what it has moved to `offloaded_states`; `reload_states` calls `reload_adam_states`.
- `stage_1_and_2` calls `offload_optimizer_states` and `reload_optimizer_states`; the second returns the tensors on the
  host, which have to live until a copy that does not block has ended.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import FusedAdam
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ds_fira.engine.deepspeed.save_load.calls import bound, replaced
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.moving import move_states

STATES = OffloadStateTypeEnum.optim_states


def offload(
    theirs: Callable[..., None],
    optimizer: Optimizer,
    device: str,
    pin_memory: bool = False,
    non_blocking: bool = False,
) -> None:
    """`offload_optimizer_states`: all states but those of the host."""
    if not isinstance(optimizer, LowRankOptimizer):
        return theirs(optimizer, device, pin_memory=pin_memory, non_blocking=non_blocking)
    return _offload(optimizer, device, pin_memory, non_blocking)


def _offload(optimizer: LowRankOptimizer, device: str, pin_memory: bool, non_blocking: bool) -> None:
    def to_host(value: Tensor) -> Tensor:
        if not pin_memory or value.device.type == "cpu":
            return value.to(device, non_blocking=non_blocking)
        pinned = get_accelerator().pin_memory(torch.empty_like(value, device=device))
        return pinned.copy_(value, non_blocking=non_blocking)

    move_states(optimizer, to_host)


def reload(
    theirs: Callable[..., list[Tensor] | None], optimizer: Optimizer, device: str, non_blocking: bool = False
) -> list[Tensor] | None:
    """`reload_optimizer_states` and `reload_adam_states`: the same states back."""
    if not isinstance(optimizer, LowRankOptimizer):
        return theirs(optimizer, device, non_blocking=non_blocking)
    on_host = move_states(optimizer, lambda value: value.to(device, non_blocking=non_blocking))
    if non_blocking:
        get_accelerator().synchronize()  # stage 3 keeps nothing that is copied
    return on_host


def offload_stage_3(
    theirs: Callable[..., None], wrapper: DeepSpeedZeroOptimizer_Stage3, *args: object, **kwargs: object
) -> None:
    """`offload_states` of stage 3: weights and gradients as DeepSpeed does it, then the states."""
    optimizer, before = wrapper.optimizer, STATES in wrapper.offloaded_states
    if not isinstance(optimizer, LowRankOptimizer):
        return theirs(wrapper, *args, **kwargs)
    given = bound(theirs, wrapper, *args, **kwargs).arguments
    stateless = FusedAdam.__new__(FusedAdam)  # compiles nothing, and passes for the optimizer that DeepSpeed wants
    stateless.state = {}
    with replaced(wrapper, optimizer=stateless):
        theirs(wrapper, *args, **kwargs)
    if STATES in wrapper.offloaded_states and not before:
        _offload(optimizer, given["device"].value, given["pin_memory"], given["non_blocking"])
        get_accelerator().empty_cache()
    return None


def state_device(
    theirs: Callable[..., torch.device | None],
    wrapper: DeepSpeedZeroOptimizer_Stage3,
    param: Parameter,
    optim_state_key: str | None = None,
) -> torch.device | None:
    """`get_hp_param_device` of stage 3: where the states of a parameter are, whatever they are called."""
    optimizer = wrapper.optimizer
    if optim_state_key is None or not param.requires_grad or not isinstance(optimizer, LowRankOptimizer):
        return theirs(wrapper, param, optim_state_key)
    flat = wrapper.fp32_partitioned_groups_flat[wrapper.grad_position[wrapper.get_param_id(param)][0]]
    found = (value.device for key, value in optimizer.state[flat].items() if not optimizer.on_host(flat, key))
    return next(found, flat.device)  # a rank may have no part of any state in a flat tensor
