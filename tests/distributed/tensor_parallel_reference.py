"""What one process makes of the gradients of ranks that AutoTP gives slices, put together by shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ds_fira


def together(parts: Sequence[Tensor], whole: torch.Size) -> Tensor:
    """The slices of one parameter, in the order of the ranks, as the whole."""
    if parts[0].shape == whole:
        return parts[0]
    (dim,) = [dim for dim, pair in enumerate(zip(parts[0].shape, whole, strict=True)) if len(set(pair)) > 1]
    found = torch.cat(list(parts), dim)
    assert found.shape == whole
    return found


def in_order(runs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """By data-parallel rank, what its tensor-parallel ranks answered, in their order."""
    found: dict[int, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        tp, dp = run["place"]
        found.setdefault(dp, {})[tp] = run
    return [[row[tp] for tp in sorted(row)] for _, row in sorted(found.items())]


def whole_of(row: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The parameters of one copy from what its ranks have."""
    return {name: together([part[name] for part in row], shape) for name, shape in shapes.items()}


def combined(runs: Sequence[Mapping[str, Any]], step: int, clip: float) -> dict[str, Tensor]:
    """The whole gradient of a step: the mean over the copies, clipped by its norm."""
    shapes = {name: weight.shape for name, weight in runs[0]["whole"].items()}
    copies = [whole_of([run["grads"][step] for run in row], shapes) for row in in_order(runs)]
    mean = {name: torch.stack([copy[name].double() for copy in copies]).mean(0) for name in shapes}
    norm = torch.stack([grad.norm() for grad in mean.values()]).norm()
    if clip:
        mean = {name: grad * min(1.0, clip / (norm.item() + 1e-6)) for name, grad in mean.items()}
    return {name: grad.float() for name, grad in mean.items()}


def given(runs: Sequence[Mapping[str, Any]], step: int) -> dict[str, Tensor]:
    """The whole gradient of a step that the optimizers of all ranks had, put together from their parts."""
    shapes, slices = {name: weight.shape for name, weight in runs[0]["whole"].items()}, []
    for same in zip(*in_order(runs), strict=True):  # of all copies the same slice
        local = {name: weight.shape for name, weight in same[0]["after"].items()}
        parts = [{name: run["given"][step].get(name) for name in local} for run in same]
        found = {name: torch.full((shape.numel(),), torch.nan) for name, shape in local.items()}
        for name, part in ((name, each[name]) for each in parts for name in local if each[name] is not None):
            found[name] = torch.where(part.isnan(), found[name], part)
        slices.append({name: grad.view(local[name]) for name, grad in found.items()})
    return whole_of(slices, shapes)


def reference(
    runs: Sequence[Mapping[str, Any]],
    params: Mapping[str, Any],
    clip: float,
    steps: int,
    kind: type[torch.optim.Optimizer] = ds_fira.FiraAdam,
) -> dict[str, Tensor]:
    """What one process makes of the same whole gradients."""
    weights = {name: nn.Parameter(value.clone()) for name, value in runs[0]["whole"].items()}
    projected = set(runs[0]["ranked"])
    settings = {key: value for key, value in params.items() if key != "rank"}
    groups = [
        {"params": [weights[name] for name in weights if name in projected], "rank": params["rank"]},
        {"params": [weights[name] for name in weights if name not in projected]},
    ]
    optimizer = kind(groups, **settings)
    for step in range(steps):
        for name, grad in combined(runs, step, clip).items():
            weights[name].grad = grad
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}
