"""What the precision of the products leaves of a residual that is none, and the share below which it is not history."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.quality.precision import OPERANDS, rounded
from ds_fira import FiraAdam
from ds_fira.core.precision import NEGLIGIBLE_RESIDUAL, negligible_ratio


def gradient_in_the_subspace() -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient of rank 16, of a falling spectrum, and the basis of its columns."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(96, 16, generator=generator)).Q.contiguous()
    inside = torch.randn(16, 200, generator=generator) * torch.arange(1.0, 17.0).unsqueeze(1) ** -0.7
    return basis @ inside, basis


@pytest.mark.parametrize("operands", OPERANDS)
def test_what_products_leave_of_no_residual_is_negligible(operands: str) -> None:
    """Emulated; with operands that are cut too, as torch's own products on a GPU may do."""
    grad, basis = gradient_in_the_subspace()
    p, g = (rounded(tensor, *OPERANDS[operands]) for tensor in (basis, grad))
    low_rank = rounded(p.t() @ g, *OPERANDS[operands])
    noise = float((grad - p @ low_rank).norm() / grad.norm())
    ratio = negligible_ratio(torch.float32, operands.removesuffix(", cut"))
    assert noise < ratio / 1.3
    assert ratio == NEGLIGIBLE_RESIDUAL["float32"] or noise > ratio / 20


def test_gradients_of_low_precision_and_float64_weights() -> None:
    assert negligible_ratio(torch.bfloat16, "tf32") == torch.finfo(torch.bfloat16).eps
    assert negligible_ratio(torch.float64, "bfloat16") == negligible_ratio(torch.float32, "float32")


@pytest.mark.usefixtures("kernels_allowed")
def test_rounding_in_tf32_is_no_history_of_the_limiter() -> None:
    """Kernels that round to TF32 leave 3e-4 of |phi * G|; remembered, that would hold the next real residual back."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grad, _ = gradient_in_the_subspace()
    param = nn.Parameter(torch.zeros(96, 200, device=device))
    optimizer = FiraAdam([param], rank=16, lr=0.01, matmul_precision="tf32")
    param.grad = grad.to(device)
    optimizer.step()
    assert float(optimizer.state[param]["residual_norm"]) == 0.0
