"""Methods without a subspace: Adam, Muon, and SGD normalised by column (SCALE)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from examples.reproduction.transfer.prototypes.base import BETAS, EPS, LowRank, Prototype

# Keller Jordan, "Muon" (2024): five steps of a quintic Newton-Schulz iteration with these coefficients, on a
# Nesterov momentum of 0.95.
COEFFICIENTS, ITERATIONS, MOMENTUM = (3.4445, -4.7750, 2.0315), 5, 0.95
# Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982): 0.2 sqrt(max(m, n)) gives Adam's size.
MUON_RMS = 0.2


class Adam(LowRank):
    """Full-rank Adam."""

    defaults: ClassVar[dict[str, Any]] = {}

    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        """M / (sqrt(V) + eps), both moments corrected before, as torch does."""
        self.adam_direction(grad, state)
        second = state["exp_avg_sq"] / (1 - BETAS[1] ** self.step_count)
        return state["exp_avg"] / (1 - BETAS[0] ** self.step_count) / (second.sqrt() + EPS)


class Muon(Prototype):
    """Orthogonalised momentum, at the root mean square of Adam's updates."""

    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        """The orthogonal factor of the momentum, (s, l), times 0.2 sqrt(l)."""
        momentum = state.setdefault("momentum", torch.zeros_like(grad)).mul_(MOMENTUM).add_(grad)
        return orthogonalized(grad + MOMENTUM * momentum) * (MUON_RMS * math.sqrt(grad.shape[1]))


class ColumnSGD(Prototype):
    """SCALE (arXiv 2506.16659): the gradient over its column norms, no state; momentum in the head alone, by Adam."""

    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        """sqrt(s) G_j / |G_j|."""
        return grad * (math.sqrt(grad.shape[0]) / grad.norm(dim=0).clamp(min=1e-12))


def orthogonalized(matrix: Tensor) -> Tensor:
    """About the nearest matrix with singular values of one, (s, l), s <= l."""
    a, b, c = COEFFICIENTS
    found = matrix / (matrix.norm() + 1e-7)
    for _ in range(ITERATIONS):
        square = found @ found.mT
        found = a * found + (b * square + c * torch.mm(square, square)) @ found
    return found
