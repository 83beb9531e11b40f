"""DeepSpeed's `safe_get_*` and `safe_set_*` of optimizer states, for an optimizer with low-rank states.

Weights and gradients lie where DeepSpeed has them, and its functions read and set them as with torch's AdamW. So do the
moments of a parameter that is not projected; but DeepSpeed looks for them before every group has been stepped, and only
in the parameter's own dtype. A projected parameter has no moment of its own shape: every rank says so, where
DeepSpeed's functions would fail on some ranks and leave the others waiting.

Written against DeepSpeed 0.17 to 0.19. What it relies on:

- Stages 1 and 2, `BF16_Optimizer`: `mixed_precision_linkage` gives every parameter the functions `get_full_hp_param`
  and `set_full_hp_param` as methods, and the ranks it is partitioned over as `_dp_group`.
- Stage 3: the methods of these names, `get_local_fp32_param` and `set_local_hp_param`, of the wrapper. `grad_position`
  says where a parameter's part is in which flat group, padding included; `_fp32_state_allgather` puts parts together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from ds_fira.core import quantization
from ds_fira.core.selection import first_element, numel_of
from ds_fira.core.state import stored_moment
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.param_place import holders, name_of

# Of every trained parameter at stages 1 and 2 a reference to the optimizer that steps it. Not on the parameter, which
# may be pickled with what stands there.
_OPTIMIZERS: MutableMapping[Tensor, weakref.ref[LowRankOptimizer]] = WeakTensorKeyDictionary()


def link_params(engine: DeepSpeedEngine) -> None:
    """Note the optimizer of the parameters at stages 1 and 2; at stage 3 they know their wrapper."""
    if engine.zero_optimization_stage() in (1, 2):
        own = weakref.ref(engine.basic_optimizer)
        _OPTIMIZERS.update((param, own) for param in engine.module.parameters() if param.requires_grad)


def _optimizer_of(param: Parameter) -> LowRankOptimizer | None:
    own = _OPTIMIZERS.get(param)
    return None if own is None else own()


def get_full(get: Callable[..., Tensor], param: Parameter, optim_state_key: str | None = None) -> Tensor:
    """`get_full_hp_param` of a parameter: its moments, put together from all ranks, float32."""
    optimizer = _optimizer_of(param)
    if optimizer is None or optim_state_key is None:
        return get(param, optim_state_key)
    name = _unprojected(optimizer, param, optim_state_key)
    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    for tensor, part in holders(optimizer, name):
        stored = _moment(optimizer, tensor, name, optim_state_key, allocate=False)
        if stored:
            values = quantization.elements(stored, part.offset, part.offset + part.stop - part.start)
            first = part.start - first_element(param)
            whole[first : first + values.numel()].copy_(values)
    dist.all_reduce(whole, group=param._dp_group)
    return whole.view_as(param)


def set_full(put: Callable[..., None], param: Parameter, value: Tensor, optim_state_key: str | None = None) -> None:
    """`set_full_hp_param` of a parameter: this rank's part of its moments."""
    optimizer = _optimizer_of(param)
    if optimizer is None or optim_state_key is None:
        return put(param, value, optim_state_key)
    return _set_whole(optimizer, param, value, optim_state_key)


def get_full_sliced(
    get: Callable[..., Tensor | None],
    wrapper: DeepSpeedZeroOptimizer_Stage3,
    param: Parameter,
    optim_state_key: str | None = None,
) -> Tensor | None:
    """`get_full_hp_param` of stage 3."""
    local = _local(wrapper, param, optim_state_key)
    return get(wrapper, param, optim_state_key) if local is None else wrapper._fp32_state_allgather(param, local)


def set_full_sliced(
    put: Callable[..., None],
    wrapper: DeepSpeedZeroOptimizer_Stage3,
    value: Tensor,
    param: Parameter,
    optim_state_key: str | None = None,
) -> None:
    """`set_full_hp_param` of stage 3."""
    if not _asks_ours(wrapper, param, optim_state_key):
        return put(wrapper, value, param, optim_state_key)
    return _set_whole(wrapper.optimizer, param, value, optim_state_key)


def get_local(
    get: Callable[..., Tensor | None],
    wrapper: DeepSpeedZeroOptimizer_Stage3,
    param: Parameter,
    optim_state_key: str | None = None,
) -> Tensor | None:
    """`get_local_fp32_param` of stage 3: this rank's part, padding included."""
    local = _local(wrapper, param, optim_state_key)
    return get(wrapper, param, optim_state_key) if local is None else local


