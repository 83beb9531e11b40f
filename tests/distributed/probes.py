"""What tests read from a live engine: its stepped tensors, its states, where its parameters lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_fira.optim.registry import fira_of


def stepped_tensors(engine: Any) -> list[Tensor]:
    """What the engine's optimizer steps on this rank: parameters, or under ZeRO flat partitions."""
    # At stage 3 the optimizer's own groups are empty between two steps.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if flat is not None:
        return list(flat)
    return [param for group in fira_of(engine).param_groups for param in group["params"]]


def states_of(engine: Any) -> list[dict[str, Tensor]]:
    """The states of `stepped_tensors`, in their order."""
    state = fira_of(engine).state
    return [state[param] for param in stepped_tensors(engine)]


def stepped_and_states(engine: Any) -> list[Tensor]:
    """`stepped_tensors`, then all of their states; not copied."""
    tensors = [value for state in states_of(engine) for value in state.values()]
    return [tensor.detach() for tensor in (*stepped_tensors(engine), *tensors)]


def count_decompositions() -> Callable[[], int]:
    """Count this rank's calls of torch.linalg.svd from here on; the function returned ends it and gives the count."""
    calls, original = [], torch.linalg.svd

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    def end() -> int:
        torch.linalg.svd = original
        return len(calls)

    torch.linalg.svd = counted
    return end


def describe_groups(engine: Any) -> list[dict[str, Any]]:
    """By param group: its settings, and (name, shape, offset) of its parameters in ZeRO's buffer, by their addresses.

    Read from where the module's parameters really are, not from ZeRO's books, which ds_fira reads.
    """
    names = {id(param): name for name, param in engine.module.named_parameters()}
    wrapper = engine.optimizer
    flats = getattr(wrapper, "bit16_groups_flat", None) or getattr(wrapper, "bf16_groups_flat", None)
    lp_groups = getattr(wrapper, "bit16_groups", None) or getattr(wrapper, "bf16_groups", None)
    result = []
    for i, group in enumerate(fira_of(engine).param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        members = []
        if flats is not None:
            base, size = flats[i].data_ptr(), flats[i].element_size()
            members = [(names[id(p)], tuple(p.shape), (p.data_ptr() - base) // size) for p in lp_groups[i]]
        result.append({"settings": settings, "members": members})
    return result
