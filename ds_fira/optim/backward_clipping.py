"""Clipping of gradients that come one by one: the norm of all of them is known when the last has been used.

Letters: G_i is the gradient of parameter i, N = sqrt(sum |G_i|^2) the norm of all, c the largest norm allowed.
`torch.nn.utils.clip_grad_norm_` multiplies every G_i by min(1, c / N). In one backward pass there are two ways:

*previous*: N of the step before, in place of this step's: the same for all parameters, and one step late.
*parameter*: G_i by min(1, c / |G_i|), each by itself: the proportions between parameters change.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

ClippingName = Literal["previous", "parameter"]


class Clipping:
    """No clipping; the base of those that clip.

    Args:
        max_norm: c.

    Attributes:
        last_norm: N of the last step; None before the first.
    """

    def __init__(self, max_norm: float = math.inf) -> None:
        self.max_norm = max_norm
        self.last_norm: float | None = None

    def clip_(self, grad: Tensor) -> None:
        """Scale one gradient in place."""

    def end_step(self) -> None:
        """Say that all gradients of a step have come."""


class ByParameter(Clipping):
    """Every gradient to its own norm."""

    def __init__(self, max_norm: float) -> None:
        super().__init__(max_norm)
        # On the gradients' devices, one number each: nothing is read in the midst of a backward pass.
        self._squares: dict[torch.device, Tensor] = {}

    def clip_(self, grad: Tensor) -> None:
        """Scale by min(1, c / |G|)."""
        norm = self._note(grad)
        grad.mul_((self.max_norm / norm).nan_to_num(1.0, posinf=1.0).clamp(max=1.0).to(grad.dtype))

    def end_step(self) -> None:
        """Keep N of this step."""
        if self._squares:
            self.last_norm = math.sqrt(sum(float(square) for square in self._squares.values()))
        self._squares = {}

    def _note(self, grad: Tensor) -> Tensor:
        """|G|, float32, 0-dim; added to N where it is finite, as a step with another one is not made."""
        norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        square = torch.where(norm.isfinite(), norm, 0.0).double().square()
        self._squares[grad.device] = self._squares.get(grad.device, 0.0) + square
        return norm


class ByPrevious(ByParameter):
    """All gradients by the norm of the step before."""

    def clip_(self, grad: Tensor) -> None:
        """Scale by min(1, c / N) with N of the step before; in the first step as `ByParameter`."""
        if self.last_norm is None:
            super().clip_(grad)
            return
        self._note(grad)
        if self.last_norm > self.max_norm:
            grad.mul_(self.max_norm / self.last_norm)


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
