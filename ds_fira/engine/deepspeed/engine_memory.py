"""What a live DeepSpeed engine holds, by purpose: reads DeepSpeed's private attributes.

Written against DeepSpeed 0.19.8. Beside what `ds_fira.engine.deepspeed.flat_groups` relies on:

- `DeepSpeedZeroOptimizer.averaged_gradients`: by group, the gradients of this rank's partition after a backward pass;
  with fp32 accumulation a parameter's `grad_accum`; under offload also `accumulated_grads_in_cpu`.
- its `ipg_buckets`, `temp_grad_buffer_for_*_offload` and `param_buffer_of_bit16_for_cpu_offload_groups`: its buffers.
- `BF16_Optimizer.fp32_groups_gradients_flat`: gradients of the whole model.
- `DeepSpeedZeroOptimizer_Stage3`: `ds_tensor` of a parameter is this rank's slice, in `lp_param_buffer` or, offloaded,
  in `param_groups_fp16_flat_cpu_memory`; `fp32_partitioned_groups_flat` are the master weights (in fp32 the slices
  themselves); `grad_partitions_flat_buffer` the gradients of the slices, on the host under offload.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

CATEGORIES = ("parameters", "master_weights", "optimizer_states", "gradients", "buffers")


class Engine(Protocol):
    """What is read of a DeepSpeed engine; `optimizer` is a wrapper, or at stage 0 in fp32 the optimizer itself."""

    module: nn.Module
    optimizer: object
    basic_optimizer: torch.optim.Optimizer


def is_offloaded(engine: Engine) -> bool:
    """Whether the optimizer's part of the engine works on host memory."""
    return any(getattr(engine.optimizer, name, False) for name in ("cpu_offload", "offload_optimizer"))


def held_tensors(engine: Engine) -> dict[str, list[Tensor]]:
    """Tensors by purpose at this moment; a tensor may share its storage with one of an earlier purpose.

    Args:
        engine: a DeepSpeed engine at any ZeRO stage.

    Returns:
        `parameters` of the module; `master_weights` that the optimizer steps; `optimizer_states`; `gradients`, and
        `host_gradients`, those kept on the host under offload; `buffers` that gradients pass through,
        `host_gradient_buffers` and `host_parameter_buffers`.
    """
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    stepped = getattr(wrapper, "fp32_partitioned_groups_flat", None)
    if stepped is None:
        stepped = [param for group in optimizer.param_groups for param in group["params"]]
    parameters = list(engine.module.parameters())

    def of(*names: str) -> list[object]:
        return [getattr(wrapper, name, None) for name in names]

    gradients = [
        [[param.grad, getattr(param, "grad_accum", None)] for param in parameters],
        of("averaged_gradients", "all_grad_tensors", "fp32_groups_gradients_flat"),
    ]
    host_gradients = of("accumulated_grads_in_cpu")
    kept = [[param.grad for param in stepped], of("grad_partitions_flat_buffer")]
    (host_gradients if is_offloaded(engine) else gradients).append(kept)
    nested = {
        "parameters": [
            [[param, getattr(param, "ds_tensor", None)] for param in parameters],
            of("bit16_groups_flat", "bf16_groups_flat", "lp_param_buffer", "param_groups_fp16_flat_cpu_memory"),
        ],
        "master_weights": stepped,
        "optimizer_states": [dict(state) for state in optimizer.state.values()],
        "gradients": gradients,
        "host_gradients": host_gradients,
        "buffers": [
            [bucket.buffer for bucket in getattr(wrapper, "ipg_buckets", {}).values()],
            of("temp_grad_buffer_for_gpu_offload", "extra_large_param_to_reduce"),
        ],
        "host_gradient_buffers": of("temp_grad_buffer_for_cpu_offload"),
        "host_parameter_buffers": of("param_buffer_of_bit16_for_cpu_offload_groups"),
    }
    return {name: list(_tensors(tensors)) for name, tensors in nested.items()}


def engine_bytes(engine: Engine) -> dict[str, int]:
    """Bytes that an engine holds now, on device and host, by `CATEGORIES`.

    A storage counts once, in the first category that has it.
    """
    found = held_tensors(engine)
    found["gradients"] += found["host_gradients"]
    found["buffers"] += found["host_gradient_buffers"] + found["host_parameter_buffers"]
    seen: set[int] = set()
    result = dict.fromkeys(CATEGORIES, 0)
    for category in CATEGORIES:
        for tensor in found[category]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen and storage.nbytes():
                seen.add(storage.data_ptr())
                result[category] += storage.nbytes()
    return result


def _tensors(nested: object) -> Iterator[Tensor]:
    """The tensors in nested lists and dictionaries; None and numbers are passed over."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        yield from _tensors(list(nested.values()))
    elif isinstance(nested, Iterable) and not isinstance(nested, str | torch.Size):
        for item in nested:
            yield from _tensors(item)
