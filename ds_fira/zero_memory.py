"""What a live DeepSpeed engine holds, by category: reads DeepSpeed's private attributes, like `ds_fira.zero`.

Written against DeepSpeed 0.19.8. Beside what `ds_fira.zero` relies on:

- `DeepSpeedZeroOptimizer.averaged_gradients`: by group, the gradients of this rank's partition after a backward pass;
  with fp32 accumulation a parameter's `grad_accum`.
- its `ipg_buckets`, `temp_grad_buffer_for_*_offload` and `param_buffer_of_bit16_for_cpu_offload_groups`: its buffers.
- `BF16_Optimizer.fp32_groups_gradients_flat`: gradients of the whole model.
- `reduce_gradients` of ZeRO-1 is called at the end of the last backward pass, before any gradient is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

CATEGORIES = ("parameters", "master_weights", "optimizer_states", "gradients", "buffers")


def engine_bytes(engine: Any) -> dict[str, int]:
    """Bytes that an engine holds now, by `CATEGORIES`; a storage counts once, in the first category that has it."""
    basic, wrapper = engine.basic_optimizer, engine.optimizer
    stepped = list(_tensors([group["params"] for group in basic.param_groups]))
    parameters = list(engine.module.parameters())
    found = {
        "parameters": [parameters, getattr(wrapper, "bit16_groups_flat", ()), getattr(wrapper, "bf16_groups_flat", ())],
        "master_weights": stepped,
        "optimizer_states": [list(state.values()) for state in basic.state.values()],
        "gradients": [
            [param.grad for param in (*parameters, *stepped)],
            [getattr(param, "grad_accum", None) for param in parameters],
            list(getattr(wrapper, "averaged_gradients", {}).values()),
            getattr(wrapper, "fp32_groups_gradients_flat", ()),
        ],
        "buffers": [
            [bucket.buffer for bucket in getattr(wrapper, "ipg_buckets", {}).values()],
            getattr(wrapper, "temp_grad_buffer_for_cpu_offload", None),
            getattr(wrapper, "temp_grad_buffer_for_gpu_offload", None),
            getattr(wrapper, "param_buffer_of_bit16_for_cpu_offload_groups", ()),
        ],
    }
    seen: set[int] = set()
    result = {}
    for category in CATEGORIES:
        result[category] = 0
        for tensor in _tensors(found[category]):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen and storage.nbytes():
                seen.add(storage.data_ptr())
                result[category] += storage.nbytes()
    return result


def backward_bytes(engine: Any, backward: Callable[[], object]) -> dict[str, int]:
    """Run a backward pass and give the most that the engine held of every category: at its end, or as ZeRO-1 begins to
    reduce, while it still has the gradients of the whole model.

    Args:
        engine: a DeepSpeed engine.
        backward: makes the backward pass, `engine.backward` included, and no step.
    """
    looks: list[dict[str, int]] = []
    wrapper = engine.optimizer
    reduce_gradients = getattr(wrapper, "reduce_gradients", None)
    if reduce_gradients is None:
        backward()
    else:

        def watched(*args: Any, **kwargs: Any) -> Any:
            looks.append(engine_bytes(engine))
            return reduce_gradients(*args, **kwargs)

        wrapper.reduce_gradients = watched
        try:
            backward()
        finally:
            del wrapper.reduce_gradients
    looks.append(engine_bytes(engine))
    return {category: max(look[category] for look in looks) for category in CATEGORIES}


def _tensors(nested: Any) -> Iterator[Tensor]:
    """The tensors in lists of lists; None and numbers are passed over."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Iterable) and not isinstance(nested, str | torch.Size):
        for item in nested:
            yield from _tensors(item)
