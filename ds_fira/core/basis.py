"""A new basis for one matrix: from its gradient, with the signs of the old one, and the moments brought over to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ds_fira.core import quantization
from ds_fira.core.algorithms import algorithm_of
from ds_fira.core.base_optimizer import store
from ds_fira.core.state import MatrixState
from ds_fira.core.step import MatrixTask
from ds_fira.core.subspace import align_signs, change_moment_, compute_basis


def new_basis(task: MatrixTask) -> Tensor | None:
    """The basis of one matrix's gradient; None for a gradient that is zero or not finite.

    Raises:
        torch.linalg.LinAlgError: the decomposition failed.
    """
    if not task.finite or task.grad_square == 0.0:
        return None
    state, group = task.state, task.group
    known = int(state.refresh_step) >= 0
    previous = state.basis.to(state.dtype) if known else None
    grad = task.grad.to(state.dtype)
    strict = group["matmul_precision"] == "float32"
    return compute_basis(grad, group["rank"], state.side, group["subspace"], previous, strict)


def adopt_basis(task: MatrixTask, basis: Tensor) -> None:
    """Take a new basis for one matrix, and bring moments and limiter over; the refresh is done.

    Args:
        task: one matrix.
        basis: P in the state's dtype.
    """
    state, group = task.state, task.group
    if int(state.refresh_step) >= 0:
        previous = state.basis.to(state.dtype)
        basis = aligned_basis(basis, previous, group)
        carry_moments(state, group, basis_change(basis, previous, group))
        carry_limiter(state, group)
    state.basis.copy_(basis)
    state.refresh_step.copy_(state.step)


def aligned_basis(basis: Tensor, previous: Tensor, group: dict[str, Any]) -> Tensor:
    """A new basis with the signs of its columns chosen to agree with the old one's.

    The exact decomposition keeps the signs that LAPACK gives, as the released code does.
    """
    return basis if group["subspace"] == "svd" else align_signs(basis, previous)


def basis_change(basis: Tensor, previous: Tensor, group: dict[str, Any]) -> Tensor | None:
    """C = P_new' P_old, (r, r), where `refresh_moments` needs it; else None."""
    return basis.t() @ previous if group["refresh_moments"] == "rotate" else None


def carry_moments(state: MatrixState, group: dict[str, Any], change: Tensor | None) -> None:
    """Bring the moments from the old basis to the new one as `refresh_moments` says.

    Args:
        state: of one matrix, or of a part of R that has all its rank-long rows or columns; its moments are changed.
        group: the param group.
        change: as `basis_change`; read only by "rotate".
    """
    if group["refresh_moments"] == "keep":
        return
    kinds = algorithm_of(group).states
    moments = {name: quantization.read(stored, state.dtype) for name, stored in state.moments.items()}
    for name, moment in moments.items():
        if group["refresh_moments"] == "reset" or kinds[name] == "reset":
            moment.zero_()
        else:
            change_moment_(moment, change.square() if kinds[name] == "second" else change, state.side)
    store(state.moments, moments, state.step)


def carry_limiter(state: MatrixState, group: dict[str, Any]) -> None:
    """Bring the limiter's residual norm over a refresh as `refresh_limiter` says; 0 is no history."""
    # An algorithm without a limiter, and a group that an earlier version saved, say nothing.
    if group.get("refresh_limiter", "keep") == "reset" and state.residual_norm is not None:
        state.residual_norm.zero_()
