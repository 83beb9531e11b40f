"""Lines 4 to 7 of Algorithm 1: a new basis for one matrix, and the moments brought over to it."""

from __future__ import annotations

from torch import Tensor

from ds_fira.core import quantization
from ds_fira.core.base_optimizer import store
from ds_fira.core.scalars import is_finite
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState
from ds_fira.core.step import MatrixTask
from ds_fira.core.subspace import align_signs, change_moment_, compute_basis


def new_basis(task: MatrixTask) -> Tensor | None:
    """The basis of one matrix's gradient; None for a gradient that is zero or not finite.

    Raises:
        torch.linalg.LinAlgError: the decomposition failed.
    """
    square = task.grad_square()
    if square == 0.0 or not is_finite(square, task.state.dtype):
        return None
    state, settings = task.state, task.settings
    previous = state.basis.to(state.dtype) if state.has_basis else None
    strict = settings.matmul_precision == "float32"
    return compute_basis(task.grad.to(state.dtype), settings.rank, state.side, settings.subspace, previous, strict)


def adopt_basis(task: MatrixTask, basis: Tensor) -> None:
    """Take a new basis for one matrix, and bring moments and limiter over; the refresh is done.

    Args:
        task: one matrix.
        basis: P in the state's dtype.
    """
    state, settings = task.state, task.settings
    if state.has_basis:
        previous = state.basis.to(state.dtype)
        basis = aligned_basis(basis, previous, settings)
        change_moments(state, settings, basis_change(basis, previous, settings))
        reset_limiter(state, settings)
    state.basis.copy_(basis)
    state.refresh_step.copy_(state.step)


def aligned_basis(basis: Tensor, previous: Tensor, settings: GroupSettings) -> Tensor:
    """A new basis with the signs of its columns chosen to agree with the old one's, both (d, r).

    The exact decomposition keeps the signs that LAPACK gives, as the released code does.
    """
    return basis if settings.subspace == "svd" else align_signs(basis, previous)


def basis_change(basis: Tensor, previous: Tensor, settings: GroupSettings) -> Tensor | None:
    """C = P_new' P_old, (r, r), where `refresh_moments` needs it; else None."""
    return basis.t() @ previous if settings.refresh_moments == "rotate" else None


def change_moments(state: MatrixState, settings: GroupSettings, change: Tensor | None) -> None:
    """Bring the moments from the old basis to the new one as `refresh_moments` says.

    Args:
        state: of one matrix, or of some columns (left) or rows (right) of R; its moments change.
        settings: of the param group.
        change: as `basis_change`; read only by "rotate".
    """
    if settings.refresh_moments == "keep":
        return
    kinds = settings.state_kinds
    moments = {name: quantization.read(stored, state.dtype) for name, stored in state.moments.items()}
    for name, moment in moments.items():
        if settings.refresh_moments == "reset" or kinds[name] == "reset":
            moment.zero_()
        else:
            change_moment_(moment, change.square() if kinds[name] == "second" else change, state.side)
    store(state.moments, moments, state.step)


def reset_limiter(state: MatrixState, settings: GroupSettings) -> None:
    """Forget the limiter's residual norm where `refresh_limiter` is "reset"; 0 is no history."""
    if settings.refresh_limiter == "reset" and state.residual_norm is not None:
        state.residual_norm.zero_()
