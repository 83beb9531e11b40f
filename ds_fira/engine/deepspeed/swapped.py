"""Optimizer offload to NVMe at stage 3: what DeepSpeed's swapper writes to files, and how all else reads it there.

Master weights, gradients and the moments of what is not projected lie in files between two steps, as with Adam.
Low-rank states, which the swapper would bring back in the shape of the weights, stay in the host's memory. A save, a
load and `safe_get_*` map the files instead of reading them into memory, so they need no more of it than a step.

Written against DeepSpeed 0.19. What it relies on:

- `optimizer_swapper` of a stage-3 wrapper, an `OptimizerSwapper`: `swap_params_info` has a record of every master
  partition, with its size and, first the partition itself, the tensors that are swapped, each with its path. Between
  two steps all are swapped out: without elements, or, of `PipelinedOptimizerSwapper`, in a buffer that is free for
  others. A file holds the elements and a filling up to `_io_aligned_numel`.
- `_get_state_tensors` finds the states of a partition to swap, `_update_param_state_info` takes them into the record,
  `purge_state` out of it. `_swap_out_gradients` is called for every partition's gradients; pieces that are too small
  stay in memory.
- What is swapped in is read straight to where it belongs, past the operating system's cache: most disks write so only
  to addresses that are multiples of their blocks. Elsewhere the read fails, and the swapper does not hear of it: Adam
  steps with what was in memory (tried: a gradient 156 bytes behind such an address, ext4).
- `swap_optimizer` of a wrapper and `zero_nvme_offload_optimizer` of an engine say that there is a swapper.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper, SwapTensorContext
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from ds_fira.engine.deepspeed.save_load.calls import bound, replaced
from ds_fira.optim.base import LowRankOptimizer

T = TypeVar("T")
# Bytes of a block of any disk.
BLOCK = 4096


def states_to_swap(find: Callable[..., list[Tensor]], swapper: OptimizerSwapper, partition: Tensor) -> list[Tensor]:
    """`_get_state_tensors`: of a partition that is not projected the states with an element for each of its own."""
    found, optimizer = find(swapper, partition), swapper.optimizer
    if not isinstance(optimizer, LowRankOptimizer):
        return found
    if partition in optimizer.attachment.matrices:
        return []
    shape = (_numel(swapper, partition),)
    return [state for state in found if state.shape == shape and state.dtype == partition.dtype]


def swap_aligned_gradients(
    swap_out: Callable[..., None], swapper: OptimizerSwapper, *args: object, **kwargs: object
) -> None:
    """`_swap_out_gradients`: the elements before the first whole block of a gradient's place stay in memory."""
    if not isinstance(swapper.optimizer, LowRankOptimizer):
        return swap_out(swapper, *args, **kwargs)
    call = bound(swap_out, swapper, *args, **kwargs)
    offsets, gradients = call.arguments["gradient_offsets"], call.arguments["gradient_tensors"]
    unit, pieces = BLOCK // swapper.swap_element_size, list[tuple[int, Tensor]]()
    for offset, gradient in zip(offsets, gradients, strict=True):
        head = min(-offset % unit, gradient.numel())
        pieces += [(offset, gradient[:head])] if head else []
        pieces += [(offset + head, gradient[head:])] if head < gradient.numel() else []
    call.arguments["gradient_offsets"] = [offset for offset, _ in pieces]
    call.arguments["gradient_tensors"] = [gradient for _, gradient in pieces]
    return swap_out(*call.args, **call.kwargs)


def call_mapped(method: Callable[..., T], owner: object, *args: object, **kwargs: object) -> T:
    """A method of an engine or a stage-3 wrapper that reads or sets what may be swapped out."""
    wrapper = owner.optimizer if isinstance(owner, DeepSpeedEngine) else owner
    if not getattr(wrapper, "swap_optimizer", False) or not isinstance(wrapper.optimizer, LowRankOptimizer):
        return method(owner, *args, **kwargs)
    unswapped = {"zero_nvme_offload_optimizer": lambda: False} if owner is not wrapper else {}
    with mapped(wrapper), replaced(owner, **unswapped):
        return method(owner, *args, **kwargs)


@contextlib.contextmanager
def mapped(wrapper: DeepSpeedZeroOptimizer_Stage3) -> Iterator[None]:
    """For a while what is swapped out is there, as memory that is the files; afterwards the files hold what it is then.

    Args:
        wrapper: of an engine that swaps, between two steps.
    """
    swapper: OptimizerSwapper = wrapper.optimizer_swapper
    for info in swapper.swap_params_info.values():
        for tensor in info.tensors:  # with elements or without, in no memory that counts
            tensor.compute_tensor.data = _in_file(swapper, tensor, info.numel())
    try:
        with replaced(wrapper, swap_optimizer=False):
            yield
    finally:
        _release(swapper, wrapper.fp32_partitioned_groups_flat)


def _release(swapper: OptimizerSwapper, partitions: Sequence[Tensor]) -> None:
    """Put states that are new, of a load, into files, and give back all memory of what is in files."""
    before = {id(t.compute_tensor) for info in swapper.swap_params_info.values() for t in info.tensors}
    swapper.purge_state()
    for partition in partitions:
        info = swapper.swap_params_info.get(OptimizerSwapper.parameter_id(partition))
        if info is None:  # too small to be swapped
            continue
        swapper._update_param_state_info(info, partition)
        for tensor in info.tensors:
            if id(tensor.compute_tensor) not in before:
                _in_file(swapper, tensor, info.numel()).copy_(tensor.compute_tensor)
        info.release_memory()


def _in_file(swapper: OptimizerSwapper, tensor: SwapTensorContext, numel: int) -> Tensor:
    """The elements of a tensor where they are in its file, which is made or lengthened to what the swapper reads."""
    size = swapper._io_aligned_numel(numel)
    return torch.from_file(tensor.swap_path, shared=True, size=size, dtype=swapper.dtype)[:numel]


def _numel(swapper: OptimizerSwapper, partition: Tensor) -> int:
    info = swapper.swap_params_info.get(OptimizerSwapper.parameter_id(partition))
    return partition.numel() if info is None else info.numel()