def set_local(
    put: Callable[..., None],
    wrapper: DeepSpeedZeroOptimizer_Stage3,
    value: Tensor,
    param: Parameter,
    optim_state_key: str | None = None,
) -> None:
    """`set_local_hp_param` of stage 3."""
    if not _asks_ours(wrapper, param, optim_state_key):
        return put(wrapper, value, param, optim_state_key)
    name = _unprojected(wrapper.optimizer, param, optim_state_key)
    group, offset, numel = wrapper.grad_position[wrapper.get_param_id(param)]
    if value.numel() != numel:
        raise ValueError(
            f"safe_set_local_optimizer_state: {value.numel()} values for {name}, of which this rank holds {numel}; "
            "give a tensor as safe_get_local_optimizer_state returns it."
        )
    tensor = wrapper.fp32_partitioned_groups_flat[group]
    _assign(_moment(wrapper.optimizer, tensor, name, optim_state_key, allocate=True), offset, value.reshape(-1))
    return None


def _asks_ours(wrapper: DeepSpeedZeroOptimizer_Stage3, param: Parameter, key: str | None = None) -> bool:
    return isinstance(wrapper.optimizer, LowRankOptimizer) and key is not None and param.requires_grad


def _local(wrapper: DeepSpeedZeroOptimizer_Stage3, param: Parameter, key: str | None = None) -> Tensor | None:
    """This rank's part of a moment at stage 3, padding included; None where DeepSpeed itself answers."""
    if not _asks_ours(wrapper, param, key):
        return None
    optimizer, (group, offset, numel) = wrapper.optimizer, wrapper.grad_position[wrapper.get_param_id(param)]
    name, tensor = _unprojected(optimizer, param, key), wrapper.fp32_partitioned_groups_flat[group]
    stored = _moment(optimizer, tensor, name, key, allocate=False)
    if not stored:
        return torch.zeros(numel, dtype=torch.float32, device=param.device)
    return quantization.elements(stored, offset, offset + numel).to(param.device)


def _set_whole(optimizer: LowRankOptimizer, param: Parameter, value: Tensor, key: str) -> None:
    """Set this rank's part of a moment, of which `value` is the whole."""
    name = _unprojected(optimizer, param, key)
    if value.numel() != numel_of(param):
        shape = tuple(getattr(param, "ds_shape", param.shape))
        raise ValueError(
            f"safe_set_full_optimizer_state: {value.numel()} values for {name} of shape {shape}; give one for each of "
            "its elements."
        )
    for tensor, part in holders(optimizer, name):
        stored = _moment(optimizer, tensor, name, key, allocate=True)
        first = part.start - first_element(param)
        _assign(stored, part.offset, value.reshape(-1)[first : first + part.stop - part.start])


def _unprojected(optimizer: LowRankOptimizer, param: Parameter, key: str) -> str:
    """The name of a parameter that has moments of its own shape under a key; else a ValueError, on every rank."""
    name = name_of(optimizer, param)
    record = next((record for record in optimizer.inventory if record.name == name), None)
    label = optimizer.algorithm.name
    if record is None:
        raise ValueError(f"{label}: a parameter of shape {tuple(param.shape)} is not trained, and has no {key}.")
    if record.rank is not None:
        raise ValueError(
            f"{label}: {name} is projected, and has no {key!r} of its own shape; "
            "ds_fira.low_rank_state(engine, param) gathers its basis and the moments in it on every rank, and "
            "ds_fira.set_low_rank_state sets them."
        )
    if key not in optimizer.algorithm.states:
        states = " and ".join(map(repr, optimizer.algorithm.states))
        raise ValueError(f"{label}: {name} has no state {key!r}; ask for {states}.")
    return name


def _moment(
    optimizer: LowRankOptimizer, tensor: Tensor, name: str, key: str, *, allocate: bool
) -> quantization.Stored | None:
    """A moment of a stepped tensor; one without a state gets it if asked."""
    listed = zip(optimizer.param_groups, optimizer.members, strict=True)
    group = next(group for group, members in listed if any(name == own for own, _ in members))
    state = optimizer._state_of(tensor, group) if allocate else optimizer.state.get(tensor)
    return stored_moment(state, key) if state else None


def _assign(stored: quantization.Stored, offset: int, values: Tensor) -> None:
    """Set some elements of a stored moment; what is coded in blocks is coded anew in those that they lie in."""
    block, total = quantization.BLOCK, stored[quantization.VALUES].numel()
    stop = offset + values.numel()
    part = quantization.part(stored, offset - offset % block, min(-(-stop // block) * block, total))
    whole, first = quantization.read(part).clone(), offset % block
    whole[first : first + values.numel()].copy_(values)
    quantization.write_(part, whole, seed=None)


# By the names of the methods that they wrap.
OF_STAGE_3 = {
    "get_full_hp_param": get_full_sliced,
    "set_full_hp_param": set_full_sliced,
    "get_local_fp32_param": get_local,
    "set_local_hp_param": set_local,
}
