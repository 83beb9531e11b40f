"""Clipping of gradients that come one by one: the norm of all of them is known when the last has been used.

Letters: G_i is the gradient of parameter i, N = sqrt(sum |G_i|^2) the norm of all, c the largest norm allowed.
`torch.nn.utils.clip_grad_norm_` multiplies every G_i by min(1, c / N). In one backward pass there are two ways:

*previous*: N of the step before, in place of this step's: the same for all parameters, and one step late.
*parameter*: G_i by min(1, c / |G_i|), each by itself: the proportions between parameters change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

ClippingName = Literal["previous", "parameter"]


class Held:
    """What a rank has of gradients: all of them, unless a subclass says otherwise."""

    def of(self, param: Tensor) -> Tensor:
        """What this rank has of a parameter's gradient; changed in place."""
        return param.grad

    def share(self, param: Tensor) -> float:
        """Which share of the squares of that this rank counts: 1 over the number of ranks that have the same."""
        return 1.0

    def total(self, squares: Tensor) -> Tensor:
        """Sums of squares, 1-D, over the ranks that have parts of the same gradients."""
        return squares


class Clipping:
    """No clipping; the base of those that clip.

    Args:
        max_norm: c.

    Attributes:
        held: what this rank has of gradients.
        last_norm: N of the last step; None before the first.
    """

    def __init__(self, max_norm: float = math.inf) -> None:
        self.max_norm = max_norm
        self.held = Held()
        self.last_norm: float | None = None

    def clip_(self, params: Sequence[Tensor]) -> None:
        """Scale the gradients of some parameters in place; a collective call where ranks have parts of them."""

    def end_step(self) -> None:
        """Say that all gradients of a step have come; a collective call, likewise."""


class ByParameter(Clipping):
    """Every gradient to its own norm."""

    def __init__(self, max_norm: float) -> None:
        super().__init__(max_norm)
        # On the gradients' devices: nothing is read in the midst of a backward pass.
        self._squares: list[Tensor] = []

    def clip_(self, params: Sequence[Tensor]) -> None:
        """Scale by min(1, c / |G|); a gradient that is not finite is so on every rank then, and not stepped."""
        norms = self.held.total(self._note(params)).sqrt()
        factors = torch.where(norms.isfinite(), (self.max_norm / norms).clamp(max=1.0), torch.nan)
        for param, factor in zip(params, factors, strict=True):
            grad = self.held.of(param)
            grad.mul_(factor.to(grad.dtype))

    def end_step(self) -> None:
        """Keep N of this step, of the gradients that were finite: a step with another one is not made."""
        if self._squares:
            squares = self.held.total(torch.cat([each.to(self._squares[0].device) for each in self._squares]))
            self.last_norm = math.sqrt(float(squares.where(squares.isfinite(), 0.0).sum()))
        self._squares = []

    def _note(self, params: Sequence[Tensor]) -> Tensor:
        """What this rank counts of every |G|^2, float64, 1-D; kept for N, too."""
        squares = []
        for param in params:
            grad = self.held.of(param)
            norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
            squares.append(norm.double().square() * self.held.share(param))
        self._squares.append(torch.stack(squares))
        return self._squares[-1]


class ByPrevious(ByParameter):
    """All gradients by the norm of the step before."""

    def clip_(self, params: Sequence[Tensor]) -> None:
        """Scale by min(1, c / N) with N of the step before; in the first step as `ByParameter`."""
        if self.last_norm is None:
            super().clip_(params)
            return
        self._note(params)
        if self.last_norm > self.max_norm:
            for param in params:
                self.held.of(param).mul_(self.max_norm / self.last_norm)


WAYS = {"previous": ByPrevious, "parameter": ByParameter}


def clipping_of(clip: str, max_norm: float | None, name: str) -> Clipping:
    """The clipping that is asked for.

    Args:
        clip: its name.
        max_norm: c; None for no clipping.
        name: of the optimizer.

    Raises:
        ValueError: a value is not legal.
    """
    if clip not in WAYS:
        legal = " or ".join(map(repr, get_args(ClippingName)))
        raise ValueError(f"{name}: clip = {clip!r} is not legal; choose {legal}.")
    if max_norm is None:
        return Clipping()
    if not (isinstance(max_norm, int | float) and 0 < max_norm < math.inf):
        raise ValueError(
            f"{name}: max_norm = {max_norm!r} is not legal; give a number above 0, such as 1.0, or None not to clip."
        )
    return WAYS[clip](float(max_norm))
