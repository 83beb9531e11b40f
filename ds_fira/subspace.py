"""The subspace of one matrix: which side is projected, when its basis is due, and how it is computed.

Letters: G is m x n, r = min(rank, m, n). Left: the basis P is m x r and R = P'G is r x n. Right: P is n x r and
R = GP is m x r. P has orthonormal columns on either side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]


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


def basis_shape(shape: tuple[int, int], rank: int, side: Side) -> tuple[int, int]:
    """Shape of the basis P: (m, r) on the left, (n, r) on the right."""
    return (shape[0] if side == "left" else shape[1], effective_rank(shape, rank))


def low_rank_shape(shape: tuple[int, int], rank: int, side: Side) -> tuple[int, int]:
    """Shape of R and of both moments: (r, n) on the left, (m, r) on the right."""
    r = effective_rank(shape, rank)
    return (r, shape[1]) if side == "left" else (shape[0], r)


def refresh_due(step: int, refresh_step: int, update_proj_gap: int) -> bool:
    """Whether a matrix needs a new basis before its next step.

    A refresh belongs to every step count that is a multiple of the gap, as in the released code (and line 4 of
    Algorithm 1). One that could not be done there, for want of a usable gradient, stays due until it is done, and the
    ones after it keep to the multiples.

    Args:
        step: steps the matrix has made.
        refresh_step: `step` at its last refresh, -1 before the first.
        update_proj_gap: steps from one refresh to the next.
    """
    return refresh_step < 0 or step // update_proj_gap > refresh_step // update_proj_gap


def compute_basis(grad: Tensor, rank: int, side: Side, method: str) -> Tensor:
    """The basis of the dominant subspace of a gradient (line 5 of Algorithm 1).

    Args:
        grad: (m, n), finite.
        rank: the rank asked for; r = min(rank, m, n) columns come back.
        side: "left" for the left singular vectors, "right" for the right ones.
        method: "svd", the exact decomposition, called as the released code calls it, so that the signs agree.

    Returns:
        (m, r) or (n, r) in float32 (float64 for a float64 gradient), contiguous, orthonormal columns.

    Raises:
        torch.linalg.LinAlgError: the decomposition did not converge or is not finite.
    """
    assert method == "svd", method
    r = effective_rank((grad.shape[0], grad.shape[1]), rank)
    matrix = grad if grad.dtype == torch.float64 else grad.float()
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    basis = u[:, :r].contiguous() if side == "left" else vh[:r].t().contiguous()
    if not torch.isfinite(basis).all():
        raise torch.linalg.LinAlgError("the singular value decomposition gave values that are not finite")
    return basis
