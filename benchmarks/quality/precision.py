"""What the precision of the matrix products does to an update and to the limiter, against float64.

    python -m benchmarks.quality.precision [--models 60m 350m] [--json FILE]
    python -m benchmarks.quality.precision --folder FOLDER [--models 60m 1b]     # on gradients of real training

One step of a matrix whose subspace and moments are those of a few steps before, for each `matmul_precision`: the error
of R, of the residual S, of the weight change, of the residual norm |S| that the limiter compares, and of the captured
energy, all relative to the same step in float64. All but float32 is emulated: operands rounded to 10 bits of mantissa,
or 7 for bfloat16, products and sums in float32; P and C are rounded to bfloat16 in memory, to the same numbers. Tensor
cores by themselves cut TF32 operands off, which "tf32, cut" shows; the kernels round them before. Real gradients are
those of `benchmarks.quality.gradients`, made in FOLDER where they are missing.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

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


@contextlib.contextmanager
def emulated(operands: str) -> Iterator[None]:
    """Let the products of a step on one process take operands with the bits of `OPERANDS[operands]`.

    The functions of `ds_fira.core.functional` are replaced; kernels and the refresh are as they were.
    """
    project, residual_square, apply = F.project, F.residual_square, F.apply_update_

    def cut(tensor: Tensor) -> Tensor:
        return rounded(tensor.float(), *OPERANDS[operands])

    def rounded_project(grad: Tensor, basis: Tensor, side: Any, precision: str) -> tuple[Tensor, Tensor]:
        return project(cut(grad), cut(basis), side, "float32")[0], squared_norms(grad.float(), side)

    def rounded_square(grad: Tensor, basis: Tensor, low_rank: Tensor, phi: Tensor, **options: Any) -> Tensor:
        return residual_square(grad, cut(basis), cut(low_rank), phi, **{**options, "precision": "float32"})

    def rounded_update_(weight: Tensor, grad: Tensor, left: Tensor, right: Tensor, *rest: Any, **options: Any) -> None:
        # The kernels round C with its step size, which the host leaves to the product.
        size, of_residual = options.pop("step_sizes", (1.0, 1.0))
        left, right = (left * size, right) if options["by_row"] else (left, right * size)
        options |= {"precision": "float32", "step_sizes": (1.0, of_residual)}
        apply(weight, grad, cut(left), cut(right), *rest, **options)

    with (
        mock.patch.object(F, "project", rounded_project),
        mock.patch.object(F, "residual_square", rounded_square),
        mock.patch.object(F, "apply_update_", rounded_update_),
    ):
        yield


def step(
    grads: list[Tensor], basis: Tensor, kept_bits: tuple[int, str], dtype: torch.dtype, side: str
) -> dict[str, Tensor]:
    """The last of some steps with one basis: R, S, weight change, |S|^2 and captured energy."""
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

    def back(inner: Tensor) -> Tensor:
        inner = inner if dtype == torch.float64 else rounded(inner, *kept_bits)
        return operand @ inner if side == "left" else inner @ operand.t()

    # As kernels have it, S is never formed but for C, whose product holds all of it that is not phi * G.
    change = grad * across + back(ALPHA * (direction - low_rank * across))
    residual = grad * across - back(ALPHA * low_rank * across)
    energy = low_rank_sq.sum() / grad_sq.sum()
    return {"R": low_rank, "S": residual, "change": change, "square": square, "energy": energy}


def synthetic(shape: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Gradients that share a decaying spectrum, as real ones do, and drift."""
    generator = torch.Generator(device).manual_seed(0)
    m, n = shape
    inner = min(m, n)
    left, right = (torch.randn(size, inner, generator=generator, device=device) for size in (m, n))
    spectrum = torch.arange(1, inner + 1, device=device) ** -0.7
    common = (left * spectrum) @ right.t()
    noise = common.norm() / (m * n) ** 0.5
    return [common + noise * torch.randn(shape, generator=generator, device=device) for _ in range(5)]


def compare(grads: list[Tensor], rank: int, grad_dtype: torch.dtype) -> list[dict[str, Any]]:
    """Errors of every precision for one matrix, whose basis is that of the first of its gradients."""
    shape = (grads[0].shape[0], grads[0].shape[1])
    side = projection_side(shape, "std", "released")
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
                "low_rank_error": float((found["R"] - exact["R"]).norm() / exact["R"].norm()),
                "residual_error": float((found["S"] - exact["S"]).norm() / exact["S"].norm()),
                "update_error": float((found["change"] - exact["change"]).norm() / exact["change"].norm()),
                "residual_norm_error": float((found["square"] / exact["square"]).sqrt() - 1.0),
                "energy_error": float(found["energy"] / exact["energy"] - 1.0),
            }
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(LLAMAS), help="60m 350m, or 60m of real gradients")
    parser.add_argument("--folder", type=Path, help="where gradients of real training are kept, or made")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    device = default_device()
    print(device_name(device))
    print(
        f"{'shape':>14}{'rank':>6}{'gradient':>10}{'precision':>11}{'R':>10}{'S':>10}{'update':>10}{'|S|':>11}{'energy':>11}"
    )
    rows = []
    for model in args.models or (["60m"] if args.folder else ["60m", "350m"]):
        for name, grads in matrices(model, args.folder, device):
            for grad_dtype in DTYPES.values():
                found = [{"matrix": name, **row} for row in compare(grads, LLAMAS[model][4], grad_dtype)]
                rows += found
                for row in found:
                    m, n = row["shape"]
                    errors = "".join(
                        f"{row[key]:>10.1e}" for key in ("low_rank_error", "residual_error", "update_error")
                    )
                    print(
                        f"{m:>8} x{n:>5}{row['rank']:>5}{row['gradient']:>10}{row['matmul_precision']:>11}{errors}"
                        f"{row['residual_norm_error']:>11.1e}{row['energy_error']:>11.1e}  {name}",
                        flush=True,
                    )
    save(args.json, device, rows=rows)


def matrices(model: str, folder: Path | None, device: torch.device) -> Iterator[tuple[str, list[Tensor]]]:
    """Gradients of every shape of a model, or of weights that were trained, in the order of their steps."""
    if folder is None:
        yield from (("", synthetic(shape, device)) for shape in llama_shapes(model))
        return
    from benchmarks.quality.gradients import snapshots

    kept = snapshots(model, folder)
    steps = sorted(kept)
    yield from ((name, [kept[step][name].to(device) for step in steps]) for name in kept[steps[0]])


if __name__ == "__main__":
    main()
