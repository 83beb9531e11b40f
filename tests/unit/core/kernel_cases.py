"""Shapes, tolerances and tensors for the tests of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS = (0.9, 0.999)
# Norm of the error over the norm of the result. A sum of products of d float32 terms is off by about sqrt(d) * 6e-8;
# a factor rounded to tf32 is off by up to 2^-11, one rounded to bfloat16 by up to 2^-9, and errors average out.
PRODUCT = {"float32": 1e-6, "tf32": 1e-3, "bfloat16": 4e-3}
# Sums of squares: float32 within a tile.
SQUARES = 1e-6
# One rounding to the dtype, half a unit in the last place; float32 also computes in it.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# (m, n, r): prime, of several tiles, whole tiles, thinner than the least tile.
SHAPES = [(37, 53, 5), (150, 139, 20), (64, 32, 16), (3, 41, 3)]
# A batch where a program is one matrix, or nearly so, as the interpreter takes its time over each.
CASES = [((), shape) for shape in SHAPES] + [((3,), SHAPES[0]), ((3,), SHAPES[3])]
SIDES = ["left", "right"]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers in `dtype`, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def random_basis(batch: tuple[int, ...], size: int, rank: int) -> Tensor:
    """Orthonormal columns, float32."""
    return torch.linalg.qr(random(*batch, size, rank, seed=1)).Q.contiguous()


def error(result: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of what is exact."""
    return float((result.double() - exact).norm() / exact.norm())


def flag(batch: tuple[int, ...], *values: bool) -> Tensor:
    """One truth value per matrix."""
    return torch.tensor(values if batch else values[0], device=DEVICE)


def copies(*tensors: Tensor) -> list[Tensor]:
    """Clones, for what works in place."""
    return [tensor.clone() for tensor in tensors]
