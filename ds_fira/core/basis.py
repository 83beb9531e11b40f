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
    grad_square = task.grad_square()
    if grad_square == 0.0 or not is_finite(grad_square, task.state.dtype):
        return None
    state = task.state
    return basis_of(task.grad, state, task.settings, state.basis.to(state.dtype) if state.has_basis else None)


def basis_of(grad: Tensor, state: MatrixState, settings: GroupSettings, previous: Tensor | None) -> Tensor:
    """The basis of a gradient, its columns turned to the sides of the old one's.

    The exact decomposition keeps the signs that LAPACK gives, as the released code does.

    Args:
        grad: G, (m, n), finite and not zero.
        state: says side and dtype.
        settings: of the param group.
        previous: the basis before, (d, r); None where there is none or nothing needs it.

    Raises:
        torch.linalg.LinAlgError: the decomposition failed.
    """
    strict = settings.matmul_precision == "float32"
    basis = compute_basis(grad.to(state.dtype), settings.rank, state.side, settings.subspace, previous, strict)
    return basis if previous is None or settings.subspace == "svd" else align_signs(basis, previous)


def adopt_basis(task: MatrixTask, basis: Tensor) -> None:
    """Take a new basis for one matrix; see `take_basis`.

    Args:
        task: one matrix.
        basis: P in the state's dtype, as `basis_of` gives it.
    """
    state, settings = task.state, task.settings
    # Before the first basis there are no moments to bring over.
    change = basis_change(basis, state.basis.to(state.dtype), settings) if state.has_basis else None
    take_basis(state, settings, basis, change)


def take_basis(state: MatrixState, settings: GroupSettings, basis: Tensor, change: Tensor | None) -> None:
    """Take a new basis, and bring moments and limiter over from the old one; the refresh is done.

    Args:
        state: of one matrix, or of a part of it.
        settings: of the param group.
        basis: P, or the part of it that the state holds.
        change: as `basis_change`; read only by "rotate", where there was a basis.
    """
    if state.has_basis:
        change_moments(state, settings, change)
        if settings.refresh_limiter == "reset" and state.residual_norm is not None:
            # No history.
            state.residual_norm.zero_()
    state.basis.copy_(basis)
    state.refresh_step.copy_(state.step)


def basis_change(basis: Tensor, previous: Tensor, settings: GroupSettings) -> Tensor | None:
    """C = P_new' P_old, (r, r), where `refresh_moments` needs it; else None."""
    return basis.t() @ previous if settings.refresh_moments == "rotate" else None


def change_moments(state: MatrixState, settings: GroupSettings, change: Tensor | None) -> None:
    """Bring the moments from the old basis to the new one as `refresh_moments` says.

    Args:
        state: of one matrix, or of some columns (left) or rows (right) of R; its moments, if it has any, change.
        settings: of the param group.
        change: as `basis_change`; read only by "rotate".
    """
    if settings.refresh_moments == "keep" or not any(state.moments.values()):
        return
    kinds = settings.state_kinds
    moments = {name: quantization.read(stored, state.dtype) for name, stored in state.moments.items()}
    for name, moment in moments.items():
        if settings.refresh_moments == "reset" or kinds[name] == "reset":
            moment.zero_()
        else:
            change_moment_(moment, change.square() if kinds[name] == "second" else change, state.side)
    store(state.moments, moments, state.step)
