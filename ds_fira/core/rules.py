"""Adaptive rules for Fira to be put around (Algorithm 2 of the paper, arXiv 2410.01623): what a user writes.

A rule is the base optimizer: from a gradient and its states it makes a direction N. What Fira adds (the subspace, the
scaled residual, the limiter), sharding, refreshes and checkpoints are `ds_fira.plug`'s. FiraAdam is not a rule: its
moments have kernels of their own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

# What a refresh with `refresh_moments = "rotate"` does to a state: "first" is linear in the gradient and is multiplied
# with C = P_new' P_old; "second" is a sum of squares, never negative, and is multiplied with C * C; "reset" is zeroed.
Kind = Literal["first", "second", "reset"]


class Rule(BaseModel):
    """A base optimizer: subclass it, and give the class to `ds_fira.plug`.

    Hyper-parameters are annotated attributes with defaults, checked by pydantic and read as `self.name`; they become
    settings of the optimizer, which param groups may have for themselves. `lr`, `weight_decay` (decoupled) and all
    that is Fira's are there anyway, under the names that FiraAdam has for them.

    Attributes:
        states: the tensors that the rule keeps, by name, and their kind; of the gradient's shape, zeros at first.
        elementwise: whether every element of N depends on its own elements of gradient and states alone. If it does,
            a matrix that ZeRO cuts is stepped where its parts lie; if not, whole on its owner, and parameters that are
            not projected cannot be sharded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    states: ClassVar[Mapping[str, Kind]] = {}
    elementwise: ClassVar[bool] = False

    @abstractmethod
    def direction(self, grad: Tensor, states: dict[str, Tensor], step: Tensor) -> Tensor:
        """The direction N: the step subtracts it from the weight. Updates the states.

        Args:
            grad: the gradient that the rule sees: R = P'G, (r, n), or R = GP, (m, r), of a projected matrix; else the
                parameter's, of any shape; finite, float32 (float64 for float64 weights). A copy, which the rule
                may change.
            states: by name, of the same shape and dtype; to be changed in place, or replaced in the dict.
            step: this step's count, from 1; int64, 0-dim, on the gradient's device or on the CPU.

        Returns:
            N, of the gradient's shape.
        """

    def step_size(self, step: Tensor) -> Tensor | float:
        """A factor of the learning rate at a step, such as a bias correction.

        Args:
            step: as in `direction`.

        Returns:
            A number, or a tensor of `step`'s shape.
        """
        return 1.0


class RMSProp(Rule):
    """V <- rho V + (1 - rho) R^2, N = R / (sqrt(V) + eps), as `torch.optim.RMSprop`, whose `alpha` is `rho` here.

    The name is that of Keras; `alpha` is GaLore's scale in this package.
    """

    rho: Annotated[float, Field(ge=0.0, lt=1.0, description="a number from 0 up to but not including 1")] = 0.99
    eps: Annotated[float, Field(ge=0.0, description="a number of at least 0")] = 1e-8

    states = {"square_avg": "second"}
    elementwise = True

    def direction(self, grad: Tensor, states: dict[str, Tensor], step: Tensor) -> Tensor:
        """N; see the class."""
        average_sq = states["square_avg"].mul_(self.rho).addcmul_(grad, grad, value=1.0 - self.rho)
        divisor = average_sq.sqrt().add_(self.eps)
        if self.eps < torch.finfo(divisor.dtype).tiny:
            divisor.masked_fill_(divisor == 0.0, torch.inf)  # no gradient yet: N = 0, not 0 / 0
        return grad / divisor
