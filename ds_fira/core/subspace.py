"""The subspace of one matrix: which side is projected, when its basis is due, and how it is computed.

Letters: G is m x n, r = min(rank, m, n). Left: the basis P is m x r and R = P'G is r x n. Right: P is n x r and
R = GP is m x r. P has orthonormal columns on either side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ds_fira.core.precision import matmul_precision
from ds_fira.core.subspace_solvers import gram_basis, randomized_basis

Side = Literal["left", "right"]
GOLDEN_RATIO = (1.0 + 5.0**0.5) / 2.0


def projection_side(shape: tuple[int, int], proj_type: str, formulation: str) -> Side:
    """The side on which a matrix is projected.

    Args:
        shape: (m, n).
        proj_type: "std" projects the smaller side, "reverse_std" the larger, "left" and "right" say it.
        formulation: decides the tie m = n: the released code projects it from the right, Algorithm 1 of the paper
            (which assumes m <= n) from the left.
    """
    if proj_type == "left" or proj_type == "right":
        return proj_type
    m, n = shape
    left = m < n or (m == n and formulation == "paper")
    if proj_type == "reverse_std":
        left = not left
    return "left" if left else "right"


def effective_rank(shape: tuple[int, int], rank: int) -> int:
    """The rank r that a matrix of `shape` can have: min(rank, m, n)."""
    return min(rank, *shape)


def basis_shape(shape: tuple[int, int], rank: int, side: Side, drawn: bool = False) -> tuple[int, int]:
    """Shape of the basis P: (m, r) on the left, (n, r) on the right; as a state (0, r) where it is drawn."""
    return (0 if drawn else shape[0] if side == "left" else shape[1], effective_rank(shape, rank))


def low_rank_shape(shape: tuple[int, int], rank: int, side: Side) -> tuple[int, int]:
    """Shape of R and of both moments: (r, n) on the left, (m, r) on the right."""
    r = effective_rank(shape, rank)
    return (r, shape[1]) if side == "left" else (shape[0], r)


def refresh_due(step: int, refresh_step: int, update_proj_gap: int, offset: int = 0) -> bool:
    """Whether a matrix needs a new basis before its next step.

    A refresh belongs to the first step and, at offset 0, to every step count that is a multiple of the gap, as in the
    released code (and line 4 of Algorithm 1); at another offset, to every multiple plus it. One that could not be done
    there, for want of a usable gradient, stays due until it is done; the ones after it keep to their places.

    Args:
        step: steps the matrix has made.
        refresh_step: `step` at its last refresh, -1 before the first.
        update_proj_gap: steps from one refresh to the next.
        offset: steps by which the refreshes after the first are shifted, from 0 up to the gap.
    """
    if refresh_step < 0:
        return True
    return (step - offset) // update_proj_gap > (refresh_step - offset) // update_proj_gap


def refresh_offset(index: int, update_proj_gap: int) -> int:
    """An offset for `refresh_due` that spreads the refreshes of a model's matrices over the gap.

    Multiples of the golden ratio modulo 1: of the first N indices no two are nearer than about 1 / (sqrt(5) N) of the
    gap, so the matrices of one rank, whichever they are, do not fall on the same steps while there are fewer of them
    than steps to spread over.

    Args:
        index: the matrix's place in the model, from 0; the same on every rank.
        update_proj_gap: steps from one refresh to the next.
    """
    return int(index * GOLDEN_RATIO % 1.0 * update_proj_gap)


@matmul_precision("float32")
def compute_basis(
    grad: Tensor,
    rank: int,
    side: Side,
    method: str,
    previous: Tensor | None = None,
    strict: bool = False,
    ordered: bool = True,
) -> Tensor:
    """The basis of the dominant subspace of a gradient (line 5 of Algorithm 1), or of k of one shape at once.

    Its products are in float32 whatever the user has set for the model's (TF32 would leave columns orthonormal to 3e-4
    only), but for those that "randomized" makes in bfloat16 on purpose.

    Args:
        grad: (m, n) or (k, m, n), finite and not zero.
        rank: the rank asked for; r = min(rank, m, n) columns come back.
        side: "left" for the left singular vectors, "right" for the right ones.
        method: "svd", the exact decomposition, called as the released code calls it, so that the signs agree; "gram",
            the same vectors up to their signs from the Gram matrix of the smaller side; "randomized", an approximate
            subspace by block power iteration.
        previous: the basis in use, of the shape of what is returned, a start for "randomized"; the other methods do
            without.
        strict: whether "randomized" multiplies with the whole gradient in float32 even where the device is faster in
            bfloat16, or with a sketch.
        ordered: whether the columns have to be singular or Ritz vectors. "randomized" is cheaper where any orthonormal
            basis of the subspace will do, as for moments that are rotated, and it has a previous one.

    Returns:
        (m, r) or (n, r), behind k where there are k, in float32 (float64 for a float64 gradient), contiguous,
        orthonormal columns, `ordered` in falling order of their singular or Ritz values.

    Raises:
        torch.linalg.LinAlgError: the decomposition did not converge or is not finite.
    """
    r = effective_rank((grad.shape[-2], grad.shape[-1]), rank)
    matrix = grad if grad.dtype == torch.float64 else grad.float()
    if method == "svd":
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        basis = u[..., :r].contiguous() if side == "left" else vh[..., :r, :].mT.contiguous()
    elif method == "gram":
        basis = gram_basis(matrix if side == "left" else matrix.mT, r)
    elif method == "randomized":
        basis = randomized_basis(matrix if side == "left" else matrix.mT, r, previous, strict, ordered)
    else:
        raise ValueError(f"the method {method!r} is none of 'svd', 'gram', 'randomized'")
    # A sum is finite where all elements are, for they are at most 1.
    if not torch.isfinite(basis.sum()):
        raise torch.linalg.LinAlgError("the decomposition gave values that are not finite")
    return basis


def align_signs(basis: Tensor, previous: Tensor) -> Tensor:
    """The basis with every column turned to the side of the previous basis' column of the same place.

    A singular vector has no sign of its own. Moments that are kept over a refresh belong to the places of the columns,
    and a turned column would meet a first moment of the opposite sign.

    Args:
        basis: (d, r), a new basis, or (k, d, r).
        previous: of the same shape, the one in use.

    Returns:
        Equal to `basis` up to the signs of its columns.
    """
    overlap = (basis * previous).sum(dim=-2, keepdim=True)
    return basis * torch.where(overlap < 0, -1.0, 1.0).to(basis.dtype)


@matmul_precision("float32")
def changed_moment(moment: Tensor, change: Tensor, side: Side) -> Tensor:
    """Carry one moment of R over to a new basis: C M on the left, M C' on the right.

    The first moment is linear in the gradient and goes with C = P_new' P_old, exact for the part of it that lies in the
    new subspace. The second goes with C * C, as if the rows of R were uncorrelated, and is never negative. A moment of
    G itself goes with C = P_new', as if its basis had been the identity.

    Args:
        moment: M or V, or some columns of it on the left, some rows on the right.
        change: C or C * C, (r, r), of a moment of G (r, m) on the left and (r, n) on the right.
        side: the projected side.
    """
    return change @ moment if side == "left" else moment @ change.t()
