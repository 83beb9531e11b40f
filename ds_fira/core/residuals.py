"""The forms of the residual: what the setting `residual` chooses from, one row of `RESIDUALS` each.

Every form is S = phi * (G - a P R), Algorithm 1 with a phi of its own, or no S. A step reads a row from top to bottom
(`ds_fira.core.step`); the step of a matrix that ZeRO splits reads the same row, and sums over the ranks between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ds_fira.core import functional as F
from ds_fira.core import normalized
from ds_fira.core.scalars import Scalar, over_entries

if TYPE_CHECKING:  # the settings read this table
    from ds_fira.core.settings import GroupSettings
    from ds_fira.core.state import MatrixState

# Two numbers of each column (left) or row (right), (..., n or m), or their sums over all of them, (..., 1); float64.
Squares = tuple[Tensor, Tensor]


class StepContext(NamedTuple):
    """What the phases of a step know of the matrix, or of the k of one shape, that is stepped.

    Attributes:
        state: its step is this step's count.
        settings: of the param group.
        shape: (m, n) of the whole matrix, wherever its parts are.
        bias_correction: Adam's, or a rule's factor of the step size.
        grad_finite: whether the gradient was finite.
    """

    state: MatrixState
    settings: GroupSettings
    shape: tuple[int, int]
    bias_correction: Scalar
    grad_finite: Tensor | bool

    @property
    def host(self) -> bool:
        """Whether numbers of the matrix are plain, and its step count may be read."""
        return not isinstance(self.bias_correction, Tensor)

    @property
    def residual_share(self) -> Scalar:
        """The share of its size that the residual has in step t of a warm-up of T steps: t / T, then 1."""
        steps = self.settings.residual_warmup
        return min(1.0, int(self.state.step) / steps) if self.host else (self.state.step.double() / steps).clamp(max=1)


@dataclass(frozen=True, slots=True)
class ResidualForm:
    """One form of the residual.

    Attributes:
        squares: from |G_j|^2, |N_j|^2, |R_j|^2 and the settings, the two squared norms of each entry that phi is made
            of. |S|^2 is found from the second.
        factors: line 12, phi before the limiter from the squares, or from their sums where one factor is for all
            entries; float64. What the form remembers in the state changes here. None for no residual.
        residual_sq: line 13, |S|^2 from |phi * G|^2, the sum of phi^2 times the second squares, and the settings.
        recorded: what recorders show, from the squares, phi and the bias correction: two squared norms of each entry
            that the factor is the quotient of, and a number that multiplies it.
        kernel: what it is called in `ds_fira.core.kernels.measuring`, where a GPU finds the same phi and |S|^2.
        limiter: the limiter that goes with it.
        alpha_is_outside: whether alpha multiplies the whole update, whatever the formulation.
        cancels: whether |S|^2 is a difference that loses its digits where S is small beside phi * G.
        averages: whether the state keeps an average of squares, p.
        needs_scaling: whether it is nothing without a factor, as with `scaling = "none"`.
        is_update: whether it is phi * G, a = 0, and the whole update: nothing is added in the subspace, C is empty.
    """

    squares: Callable[[Tensor, Tensor, Tensor, GroupSettings], Squares]
    factors: Callable[[Squares, StepContext], Tensor] | None
    residual_sq: Callable[[Scalar, Scalar, GroupSettings], Scalar]
    recorded: Callable[[Squares, Tensor | None, Scalar], tuple[Tensor, Tensor, Scalar]]
    kernel: str
    limiter: str = "none"
    alpha_is_outside: bool = False
    cancels: bool = False
    averages: bool = False
    needs_scaling: bool = False
    is_update: bool = False


def scaled_factors(squares: Squares, context: StepContext) -> Tensor:
    """Phi of the paper; Algorithm 1 corrects the bias of N before, the released code does not."""
    settings = context.settings
    phi = F.scaling_factors(*squares, settings.scaling)
    if settings.formulation == "paper" and settings.scaling != "none":
        phi = phi * over_entries(context.bias_correction)
    return phi


# The paper's: phi = |N| / |R|. Recorders show it with the bias correction, whatever the step makes of that.
SCALED = ResidualForm(
    squares=lambda grad_sq, direction_sq, low_rank_sq, settings: (direction_sq, low_rank_sq),
    factors=scaled_factors,
    residual_sq=lambda scaled_grad_sq, scaled_low_rank_sq, settings: F.difference_of_squares(
        scaled_grad_sq, scaled_low_rank_sq, settings.inner_alpha
    ),
    recorded=lambda squares, phi, bias_correction: (*squares, bias_correction),
    kernel="scaled",
    limiter="growth",
    cancels=True,
)
# By an average of its own square: phi = sqrt(m - r) / sqrt(p_hat), `ds_fira.core.normalized`.
NORMALIZED = ResidualForm(
    squares=normalized.residual_squares,
    factors=normalized.normalizing_factors,
    residual_sq=lambda scaled_grad_sq, scaled_residual_sq, settings: scaled_residual_sq,
    recorded=normalized.recorded,
    kernel="normalized",
    alpha_is_outside=True,
    averages=True,
    needs_scaling=True,
)
RESIDUALS = {
    "scaled": SCALED,
    "normalized": NORMALIZED,
    # Of ApolloAdam alone, whose bases restore no part of a gradient.
    "gradient": replace(SCALED, cancels=False, needs_scaling=True, is_update=True),
    "none": replace(SCALED, factors=None, kernel="none", limiter="none", cancels=False),
}
