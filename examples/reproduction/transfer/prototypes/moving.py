"""Candidates B to E and G: another bound of the residual, and other ways for the basis and its moments to go on."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from examples.reproduction.transfer.prototypes.base import BETAS, EPS
from examples.reproduction.transfer.prototypes.normalized import FLOOR, Normalized


class Moving(Normalized):
    """The normalized residual with one thing changed; E, a basis for good, is a `gap` longer than the training.

    Settings, over those of `Normalized`: `bounded` (B), whether S is D / sqrt(D^2 + p / (s - r)) by element;
    `transport` (C), whether a refresh carries the moments over, as `transported` does; `complement` (D), the share of
    the basis that is drawn at random from the complement of the rest; `angle` (G), by which a refresh turns the basis
    as SubTrack++ (arXiv 2502.01586) does, in radians, 0 for an SVD; `shrink` and `beta2`, G's controls: what a refresh
    leaves of V, and the decay of V.
    """

    defaults: ClassVar[dict[str, Any]] = {
        **Normalized.defaults,
        "bounded": False,
        "transport": False,
        "complement": 0.0,
        "angle": 0.0,
        "shrink": 1.0,
        "beta2": BETAS[1],
    }

    def basis(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        """P, and the moments where it is new."""
        before = state.get("basis")
        if (self.step_count - 1) % self.settings["gap"]:
            return before
        if before is not None and self.settings["angle"]:
            state["basis"] = turned(before, grad, self.settings["angle"])
        else:
            super().basis(grad, state)
            state["basis"] = self.with_complement(state["basis"])
        if before is not None:
            if self.settings["transport"]:
                state |= transported(state, state["basis"].mT @ before, self.step_count - 1, self.settings["beta2"])
            state["exp_avg_sq"] *= self.settings["shrink"]
        return state["basis"]

    def with_complement(self, basis: Tensor) -> Tensor:
        """The first columns of P, and random ones orthogonal to them in place of the last."""
        drawn = round(self.settings["complement"] * basis.shape[1])
        if not drawn:
            return basis
        generator = torch.Generator().manual_seed(self.step_count)
        random = torch.randn(basis.shape[0], drawn, generator=generator)
        return torch.linalg.qr(torch.cat([basis[:, : basis.shape[1] - drawn], random], dim=1))[0]

    def adam_direction(self, grad: Tensor, state: dict[str, Any], eps: float = EPS) -> Tensor:
        """With `beta2`."""
        beta2 = self.settings["beta2"]
        for key in ("exp_avg", "exp_avg_sq"):
            state.setdefault(key, torch.zeros_like(grad))
        state["exp_avg"].lerp_(grad, 1 - BETAS[0])
        state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
        return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + eps)

    def bias_correction(self) -> float:
        """With `beta2`."""
        return (1 - self.settings["beta2"] ** self.step_count) ** 0.5 / (1 - BETAS[0] ** self.step_count)

    def residual(self, grad: Tensor, basis: Tensor, low_rank: Tensor, state: dict[str, Any]) -> Tensor:
        """S, bounded by column or by element."""
        if not self.settings["bounded"]:
            return super().residual(grad, basis, low_rank, state)
        residual, beta = grad - basis @ low_rank, self.settings["beta"]
        energy = residual.square().sum(0).clamp(min=FLOOR * grad.square().sum(0))
        average = state.setdefault("energy", torch.zeros_like(energy)).mul_(beta).add_(energy, alpha=1 - beta)
        mean_square = average / (1 - beta**self.step_count) / max(1, grad.shape[0] - basis.shape[1])
        divisor = (residual.square() + mean_square).sqrt()
        return torch.where(divisor > 0, residual / divisor, 0.0)


def turned(basis: Tensor, grad: Tensor, angle: float) -> Tensor:
    """P turned by an angle on the Grassmann manifold, towards the largest direction of the gradient that it misses.

    The tangent at P of |G - P P'G|^2 is (G - P P'G) (P'G)'; its first singular triple gives the plane of the turn.
    """
    low_rank = basis.mT @ grad
    left, _, right = torch.linalg.svd((grad - basis @ low_rank) @ low_rank.mT, full_matrices=False)
    missed, kept = left[:, :1], right[:1]
    toward = (math.cos(angle) - 1.0) * (basis @ kept.mT) + math.sin(angle) * missed
    return torch.linalg.qr(basis + toward @ kept)[0]


def transported(state: dict[str, Any], change: Tensor, steps: int, beta2: float) -> dict[str, Tensor]:
    """Both moments in a new basis: M by C = P_new' P_old, V as if the entries of R were independent about M.

    M <- C M; V <- (C * C) (V - M^2) + (C M)^2, both of them corrected for their bias, and V at least 0.
    """
    first, second = 1 - BETAS[0] ** steps, 1 - beta2**steps
    mean, square = state["exp_avg"] / first, state["exp_avg_sq"] / second
    moved = change @ mean
    spread = change.square() @ (square - mean.square()).clamp(min=0.0)
    return {"exp_avg": moved * first, "exp_avg_sq": (spread + moved.square()) * second}
