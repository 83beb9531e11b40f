"""The states of an optimizer on another device between two steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_fira.optim.stateful import Resumable


def move_states(optimizer: Resumable, move: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Put another tensor in the place of every state that lies where its parameter does, and of all made from it.

    What the host reads in every step stays. Where a step would still work with one of the tensors that have been
    replaced, it finds the new one; nothing of this optimizer keeps their memory.

    Args:
        optimizer: between two steps.
        move: gives the tensor that takes another one's place.

    Returns:
        The tensors that have been replaced.
    """
    before = []
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and not optimizer.on_host(param, key):
                before.append(value)
                state[key] = move(value)
    optimizer.forget_state_tensors(move)
    return before
