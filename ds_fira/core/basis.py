"""Lines 4 to 7 of Algorithm 1: a new basis for one matrix, and the moments brought over to it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_fira.core import quantization
from ds_fira.core.base_optimizer import store
from ds_fira.core.precision import matmul_precision
from ds_fira.core.scalars import is_finite
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState
from ds_fira.core.step import MatrixTask
from ds_fira.core.subspace import align_signs, changed_moment, compute_basis

# In lower case, what a library says that could not decompose a matrix or had no memory for it; torch raises most of it
# as a plain RuntimeError. Anything else is a fault of the program, or the end of the device.
_SOLVER_SIGNS = ("cusolver", "cublas", "magma", "lapack", "out of memory", "not enough memory", "can't allocate memory")
_told: set[torch.device] = set()  # devices whose failures a warning has named


def new_basis(task: MatrixTask) -> Tensor | None:
    """The basis of one matrix's gradient; None for a gradient that is zero or not finite.

    Raises:
        RuntimeError: the decomposition failed, see `solver_failed`.
    """
    return basis_of(task.grad, task.state, task.settings, _previous(task)) if _has_subspace(task) else None


def new_bases(tasks: Sequence[MatrixTask]) -> list[Tensor | None]:
    """The bases of matrices that go together (`goes_with`), by batched products and decompositions.

    Args:
        tasks: matrices, one each, of one shape, side and param group, that all have a basis or all have none.

    Returns:
        For each its basis; None for a gradient that is zero or not finite. They are those of `new_basis` but for the
        rounding of batched products, and for what that turns inside a subspace.

    Raises:
        RuntimeError: the decomposition of one of them failed, or there was no memory for all, see `solver_failed`.
    """
    with_subspace = {place: task for place, task in enumerate(tasks) if _has_subspace(task)}
    if len(with_subspace) < 2:
        return [new_basis(task) for task in tasks]
    chosen = list(with_subspace.values())
    state, settings = chosen[0].state, chosen[0].settings
    olds = [old for task in chosen if (old := _previous(task)) is not None]
    previous = torch.stack(olds) if olds else None
    found = _solver(state, settings)(torch.stack([task.grad.to(state.dtype) for task in chosen]), previous=previous)
    found = _aligned(found, previous, settings)
    bases = dict(zip(with_subspace, found, strict=True))
    return [bases.get(place) for place in range(len(tasks))]


def goes_with(task: MatrixTask) -> tuple[object, ...]:
    """Equal for matrices whose bases `new_bases` can compute together."""
    state, grad = task.state, task.grad
    return grad.shape, grad.dtype, grad.device, state.side, state.dtype, state.has_basis, id(task.settings)


def _has_subspace(task: MatrixTask) -> bool:
    grad_square = task.grad_square()
    return grad_square != 0.0 and is_finite(grad_square, task.state.dtype)


def _previous(task: MatrixTask) -> Tensor | None:
    return task.state.basis.to(task.state.dtype) if task.state.has_basis else None


def _solver(state: MatrixState, settings: GroupSettings) -> Callable[..., Tensor]:
    return functools.partial(
        compute_basis,
        rank=settings.rank,
        side=state.side,
        method=settings.subspace,
        strict=settings.chosen_precision == "float32",
        # Moments that are rotated go into whatever basis of the subspace there is.
        ordered=settings.refresh_moments != "rotate",
    )


def _aligned(basis: Tensor, previous: Tensor | None, settings: GroupSettings) -> Tensor:
    return basis if previous is None or settings.subspace == "svd" else align_signs(basis, previous)


def basis_of(grad: Tensor, state: MatrixState, settings: GroupSettings, previous: Tensor | None) -> Tensor:
    """The basis of a gradient, its columns turned to the sides of the old one's.

    The exact decomposition keeps the signs that LAPACK gives, as the released code does. A matrix on a GPU whose solver
    fails, or has no memory left, is decomposed on the CPU.

    Args:
        grad: G, (m, n), finite and not zero.
        state: says side and dtype.
        settings: of the param group.
        previous: the basis before, (d, r); None where there is none or nothing needs it.

    Raises:
        RuntimeError: the decomposition failed, see `solver_failed`.
    """
    compute = _solver(state, settings)
    basis, reason = None, ""
    try:
        basis = compute(grad.to(state.dtype), previous=previous)
    except RuntimeError as error:
        if grad.device.type == "cpu" or not solver_failed(error):
            raise
        reason = str(error).partition("\n")[0]
    # Not in the handler, whose traceback holds what the attempt has allocated.
    if basis is None:
        _tell_of_the_cpu(grad.device, reason)
        start = None if previous is None else previous.cpu()
        found = compute(grad.cpu().to(state.dtype), previous=start)
        basis = grad.new_empty(found.shape, dtype=found.dtype).copy_(found)
    return _aligned(basis, previous, settings)


def solver_failed(error: RuntimeError) -> bool:
    """Whether an error says that a matrix could not be decomposed, or that there was no memory to do it.

    torch raises `LinAlgError` where a method did not converge and `OutOfMemoryError` on a GPU, but for failures inside
    cuSOLVER and cuBLAS, and for a CPU without memory, a plain RuntimeError.
    """
    if isinstance(error, torch.linalg.LinAlgError | torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and any(sign in str(error).lower() for sign in _SOLVER_SIGNS)


def _tell_of_the_cpu(device: torch.device, reason: str) -> None:
    """Once in a process and for a device."""
    if device not in _told:
        _told.add(device)
        warnings.warn(
            f"a matrix could not be decomposed on {device} ({reason}); the CPU does it, now and wherever it happens "
            "again, more slowly. Where the GPU's memory ran out, subspace = 'randomized' takes the least.",
            stacklevel=3,
        )


def adopt_basis(task: MatrixTask, basis: Tensor) -> None:
    """Take a new basis for one matrix; see `take_basis`.

    Args:
        task: one matrix.
        basis: P in the state's dtype, as `basis_of` gives it.
    """
    state, settings = task.state, task.settings
    change = basis_change(basis, state.basis.to(state.dtype) if state.has_basis else None, state, settings)
    take_basis(state, settings, basis, change)


def take_basis(state: MatrixState, settings: GroupSettings, basis: Tensor, change: Tensor | None) -> None:
    """Take a new basis, and bring moments and limiter over from the old one; the refresh is done.

    Args:
        state: of one matrix, or of a part of it.
        settings: of the param group.
        basis: P, or the part of it that the state holds.
        change: as `basis_change`.
    """
    change_moments(state, settings, change)
    if state.has_basis and settings.refresh_limiter == "reset" and state.residual_norm is not None:
        state.residual_norm.zero_()  # no history
    state.basis.copy_(basis)
    state.refresh_step.copy_(state.step)


def draw_basis(task: MatrixTask) -> bool:
    """Take a drawn basis for one matrix; False for a gradient that is zero or not finite, and it stays due."""
    if not _has_subspace(task):
        return False
    take_drawn_basis(task.state, task.settings)
    return True


def take_drawn_basis(state: MatrixState, settings: GroupSettings) -> None:
    """Draw by this step's number from now on: nothing is computed or stored, and moments are kept.

    Args:
        state: of one matrix, or of a part of it.
        settings: of the param group.
    """
    change = None
    if awaits_basis(state):
        change = state.drawn.draw(int(state.step), None, state.dtype, state.basis.device).t()
    take_basis(state, settings, state.basis, change)


def basis_change(basis: Tensor, previous: Tensor | None, state: MatrixState, settings: GroupSettings) -> Tensor | None:
    """C = P_new' P_old, (r, r), where `refresh_moments` needs it; P_new' where moments of G wait for it; else None.

    Args:
        basis: the new one, whole.
        previous: the basis before; None where there is none, or nothing needs it.
        state: of the matrix, or of a part of it.
        settings: of the param group.
    """
    if awaits_basis(state):
        return basis.t()
    if settings.refresh_moments != "rotate" or previous is None:
        return None
    with matmul_precision("float32"):
        return basis.t() @ previous


def change_moments(state: MatrixState, settings: GroupSettings, change: Tensor | None) -> None:
    """Bring the moments from the old basis to the new one as `refresh_moments` says; those of G to the first one.

    Args:
        state: of one matrix, or of some columns (left) or rows (right) of R; its moments, if it has any, change.
        settings: of the param group.
        change: as `basis_change`.
    """
    awaits = awaits_basis(state)
    if not any(state.moments.values()) or not (awaits or (state.has_basis and settings.refresh_moments != "keep")):
        return
    kinds = settings.state_kinds
    moments = {name: quantization.read(stored, state.dtype) for name, stored in state.moments.items()}
    for name, moment in moments.items():
        if not awaits and (settings.refresh_moments == "reset" or kinds[name] == "reset"):
            moment.zero_()
            continue
        before = state.unprojected[name].to(state.dtype) if awaits else moment
        moment.copy_(changed_moment(before, change.square() if kinds[name] == "second" else change, state.side))
    store(state.moments, moments, state.step)


def awaits_basis(state: MatrixState) -> bool:
    """Whether moments of G wait for the first basis of a matrix, to be projected on it."""
    return bool(state.unprojected) and not state.has_basis
