"""Matrices of known singular values, and how good a basis of one is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ds_fira.core.subspace import (
    basis_shape,
)

SIDES = ["left", "right"]


ORTHONORMAL = 1e-5


def gradient(shape: tuple[int, int], decay: float = 0.97, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix of known singular values decay^j, formed in float64."""
    generator = torch.Generator().manual_seed(seed)
    small = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(size, small, generator=generator, dtype=torch.float64))[0] for size in shape
    )
    values = decay ** torch.arange(small, dtype=torch.float64)
    return ((left * values) @ right.t()).to(dtype)


def relative_energy(grad: Tensor, basis: Tensor, side: str) -> float:
    """|P'G|^2 over the sum of the top r squared singular values, by numpy in float64."""
    g, p = grad.double().numpy(), basis.double().numpy()
    g = g / np.abs(g).max()
    values = np.linalg.svd(g, compute_uv=False)[: p.shape[1]]
    return float(np.square(p.T @ g if side == "left" else g @ p).sum() / np.square(values).sum())


def orthonormality(basis: Tensor) -> float:
    """The largest element of |P'P - I|."""
    p = basis.double()
    return float((p.t() @ p - torch.eye(p.shape[1], dtype=torch.float64)).abs().max())


def random_basis(shape: tuple[int, int], rank: int, side: str, seed: int = 7) -> Tensor:
    rows, columns = basis_shape(shape, rank, side)
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))[0]
