"""Stage 2: kernels and whole steps at full size against float64, outputs full of NaN before they are written."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.common import seconds
from benchmarks.gpu_check.record import SEED, Check
from benchmarks.gpu_check.warm_up import compile_kernels, jobs
from ds_fira import FiraAdam
from ds_fira.core import functional, kernels
from ds_fira.core.subspace import Side, projection_side

PRECISIONS = ("float32", "tf32", "bfloat16")
# Relative, two to five times what an emulation on a CPU gives (docs/performance.md): of R, of |R|^2 (signed: what no
# sum averages out), of the update and of |S| where the residual is SHARE of |G|^2.
BOUNDS = {
    "error of R": {"float32": 3e-6, "tf32": 3.5e-4, "bfloat16": 4e-3},
    "bias of |R|^2": {"float32": 1e-6, "tf32": 1e-4, "bfloat16": 1e-3},
    "error of the update": {"float32": 5e-6, "tf32": 5e-4, "bfloat16": 5e-3},
    "error of |S|": {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2},
}
# Rounding of the few numbers of a rehearsal averages out less.
REHEARSED = 5.0
# What tensor cores that cut float32 numbers, where they should be rounded, make of R in tf32.
CUT = 6e-4
# Shares of the residual in |G|^2: one whose norm is a difference of squares, and one that is summed exactly.
SHARES = (0.03, 0.002)


def gradient(shape: tuple[int, int], rank: int, share: float, device: torch.device, seed: int) -> Tensor:
    """A gradient, float32, of which about `share` lies outside a subspace of the rank, the same for every seed.

    No direction of the subspace is weak: Adam divides each entry of R by its size, rounding with it.
    """
    m, n = shape
    inner, shorter = rank, min(m, n)
    common = torch.randn(shorter, inner, generator=torch.Generator(device).manual_seed(SEED), device=device)
    fresh = torch.Generator(device).manual_seed(seed)
    inside = common @ torch.randn(inner, max(m, n), generator=fresh, device=device) / inner**0.5
    noise = torch.randn(inside.shape, generator=fresh, device=device)
    made = inside + (share / (1.0 - share)) ** 0.5 * noise
    return (made if m <= n else made.t()).contiguous()


def relative(value: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of what is exact; NaN counts as endless."""
    return float(torch.nan_to_num((value.double() - exact).norm() / exact.norm(), nan=float("inf")))


def bound(check: Check, what: str, precision: str) -> float:
    """Above which an error is none of rounding."""
    return BOUNDS[what][precision] * (REHEARSED if check.rehearsal else 1.0)


def measure(check: Check) -> None:
    """Every shape at every rank and precision, most telling first."""
    if check.rehearsal:
        kernels.interpret_on_cpu(True)
    with check.attempt("compilation"):
        compile_kernels(check, jobs(check))
    # torch.empty then gives NaN: an element that no program writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    ranks = check.sizes.ranks[: 1 if check.rehearsal else 2]
    cases = [(shape, rank) for rank in ranks for shape in check.sizes.shapes]
    needs = 1.0
    for shape, rank in cases:
        facts: dict[str, Any] = {"shape": list(shape), "rank": rank}
        if not check.enough("error of R", needs, **facts):
            continue
        with check.attempt("error of R", **facts):
            one = functools.partial(_case, check, shape, rank)
            needs = 1.3 * seconds(one, check.device)


def _case(check: Check, shape: tuple[int, int], rank: int) -> None:
    for precision in PRECISIONS:
        project(check, shape, rank, precision)
        for share in SHARES[: 1 if precision == "float32" else 2]:
            step(check, shape, rank, precision, share)


def project(check: Check, shape: tuple[int, int], rank: int, precision: str) -> None:
    """R and |G_j|^2 of one matrix."""
    facts: dict[str, Any] = {"shape": list(shape), "rank": rank, "precision": precision}
    side: Side = projection_side(shape, "std", "released")
    grad = gradient(shape, rank, SHARES[0], check.device, 1)
    basis = _orthonormal(shape[0] if side == "left" else shape[1], rank, check.device)
    # As a step hands it over.
    given = basis.bfloat16() if precision == "bfloat16" else basis
    low_rank, grad_sq = kernels.project(grad, given, side, precision)
    again, grad_sq_again = kernels.project(grad, given, side, precision)
    exact, exact_sq = functional.project(grad.double(), basis.double(), side, "float32")
    error = relative(low_rank, exact)
    check.holds("error of R", error, bound(check, "error of R", precision), **facts)
    if precision == "tf32" and check.device.type == "cuda":
        check.fact("factors are rounded to TF32, not cut", error < CUT, **facts)
    bias = float(low_rank.double().square().sum() / exact.square().sum()) - 1.0
    check.holds("bias of |R|^2", bias, bound(check, "bias of |R|^2", precision), **facts)
    check.holds("error of |G_j|^2", relative(grad_sq, exact_sq), 1e-6, **facts)
    same = torch.equal(low_rank, again) and torch.equal(grad_sq, grad_sq_again)
    check.fact("same bits twice", same, of="project", **facts)


def step(check: Check, shape: tuple[int, int], rank: int, precision: str, share: float) -> None:
    """A step of the optimizer behind its first one, from the same state in float32 and in float64."""
    facts: dict[str, Any] = {"shape": list(shape), "rank": rank, "precision": precision, "share": share}
    # A limiter that never acts, so that the state keeps |S| itself.
    settings: dict[str, Any] = {"lr": 1.0, "rank": rank, "gamma": 1e6, "subspace": "randomized", "eps": 1e-6}
    param = Parameter(torch.zeros(shape, device=check.device))
    optimizer = FiraAdam([param], matmul_precision=precision, **settings)
    param.grad = gradient(shape, rank, share, check.device, 1)
    optimizer.step()
    state = {key: value.clone() for key, value in optimizer.state[param].items()}
    param.grad = gradient(shape, rank, share, check.device, 2)
    updates = []
    for _ in range(2):
        with torch.no_grad():
            param.zero_()
            for key, value in state.items():
                optimizer.state[param][key].copy_(value)
        optimizer.step()
        updates.append(param.detach().clone())
    norm = float(optimizer.state[param]["residual_norm"])
    exact = Parameter(torch.zeros(shape, dtype=torch.float64, device=check.device))
    reference = FiraAdam([exact], matmul_precision=precision, **settings)  # of no effect on float64
    reference.load_state_dict(optimizer.state_dict())
    for key, value in state.items():
        reference.state[exact][key] = value.double() if value.is_floating_point() else value.clone()
    exact.grad = param.grad.double()
    reference.step()
    exact_norm = float(reference.state[exact]["residual_norm"])
    error = relative(updates[0], exact.detach())
    check.holds("error of the update", error, bound(check, "error of the update", precision), **facts)
    check.holds("error of |S|", norm / exact_norm - 1.0, bound(check, "error of |S|", precision), **facts)
    check.fact("same bits twice", torch.equal(*updates), of="step", **facts)


def _orthonormal(size: int, rank: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.linalg.qr(torch.randn(size, rank, generator=generator, device=device)).Q.contiguous()
