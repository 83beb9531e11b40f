"""GaLore and Fira as published, and APOLLO by its own package."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from apollo_torch import APOLLOAdamW
from torch import Tensor, nn

from examples.reproduction.transfer.prototypes.base import PUBLISHED_ALPHA, LowRank, Prototype
from examples.reproduction.transfer.trials import Trial

RELEASED_EPS, NORM_EPS = 1e-6, 1e-8


class GaLore(LowRank):
    """arXiv 2403.03507: Adam in the subspace, nothing of the residual."""

    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        """P N."""
        basis = self.basis(grad, state)
        return basis @ self.adam_direction(basis.mT @ grad, state, RELEASED_EPS) * self.bias_correction()

    def rate_factor(self, shape: tuple[int, int]) -> float:
        """The published alpha."""
        return PUBLISHED_ALPHA


class Fira(LowRank):
    """arXiv 2410.01623 as PyPI `fira` 1.0.2 computes it: S = phi (G - alpha P R), limited, beside alpha P N.

    Settings: `gap`; `gamma` of the limiter; `vectors`, the rate of norms in the trial's, 1 as released.
    """

    defaults: ClassVar[dict[str, Any]] = {**LowRank.defaults, "gamma": 1.01, "vectors": 1.0}

    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        """Alpha P N + S, bias corrected."""
        basis = self.basis(grad, state)
        low_rank = basis.mT @ grad
        adam = self.adam_direction(low_rank, state, RELEASED_EPS)
        phi = adam.norm(dim=0) / (low_rank.norm(dim=0) + NORM_EPS)
        residual = (grad - PUBLISHED_ALPHA * (basis @ low_rank)) * phi
        norm, gamma = float(residual.norm()), self.settings["gamma"]
        if "norm" in state:
            divisor = max(norm / (state["norm"] + NORM_EPS), gamma) / gamma
            residual, norm = residual / divisor, norm / divisor
        state["norm"] = norm
        return (PUBLISHED_ALPHA * (basis @ adam) + residual) * self.bias_correction()


class Apollo(Prototype):
    """PyPI `apollo-torch` 1.0.3, arXiv 2412.05270: APOLLO, or with `mini` APOLLO-Mini, in its authors' settings."""

    defaults: ClassVar[dict[str, Any]] = {"mini": False, "gap": 50}
    resumable = False  # its projections are Python objects

    def __init__(self, model: nn.Module, trial: Trial) -> None:
        super().__init__(model, trial)
        mini = self.settings["mini"]
        own = {
            "params": self.hidden,
            "rank": 1 if mini else self.rank(self.hidden[0]),
            "update_proj_gap": self.settings["gap"],
            "scale": 128 if mini else 1,
            "scale_type": "tensor" if mini else "channel",
            "proj": "random",
            "proj_type": "std",
        }
        self.apollo = APOLLOAdamW([own], lr=trial.lr, scale_front=mini)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Both optimizers."""
        for group in (*self.adam.param_groups, *self.apollo.param_groups):
            group["lr"] = self.trial.lr * share
        self.adam.step()
        self.apollo.step()
        self.step_count += 1

    @property
    def state_bytes(self) -> int:
        """Those of the package, without its projections, which it draws anew from a seed."""
        states = [*self.apollo.state.values(), *self.adam.state.values()]
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel() > 1)
