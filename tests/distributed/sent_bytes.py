"""What an optimizer hands to other ranks, counted where torch sends it, from outside of the package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def counted(optimizer: torch.optim.Optimizer, calls: list[int] | None = None) -> Iterator[list[int]]:
    """By step the bytes that this rank hands to other ranks inside the optimizer, counted where torch sends them.

    Args:
        optimizer: whose steps are counted.
        calls: of whose last number the collectives are counted; None not to count them.
    """
    found: list[int] = []
    inside = []
    own = torch.distributed.get_rank()
    all_to_all, all_reduce, broadcast = (
        getattr(torch.distributed, name) for name in ("all_to_all_single", "all_reduce", "broadcast")
    )

    def count(numel: int, tensor: Tensor) -> None:
        if inside:
            found[-1] += numel * tensor.element_size()
            if calls is not None:
                calls[-1] += 1

    def counting_all_to_all(received: Tensor, sent: Tensor, *sizes: Any, **kwargs: Any) -> Any:
        count(sent.numel(), sent)
        return all_to_all(received, sent, *sizes, **kwargs)

    def counting_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        count(tensor.numel(), tensor)
        return all_reduce(tensor, *args, **kwargs)

    def counting_broadcast(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        count(tensor.numel() * (kwargs.get("group_src") == torch.distributed.get_rank(kwargs.get("group"))), tensor)
        return broadcast(tensor, *args, **kwargs)

    hooks = [optimizer.register_step_pre_hook(lambda *_: inside.append(own))]
    hooks.append(optimizer.register_step_post_hook(lambda *_: inside.clear()))
    torch.distributed.all_to_all_single, torch.distributed.all_reduce = counting_all_to_all, counting_all_reduce
    torch.distributed.broadcast = counting_broadcast
    try:
        yield found
    finally:
        torch.distributed.all_to_all_single, torch.distributed.all_reduce = all_to_all, all_reduce
        torch.distributed.broadcast = broadcast
        for hook in hooks:
            hook.remove()
