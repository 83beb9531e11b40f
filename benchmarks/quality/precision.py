"""What the precision of the matrix products does to an update and to the limiter, against float64.

    python -m benchmarks.quality.precision [--models 60m 350m] [--json FILE]

One step of a matrix whose subspace and moments are those of a few steps before, for each `matmul_precision`: the error
of the weight change, of the residual norm |S| that the limiter compares, and of the captured energy, all relative to
the same step in float64. All but float32 is emulated: operands rounded to 10 bits of mantissa, or 7 for bfloat16,
products and sums in float32. Tensor cores by themselves cut TF32 operands off, which "tf32, cut" shows; the kernels
round them before.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import default_device, device_name, save
from benchmarks.communication.partition import LLAMAS, llama_shapes
from ds_fira.core import functional as F
from ds_fira.core.norms import squared_norms
from ds_fira.core.subspace import compute_basis, projection_side

# Bits of mantissa that the operands of a product keep, and whether the others are rounded or cut off.
OPERANDS = {"float32": (23, "rounded"), "tf32": (10, "rounded"), "tf32, cut": (10, "cut"), "bfloat16": (7, "rounded")}
BETAS, EPS, ALPHA, LR = (0.9, 0.999), 1e-6, 0.25, 0.01
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rounded(tensor: Tensor, bits: int, how: str = "rounded") -> Tensor:
    """Float32 elements with `bits` bits of mantissa, rounded to the nearest or "cut" off."""
    if bits == 23:
        return tensor
    lost = 23 - bits
    raw = tensor.contiguous().view(torch.int32)
    if how == "rounded":
        raw = raw + (2 ** (lost - 1) - 1) + ((raw >> lost) & 1)
    return (raw >> lost << lost).view(torch.float32)


def step(
    grads: list[Tensor], basis: Tensor, kept_bits: tuple[int, str], dtype: torch.dtype, side: str
) -> dict[str, Tensor]:
    """The last of some steps with one basis: weight change, |S|^2 and captured energy."""
    kept = basis.to(dtype)
    exp_avg = exp_avg_sq = torch.zeros(())
    for count, gradient in enumerate(grads, 1):
        grad = gradient.to(dtype)
        operand = kept if dtype == torch.float64 else rounded(kept, *kept_bits)
        sent = grad if dtype == torch.float64 else rounded(grad, *kept_bits)
        low_rank = operand.t() @ sent if side == "left" else sent @ operand
        if count == 1:
            exp_avg, exp_avg_sq = torch.zeros_like(low_rank), torch.zeros_like(low_rank)
        direction, direction_sq, low_rank_sq = F.adam_direction_(
            low_rank, exp_avg, exp_avg_sq, betas=BETAS, eps=EPS, side=side
        )
    grad_sq = squared_norms(grad, side)
    phi = F.scaling_factors(direction_sq, low_rank_sq, "column")
    square = F.difference_of_squares(*((phi.square() * sq).sum(-1) for sq in (grad_sq, low_rank_sq)), ALPHA)
    scale = phi.to(dtype)
    across = scale.unsqueeze(0 if side == "left" else 1)
    carried = ALPHA * (direction - low_rank * across)
    if dtype != torch.float64:
        operand, carried = rounded(kept, *kept_bits), rounded(carried, *kept_bits)
    change = grad * across + (operand @ carried if side == "left" else carried @ operand.t())
    return {"change": change, "square": square, "energy": low_rank_sq.sum() / grad_sq.sum()}


def compare(shape: tuple[int, int], rank: int, grad_dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """Errors of every precision for one shape; gradients share a decaying spectrum, as real ones do, and drift."""
    generator = torch.Generator(device).manual_seed(0)
    side = projection_side(shape, "std", "released")
    m, n = shape
    inner = min(m, n)
    left, right = (torch.randn(size, inner, generator=generator, device=device) for size in (m, n))
    spectrum = torch.arange(1, inner + 1, device=device) ** -0.7
    common = (left * spectrum) @ right.t()
    noise = common.norm() / (m * n) ** 0.5
    grads = [common + noise * torch.randn(shape, generator=generator, device=device) for _ in range(5)]
    grads = [grad.to(grad_dtype).float() for grad in grads]
    basis = compute_basis(grads[0], rank, side, "gram")
    exact = step(grads, basis, OPERANDS["float32"], torch.float64, side)
    rows = []
    for precision, kept_bits in OPERANDS.items():
        found = step(grads, basis, kept_bits, torch.float32, side)
        rows.append(
            {
                "shape": shape,
                "rank": rank,
                "gradient": str(grad_dtype).removeprefix("torch."),
                "matmul_precision": precision,
                "update_error": float((found["change"] - exact["change"]).norm() / exact["change"].norm()),
                "residual_norm_error": float((found["square"] / exact["square"]).sqrt() - 1.0),
                "energy_error": float(found["energy"] / exact["energy"] - 1.0),
            }
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["60m", "350m"], choices=list(LLAMAS))
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    device = default_device()
    print(device_name(device))
    print(f"{'shape':>14}{'rank':>6}{'gradient':>10}{'precision':>11}{'update':>10}{'|S|':>11}{'energy':>11}")
    rows = []
    for model in args.models:
        for shape in llama_shapes(model):
            for grad_dtype in DTYPES.values():
                found = compare(shape, LLAMAS[model][4], grad_dtype, device)
                rows += found
                for row in found:
                    print(
                        f"{shape[0]:>8} x{shape[1]:>5}{row['rank']:>5}{row['gradient']:>10}"
                        f"{row['matmul_precision']:>11}"
                        f"{row['update_error']:>10.1e}{row['residual_norm_error']:>11.1e}{row['energy_error']:>11.1e}"
                    )
    save(args.json, device, rows=rows)


if __name__ == "__main__":
    main()
