"""Jobs of ranks that step in the backward pass, as replicas of each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import ds_fira

ROWS, SETTINGS = 12, {"rank": 2, "lr": 0.02, "update_proj_gap": 3, "weight_decay": 0.1}
# Smaller than the model's 1.6 KB: five buckets.
BUCKET_BYTES = 512


class Branches(nn.Module):
    """A net in which `odd` gets a gradient from odd ranks alone, and `never` from none."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.odd, self.never, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("shift", torch.full((8,), float(seed)))

    def forward(self, rows: Tensor, odd: bool) -> Tensor:
        hidden = self.second(torch.tanh(self.first(rows)))
        return self.last(hidden + self.odd(hidden) if odd else hidden).square().mean()


def rows(step: int) -> Tensor:
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(step))


def train(steps: int, saved: int | None = None, **how: Any) -> dict[str, Any]:
    """Train on this rank's share; begin with other weights on every rank, which are to be rank 0's.

    Args:
        steps: to make.
        saved: the step after which state and weights go through a state dict into a new model and optimizer.
        how: `step_in_backward` is given.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    model, optimizer = _start(rank, how)
    for step in range(steps):
        if step == saved:
            before = model, optimizer
            model, optimizer = _start(100 + rank, how)
            model.load_state_dict(before[0].state_dict())
            optimizer.load_state_dict(before[1].state_dict())
        loss = model(rows(step).chunk(size)[rank], rank % 2 == 1)
        loss.backward()
        optimizer.step()
        assert all(param.grad is None for param in model.parameters())
    return {
        "weights": {name: param.detach().clone() for name, param in model.state_dict().items()},
        "metrics": ds_fira.metrics(optimizer),
    }


def _start(seed: int, how: dict[str, Any]) -> tuple[nn.Module, ds_fira.FiraAdam]:
    model = Branches(seed)
    optimizer = ds_fira.FiraAdam(model, **SETTINGS)
    ds_fira.step_in_backward(model, optimizer, process_group=dist.group.WORLD, bucket_bytes=BUCKET_BYTES, **how)
    return model, optimizer


def reference(steps: int, size: int) -> dict[str, Tensor]:
    """One process with the mean of what the ranks' gradients are."""
    model = Branches(0)
    optimizer = ds_fira.FiraAdam(model, **SETTINGS)
    for step in range(steps):
        for rank, share in enumerate(rows(step).chunk(size)):
            (model(share, rank % 2 == 1) / size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().clone() for name, param in model.state_dict().items()}


def wrapped() -> str:
    """The sentence for a model in DistributedDataParallel."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
    optimizer = ds_fira.FiraAdam(model, rank=2)
    try:
        ds_fira.step_in_backward(model, optimizer)
    except ValueError as error:
        return str(error)
    return ""
