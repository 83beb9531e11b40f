"""A plain module whose layers of experts AutoEP replaces, by the patterns of its config; needs no transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, INNER, TOP = 12, 20, 2
NAMES = ("w1", "w2", "w3")


def autoep(size: int) -> dict[str, Any]:
    """What a DeepSpeed config has to say for `AutoNet`, with experts shared out over some ranks."""
    names = {f"expert_{name}": name for name in NAMES}
    patterns = {"moe_layer_pattern": r"layers\.\d+", "router_pattern": "gate", "expert_pattern": "experts"}
    form = {"top_k": TOP, "score_func": "softmax", "score_apply": "post", "use_grouped_mm": False}
    return {"expert_parallel": {"enabled": True, "autoep_size": size, **patterns, **names, **form}}


class Experts(nn.Module):
    """Gated experts, each of three matrices, of which each kind is one parameter."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for name, shape in zip(NAMES, ((INNER, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN)), strict=True):
            self.register_parameter(name, nn.Parameter(0.3 * torch.randn(count, *shape)))


class Layer(nn.Module):
    """A router and its experts as a model defines them; AutoEP puts its own layer here."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, count, bias=False), Experts(count)

    def forward(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden) to the same, by the best experts of each token."""
        weight, chosen = torch.topk(self.gate(hidden).softmax(-1), TOP)
        w1, w2, w3 = (getattr(self.experts, name)[chosen] for name in NAMES)
        inner = nn.functional.silu(torch.einsum("th,tkih->tki", hidden, w1)) * torch.einsum("th,tkih->tki", hidden, w3)
        return torch.einsum("tki,tkhi,tk->th", inner, w2, weight)


class AutoNet(nn.Module):
    """A dense layer, layers of so many experts, a dense layer."""

    def __init__(self, layers: list[int]) -> None:
        super().__init__()
        self.embed = nn.Linear(5, HIDDEN, bias=False)
        nn.init.normal_(self.embed.weight)  # for gradients far from rounding
        self.layers = nn.ModuleList(Layer(count) for count in layers)
        self.out = nn.Linear(HIDDEN, 7)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, 5) to a loss."""
        hidden = self.embed(x)
        for layer in self.layers:
            found = layer(hidden[None] if hasattr(layer, "router") else hidden)
            hidden = hidden + found.view_as(hidden)
        return (self.out(hidden) ** 2).float().mean()
