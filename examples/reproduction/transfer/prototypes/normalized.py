"""Candidate A: the residual over its own energy, and a law for the rate of the hidden matrices."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from examples.reproduction.transfer.prototypes.base import BETAS, EPS, PUBLISHED_ALPHA, LowRank

# A column's residual energy is at least this share of its gradient's: below it is rounding.
FLOOR = 1e-4
# The model of which the law's constant is stated: width 128, 2 layers.
BASE = 128 * 2


class Normalized(LowRank):
    """W <- W - rate (P N + c S), S_j = sqrt(s - r) D_j / sqrt(p_j), p_j the average of |D_j|^2, D = G - P R.

    Settings: `gap`; `c`; `beta`, of p, 0 for the norm of the step alone; `warmup`, steps over which c grows from 0;
    `fade`, steps behind which c falls as sqrt(fade / step), None for never; `rest`, the rate of embeddings, head and
    norms in the trial's, and `rest_fade`, steps behind which it falls in the same way; `vectors`, the rate of norms in
    that one;
    `scaling`, "column" or "matrix"; `energy`, what p averages: that of the "residual", or of the whole "gradient", with
    sqrt(s) in place of sqrt(s - r); `inner`, the a of D = G - a P R, 1 for the residual itself; `signal`, whether a
    column of S goes by the size of N's too; `rows`, whether rows are brought to one size too; `factored`, whether V is
    kept as one number per row and per column; `limited`, whether S has Fira's growth limiter; `side`, "std", the
    smaller one, "right" or "left"; `alpha` and `power` of the law rate / lr = alpha (256 / (width x layers)) ** power.
    """

    defaults: ClassVar[dict[str, Any]] = {
        **LowRank.defaults,
        "c": 1.0,
        "beta": 0.9,
        "scaling": "column",
        "energy": "residual",
        "inner": 1.0,
        "factored": False,
        "limited": False,
        "side": "std",
        "alpha": PUBLISHED_ALPHA,
        "power": 0.0,
        "warmup": 0,
        "fade": None,
        "rest": 1.0,
        "rest_fade": None,
        "vectors": 1.0,
        "signal": False,
        "rows": False,
    }

    def rate_factor(self, shape: tuple[int, int]) -> float:
        """The law."""
        return self.settings["alpha"] * (BASE / (self.trial.width * self.trial.depth)) ** self.settings["power"]

    def on_the_right(self, shape: tuple[int, int]) -> bool:
        """By `side`."""
        side = self.settings["side"]
        return super().on_the_right(shape) if side == "std" else side == "right"

    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        """P N + c S."""
        basis = self.basis(grad, state)
        low_rank = basis.mT @ grad
        factored = self.settings["factored"]
        adam = self.factored_direction(low_rank, state) if factored else self.adam_direction(low_rank, state)
        adam = adam * self.bias_correction()
        size = self.settings["c"] * min(1.0, self.step_count / max(1, self.settings["warmup"]))
        size *= self.faded("fade")
        residual = self.residual(grad, basis, low_rank, state)
        if self.settings["signal"]:
            residual = residual * (adam.norm(dim=0) / math.sqrt(adam.shape[0]))
        return basis @ adam + size * residual

    def rest_factor(self) -> float:
        """By `rest` and `rest_fade`."""
        return self.settings["rest"] * self.faded("rest_fade")

    def faded(self, name: str) -> float:
        """What a setting of steps leaves now: 1 up to there, then by the root of the step."""
        steps = self.settings[name]
        return 1.0 if steps is None else min(1.0, steps / self.step_count) ** 0.5

    def residual(self, grad: Tensor, basis: Tensor, low_rank: Tensor, state: dict[str, Any]) -> Tensor:
        """S, (s, l)."""
        small, large = grad.shape
        grad_sq, beta = grad.double().square().sum(0), self.settings["beta"]
        whole = self.settings["energy"] == "gradient"
        left = torch.maximum(grad_sq - low_rank.double().square().sum(0), FLOOR * grad_sq)
        energy = grad_sq if whole else left
        if self.settings["scaling"] == "matrix":
            energy = energy.mean().expand(large)
        average = state.setdefault("energy", torch.zeros(large)).mul_(beta).add_(energy.float(), alpha=1 - beta)
        size = (average / (1 - beta**self.step_count)).sqrt()
        factor = torch.where(size > 0, math.sqrt(small if whole else small - basis.shape[1]) / size, 0.0)
        found = (grad - self.settings["inner"] * (basis @ low_rank)) * factor
        if self.settings["rows"]:
            found = self.by_rows(found, state)
        return self.limit(found, state) if self.settings["limited"] else found

    def by_rows(self, residual: Tensor, state: dict[str, Any]) -> Tensor:
        """Rows of about one size too, by the average of their squares; the whole keeps its norm."""
        beta, squares = self.settings["beta"], residual.square().mean(1)
        average = state.setdefault("rows", torch.zeros_like(squares)).mul_(beta).add_(squares, alpha=1 - beta)
        size = average / (1 - beta**self.step_count)
        found = residual * (size / size.mean()).clamp(min=FLOOR).rsqrt().unsqueeze(1)
        return found * (residual.norm() / found.norm())

    def limit(self, residual: Tensor, state: dict[str, Any]) -> Tensor:
        """Fira's limiter, equation 12."""
        norm = float(residual.norm())
        divisor = max(norm / (state.get("norm", norm) + 1e-8), 1.01) / 1.01
        state["norm"] = norm / divisor
        return residual / divisor

    def factored_direction(self, low_rank: Tensor, state: dict[str, Any]) -> Tensor:
        """M / (sqrt(V) + eps) with V_ij = a_i b_j / mean(a), as Adafactor (arXiv 1804.04235) factors it."""
        rows, columns = low_rank.shape
        state.setdefault("exp_avg", torch.zeros_like(low_rank)).lerp_(low_rank, 1 - BETAS[0])
        square = low_rank.square()
        by_row = state.setdefault("row_sq", torch.zeros(rows, 1)).lerp_(square.mean(1, keepdim=True), 1 - BETAS[1])
        by_column = state.setdefault("column_sq", torch.zeros(1, columns))
        by_column.lerp_(square.mean(0, keepdim=True), 1 - BETAS[1])
        second = by_row * by_column / by_row.mean().clamp(min=torch.finfo(torch.float32).tiny)
        return state["exp_avg"] / (second.sqrt() + EPS)
