"""The kernels of a step as calls of one matrix size, with what each has to move and to multiply, and cuBLAS's equal.

A kernel that `ds_fira.core.kernels` has and this table lacks is recorded as such.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_fira.core import kernels, quantization
from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.precision import matmul_precision, negligible_ratio
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import allocate, matrix_states
from ds_fira.core.step import MatrixTask
from ds_fira.core.subspace import Side, projection_side

BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class KernelCase:
    """One kernel at one size.

    Attributes:
        name: of the function in `ds_fira.core.kernels`.
        call: launches it.
        moved: bytes that it has to read and write, each tensor once.
        operations: of its products.
        tiled: whether its tiles depend on the precision of the products.
        ranked: whether a rank makes a difference, and a side; AdamW knows neither.
        peer: what torch has for the same, None where it has nothing.
        peer_name: of that.
    """

    name: str
    call: Callable[[], object]
    moved: float
    operations: float = 0.0
    tiled: bool = True
    ranked: bool = True
    peer: Callable[[], object] | None = None
    peer_name: str = ""


@dataclass(frozen=True)
class Operands:
    """What the kernels of a batch of k matrices take, float32; see `ds_fira.core.step` for the letters."""

    weight: Tensor
    grad: Tensor
    basis: Tensor
    low_rank: Tensor
    moments: tuple[Tensor, Tensor]
    phi: Tensor
    finite: Tensor
    side: Side

    @classmethod
    def random(cls, count: int, shape: tuple[int, int], rank: int, device: torch.device) -> Operands:
        """Random numbers of the size that a training has."""
        (m, n), side = shape, projection_side(shape, "std", "released")
        left = side == "left"
        make = lambda *size: torch.randn(count, *size, device=device)  # noqa: E731
        low_rank = make(rank, n) if left else make(m, rank)
        return cls(
            weight=make(m, n) * 0.02,
            grad=make(m, n),
            basis=make(m if left else n, rank) / (m if left else n) ** 0.5,
            low_rank=low_rank,
            moments=(torch.zeros_like(low_rank), torch.zeros_like(low_rank)),
            phi=torch.full((count, n if left else m), 1e-6, device=device),
            finite=torch.ones(count, dtype=torch.bool, device=device),
            side=side,
        )

    def tasks(self, precision: str) -> list[MatrixTask]:
        """The step of all k, a learning rate at which W stays as it is however often it is made."""
        count, *shape = self.weight.shape
        group = GroupSettings(rank=self.basis.shape[-1], proj_type=self.side, matmul_precision=precision, lr=1e-9)
        shapes = [(shape[0], shape[1])] * count
        state = allocate(self.weight, shapes, group, batched=True)
        states = matrix_states(state, shapes, group, True, FIRA_ADAM, dtype=torch.float32)
        for place, each in enumerate(states):
            each.basis.copy_(self.basis[place])
        matrices = zip(self.weight, self.grad, states, strict=True)
        ratio = negligible_ratio(self.grad.dtype, group.matmul_precision)
        return [MatrixTask(*each, group, ratio) for each in matrices]

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of the product that goes back into W, small enough that W stays as it is however often it is made."""
        small, basis = (self.low_rank * 1e-9).to(dtype), self.basis.to(dtype)
        return (basis, small) if self.side == "left" else (small, basis.mT)


def cases(of: Operands, precision: str) -> Iterator[KernelCase]:
    """Every kernel of the table on these operands, products in `precision`."""
    full, low = of.grad.nbytes, of.low_rank.nbytes
    operations = 2.0 * of.grad.numel() * of.basis.shape[-1]
    # P and C as a step hands them over: rounded once where products are in bfloat16.
    half = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left, right = of.factors(half)
    basis, grad, low_rank = (tensor.to(half) for tensor in (of.basis, of.grad, of.low_rank))
    carried, cast = low_rank.nbytes, of.basis.nbytes + basis.nbytes if half == torch.bfloat16 else 0
    turned = basis.mT if of.side == "left" else None

    @matmul_precision("tf32" if precision == "bfloat16" else precision)
    def cublas_project() -> Tensor:
        return grad @ basis if turned is None else turned @ grad

    @matmul_precision("tf32" if precision == "bfloat16" else precision)
    def cublas_back() -> Tensor:
        return basis @ low_rank if turned is not None else low_rank @ basis.mT

    yield KernelCase(
        "project",
        lambda: kernels.project(of.grad, basis, of.side, precision),
        full + low + basis.nbytes,
        operations,
        peer=cublas_project,
        peer_name="cuBLAS bmm, without the norms",
    )
    yield KernelCase(
        "apply_update_",
        lambda: kernels.apply_update_(
            of.weight,
            of.grad,
            left,
            right,
            of.phi,
            by_row=of.side == "right",
            decay_factor=1.0,
            grad_finite=of.finite,
            precision=precision,
        ),
        3 * full + carried + basis.nbytes,
        operations,
        peer=cublas_back,
        peer_name="cuBLAS bmm, without G and W",
    )
    yield KernelCase(
        "residual_square",
        lambda: kernels.residual_square(
            of.grad, basis, of.low_rank, of.phi, side=of.side, alpha=1.0, needed=of.finite, precision=precision
        ),
        full + low + basis.nbytes,
        operations,
        peer=cublas_back,
        peer_name="cuBLAS bmm, without G",
    )
    tasks = of.tasks(precision)
    yield KernelCase(
        "step_together",
        lambda: kernels.step_together(tasks),
        # G in both products, R, M, V and N, C written and read, the basis in both.
        4 * full + 9 * low + 2 * carried + 2 * basis.nbytes + cast,
        2 * operations,
    )


def elementwise(of: Operands) -> Iterator[KernelCase]:
    """The kernels without a product."""
    yield KernelCase(
        "adam_direction_",
        lambda: kernels.adam_direction_(
            of.low_rank, *of.moments, betas=BETAS, eps=1e-6, side=of.side, grad_finite=of.finite
        ),
        6.0 * of.low_rank.nbytes,
        tiled=False,
    )
    flat, grad = of.weight.view(-1), of.grad.view(-1)
    moments = torch.zeros_like(flat), torch.zeros_like(flat)
    options: dict[str, Any] = {"step": 1, "lr": 1e-9, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.0}

    @functools.cache
    def fused() -> torch.optim.Optimizer:
        param = torch.nn.Parameter(flat)
        param.grad = grad
        return torch.optim.AdamW([param], lr=1e-9, fused=True)

    yield KernelCase(
        "adamw_",
        lambda: kernels.adamw_(flat, grad, *moments, **options),
        7.0 * flat.nbytes,
        tiled=False,
        ranked=False,
        peer=lambda: fused().step(),
        peer_name="fused AdamW",
    )
    like: dict[str, Any] = {"dtype": torch.float32, "device": flat.device}
    first, second = (quantization.allocate(flat.shape, (), "int8", signed=signed, **like) for signed in (True, False))
    coded = sum(part.nbytes for stored in (first, second) for part in stored.values())
    yield KernelCase(
        "adamw_together_",
        lambda: kernels.adamw_together_([(flat, grad, first, second)], **options),
        3.0 * flat.nbytes + 2.0 * coded,
        tiled=False,
        ranked=False,
        peer=lambda: fused().step(),
        peer_name="fused AdamW, moments in float32",
    )


def others(found: set[str]) -> list[str]:
    """Public kernels that the table has no case of."""
    helpers = {"Choice", "chosen", "fault", "interpret_on_cpu", "supports", "switched"}
    return sorted(set(kernels.__all__) - helpers - found)
