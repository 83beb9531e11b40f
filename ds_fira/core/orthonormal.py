"""Orthonormal rows of the same span, by Cholesky-QR: products and a small factor in place of Householder reflections.

Every function takes a block of w rows of length s, (w, s), or k blocks, (k, w, s), that are treated each for itself.
Everything is in the block's own dtype, which is float32 at least: here orthogonality is made, and bfloat16 would leave
it at 1e-2.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Off-diagonal elements that one Cholesky pass may leave in all; rounding alone leaves about a tenth of it.
ORTHONORMAL = 5e-6
# Off-diagonal elements that the first Cholesky pass may leave for the second to remove.
LOST_ORTHOGONALITY = 1e-2


# On a CPU a Gram matrix is built in strips of so many rows, up to the diagonal alone.
STRIP = 128


def spread(rows: Tensor) -> Tensor:
    """Rows of the same span, roughly orthonormal: one pass of shifted Cholesky-QR, which cannot break down.

    Between two products the rows only have to stay apart. The shift (Fukaya et al., SIAM J. Sci. Comput. 42, 2020)
    bounds how much a direction that is lost in rounding is blown up.
    """
    columns = rows.mT.contiguous()
    gram, norms = _unit_gram(columns)
    gram.diagonal(dim1=-2, dim2=-1).add_(rows.shape[-2] * torch.finfo(rows.dtype).eps)
    return _solve(gram, columns * norms).mT


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows of the same span: Cholesky-QR once or twice, or Householder where that broke down.

    Householder gives orthonormal rows of any block, a rank-deficient one too. Its signs are made those of the
    Cholesky way, a positive diagonal of R. The host waits for the device once, to learn which blocks need it.

    Args:
        rows: (w, s) or (k, w, s) with w <= s, finite.

    Returns:
        Of the same shape, its transpose contiguous; |QQ' - I| is at most 1e-5 in every element in float32, 1e-13 in
        float64.
    """
    columns = rows.mT.contiguous()
    gram, norms = _unit_gram(columns)
    result = _solve(gram, columns * norms)
    gram = _lower_gram(result)
    off = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).tril().abs().amax(dim=(-2, -1))
    lost = off.flatten().tolist()
    sound = [value for value in lost if value < LOST_ORTHOGONALITY]
    if sound and (max(sound) > ORTHONORMAL or rows.dtype == torch.float64):
        result = _solve(gram, result)
    blocks, found = (tensor.view(-1, *columns.shape[-2:]) for tensor in (columns, result))
    for place, value in enumerate(lost):
        # Not `>=`, for a block whose factor does not exist has lost NaN.
        if not value < LOST_ORTHOGONALITY:
            found[place] = _householder(blocks[place])
    return result.mT


def _householder(columns: Tensor) -> Tensor:
    q, triangle = torch.linalg.qr(columns)
    return q * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(q.dtype)


def _unit_gram(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of the normalized columns, its lower triangle, and their inverse norms, (..., 1, w).

    Normalized, columns of small norm keep their digits.
    """
    gram = _lower_gram(columns)
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(columns.dtype).tiny).rsqrt().unsqueeze(-2)
    return gram.mul_(norms).mul_(norms.mT), norms


def _lower_gram(columns: Tensor) -> Tensor:
    """Y'Y, (..., w, w), of which only the lower triangle has to be read."""
    if columns.device.type != "cpu" or columns.ndim > 2:
        return columns.mT @ columns
    gram = columns.new_zeros(columns.shape[1], columns.shape[1])
    for top in range(0, columns.shape[1], STRIP):
        end = top + STRIP
        gram[top:end, :end].addmm_(columns[:, top:end].t(), columns[:, :end])
    return gram


def _solve(gram: Tensor, columns: Tensor) -> Tensor:
    """Y L'^-1 for the Cholesky factor L of a Gram matrix; not finite where that does not exist."""
    factor, _ = torch.linalg.cholesky_ex(gram)
    # From the right, on rows as they lie: MKL takes half the time that it takes for L^-1 Y'.
    return torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
