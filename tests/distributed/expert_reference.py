"""What one process makes of the gradients of ranks that train experts, and what the ranks' optimizers were given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ds_fira
from tests.distributed.expert_jobs import STEPS


def combined(runs: list[dict[str, Any]], step: int, clip: float, stage: int) -> dict[str, Tensor]:
    """The gradient of a step as DeepSpeed makes it: sums over the ranks that hold a parameter, over all ranks."""
    sums: dict[str, Tensor] = {}
    for run in runs:
        for name, grad in run["grads"][step].items():
            sums[name] = sums[name] + grad.double() if name in sums else grad.double()
    mean = {name: total / len(runs) for name, total in sums.items()}
    if clip:
        norm = torch.stack([grad.norm() for grad in mean.values()]).norm()
        if stage == 0:  # there every rank takes the norm of what it holds, and DeepSpeed averages those
            own = [torch.stack([mean[name].norm() for name in run["grads"][step]]).norm() for run in runs]
            norm = torch.stack(own).mean()
        mean = {name: grad * min(1.0, clip / (norm.item() + 1e-6)) for name, grad in mean.items()}
    return {name: grad.float() for name, grad in mean.items()}


def reference(runs: list[dict[str, Any]], params: dict[str, Any], clip: float, stage: int) -> dict[str, Tensor]:
    """What one process makes of the same gradients, parameter by parameter."""
    weights = {name: nn.Parameter(value.clone()) for run in runs for name, value in run["before"].items()}
    projected = set(runs[0]["ranked"])
    settings = {key: value for key, value in params.items() if key != "rank"}
    groups = [
        {"params": [weights[name] for name in weights if name in projected], "rank": params["rank"]},
        {"params": [weights[name] for name in weights if name not in projected]},
    ]
    optimizer = ds_fira.FiraAdam(groups, **settings)
    for step in range(STEPS):
        for name, grad in combined(runs, step, clip, stage).items():
            weights[name].grad = grad
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def given(runs: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
    """The gradient of a step that the optimizers of all ranks had, put together from their parts."""
    shapes = {name: weight.shape for run in runs for name, weight in run["before"].items()}
    found = {name: torch.full((shape.numel(),), torch.nan) for name, shape in shapes.items()}
    for run in runs:
        for name, start, part in run["given"][step]:
            found[name][start : start + part.numel()] = part
    return {name: grad.view(shapes[name]) for name, grad in found.items()}
