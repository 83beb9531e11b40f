"""The model of `pipe_jobs` in one process, without DeepSpeed, and what it makes of the batches of all pipelines."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

import ds_fira
from tests.distributed.pipe_jobs import STEPS, batches_of, layers, logits_of, loss_of


class Whole(nn.Module):
    """All layers, under the names that a pipeline gives them."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict()
        self.calls: list[Any] = []
        for index, spec in enumerate(layers(tied)):
            key = getattr(spec, "key", None)
            layer = self.tied_modules[key] if key in self.tied_modules else spec.build()
            if key is None:
                self.add_module(str(index), layer)
            else:
                self.tied_modules[key] = layer
            as_head = getattr(spec, "forward_fn", None) is not None
            self.calls.append((lambda x, layer=layer: logits_of(layer, x)) if as_head else layer)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to logits."""
        for call in self.calls:
            x = call(x)
        return x


def whole_weights(runs: list[dict[str, Any]], key: str) -> dict[str, Tensor]:
    """Of all stages."""
    return {name: weight for run in runs for name, weight in run[key].items()}


def given(runs: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
    """The gradient of a step that the optimizers of all ranks had, put together from their parts."""
    shapes = {name: weight.shape for name, weight in whole_weights(runs, "before").items()}
    found = {name: torch.full((shape.numel(),), torch.nan) for name, shape in shapes.items()}
    for run in runs:
        for name, start, part in run["given"][step]:
            found[name][start : start + part.numel()] = part
    return {name: grad.view(shapes[name]) for name, grad in found.items()}


def reference(
    runs: list[dict[str, Any]], ds_config: dict[str, Any], pipelines: int, tied: bool
) -> tuple[dict[str, Tensor], list[float], float]:
    """Train alone, by autograd of the whole model.

    Clipping is DeepSpeed's: by the norm of the whole gradient, at ZeRO stage 0 by that of the first stage's.

    Returns:
        The weights; the losses; the largest difference between its gradients and those that the ranks' optimizers had.
    """
    model = Whole(tied)
    model.load_state_dict(whole_weights(runs, "before"))
    ranked = set(itertools.chain.from_iterable(run["ranked"] for run in runs))
    named = dict(model.named_parameters())
    params, clip = ds_config["optimizer"]["params"], ds_config["gradient_clipping"]
    counted = runs[0]["before"] if ds_config["zero_optimization"]["stage"] == 0 else named
    settings = {key: value for key, value in params.items() if key != "rank"}
    groups = [
        {"params": [param for name, param in named.items() if name in ranked], "rank": params["rank"]},
        {"params": [param for name, param in named.items() if name not in ranked]},
    ]
    optimizer, losses, apart = ds_fira.FiraAdam(groups, **settings), [], 0.0
    for step in range(STEPS):
        parts = [batch for pipeline in range(pipelines) for batch in batches_of(step, pipeline)]
        loss = sum(loss_of(model(tokens), labels) for tokens, labels in parts) / len(parts)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            norm = torch.nn.utils.get_total_norm([named[name].grad for name in counted])
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
        for name, grad in given(runs, step).items():
            apart = max(apart, float((grad - named[name].grad).abs().max()))
        optimizer.step()
        losses.append(loss.item())
    return {name: param.detach() for name, param in named.items()}, losses, apart
