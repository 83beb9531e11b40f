"""Loading a state dict: every state in the dtype it was saved in, all the way, and torch's hooks around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_fira import FiraAdam
from tests.reference.gradients import make_gradients, make_weight

PROJECTED, PLAIN = (96, 128), (64, 128)


class Largest(TorchDispatchMode):
    """The most elements of one tensor of each dtype that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type != "meta":
            self.elements[result.dtype] = max(self.elements.get(result.dtype, 0), result.numel())
        return result


def make(state_dtype: str) -> tuple[FiraAdam, list[nn.Parameter]]:
    """An optimizer of a matrix and of one that is not projected, after a step."""
    params = [nn.Parameter(make_weight(shape)) for shape in (PROJECTED, PLAIN)]
    groups = [{"params": params[:1], "rank": 48}, {"params": params[1:], "rank": None}]
    optimizer = FiraAdam(groups, lr=0.01, state_dtype=state_dtype)
    for param in params:
        (param.grad,) = make_gradients(tuple(param.shape), 1)
    optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_compressed_states_are_never_as_large_as_the_weights(state_dtype: str) -> None:
    """Torch's own loading makes them float32 on the way: 8-bit states of 7B parameters would take 28 GB more."""
    if state_dtype == "int8":
        pytest.importorskip("bitsandbytes")
    saved, (optimizer, params) = make(state_dtype)[0].state_dict(), make(state_dtype)
    with Largest() as largest:
        optimizer.load_state_dict(saved)
    assert largest.elements[torch.int8 if state_dtype == "int8" else torch.bfloat16] >= 64 * 128
    # Scales of blocks, and the limiter's norm.
    assert largest.elements.get(torch.float32, 0) <= 64 * 128 // 100
    for number, param in enumerate(params):
        for key, value in saved["state"][number].items():
            assert optimizer.state[param][key].dtype == value.dtype
            assert torch.equal(optimizer.state[param][key], value)
            assert optimizer.state[param][key].data_ptr() != value.data_ptr()


def test_hooks_see_what_is_loaded() -> None:
    saved, (optimizer, (param, _)), seen = make("bfloat16")[0].state_dict(), make("bfloat16"), []
    optimizer.register_load_state_dict_pre_hook(lambda _, given: seen.append(given["state"][0]["basis"].dtype))
    optimizer.register_load_state_dict_post_hook(lambda own: seen.append(own.state[param]["basis"].dtype))
    optimizer.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    assert seen == [torch.bfloat16] * 4
    assert saved["state"][0].keys() == optimizer.state[param].keys()
