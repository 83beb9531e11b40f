"""Stage 0: what the device can do, beside which every other figure stands."""

from __future__ import annotations

import subprocess
import time

import torch
from torch import Tensor

from benchmarks.common import seconds
from benchmarks.gpu_check.record import Check
from benchmarks.gpu_check.timing import device_seconds
from ds_fira.core.precision import matmul_precision

# Launches whose cost on the host is averaged.
LAUNCHES = 1000


def measure(check: Check) -> None:
    """Device, copies, products, launches, decompositions."""
    device = check.device
    _machine(check)
    with check.attempt("copy"):
        _memory(check)
    for precision in ("float32", "tf32", "bfloat16"):
        with check.attempt("product", precision=precision):
            check.record("product", product_rate(check, precision) / 1e12, "TFLOP/s", precision=precision)
    with check.attempt("launch of an operation"):
        _launches(check)
    for side in check.sizes.sides:
        with check.attempt("decompositions", side=side):
            square = torch.randn(side, side, device=device)
            gram = square @ square.t() / side + torch.eye(side, device=device)
            for name in ("cholesky", "eigh"):
                call = lambda name=name, gram=gram: getattr(torch.linalg, name)(gram)  # noqa: E731
                call()
                taken = min(seconds(call, device) for _ in range(2))
                check.record(name, taken, "s", side=side, cubes=taken * product_rate(check, "float32") / 2 / side**3)
    side = check.sizes.sides[-1]
    if check.enough("svd", 12.0 if device.type == "cuda" else 1.0, side=side):
        with check.attempt("svd", side=side):
            square = torch.randn(side, side, device=device)
            check.record("svd", seconds(lambda: torch.linalg.svd(square), device), "s", side=side)


def product_rate(check: Check, precision: str) -> float:
    """Operations per second of a large square product on random numbers."""
    size, dtype = check.sizes.product, torch.bfloat16 if precision == "bfloat16" else torch.float32
    left, right = (torch.randn(size, size, device=check.device).to(dtype) for _ in range(2))
    key = (size, precision)
    if key not in _RATES:
        with matmul_precision("tf32" if precision == "bfloat16" else precision):
            _RATES[key] = 2 * size**3 / device_seconds(lambda: left @ right, check.device)
    return _RATES[key]


_RATES: dict[tuple[int, str], float] = {}


def copy_rate(check: Check) -> float:
    """Bytes per second, read and written, of a copy that is far larger than the L2 cache."""
    source = torch.randn(check.sizes.copied, device=check.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_seconds(lambda: target.copy_(source), check.device)


def _machine(check: Check) -> None:
    """What the device says of itself."""
    if check.device.type != "cuda":
        return
    found = torch.cuda.get_device_properties(check.device)
    check.record("memory", found.total_memory / 2**30, "GiB")
    check.record("multiprocessors", found.multi_processor_count, "number")
    check.record("L2 cache", getattr(found, "L2_cache_size", 0) / 2**20, "MiB")
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return
    check.record("driver and clocks", None, "", fields=fields, reason=said.stdout.strip())


def _memory(check: Check) -> None:
    check.record("copy", copy_rate(check) / 1e12, "TB/s")
    buffer = torch.zeros(check.sizes.copied, device=check.device)
    taken = device_seconds(lambda: torch.linalg.vector_norm(buffer), check.device)
    check.record("read", buffer.nbytes / taken / 1e12, "TB/s")
    if check.device.type == "cuda":
        host = torch.empty(buffer.numel() // 8, pin_memory=True)
        part: Tensor = buffer[: host.numel()]
        for name, call in (("to the host", lambda: host.copy_(part)), ("from the host", lambda: part.copy_(host))):
            check.record(f"copy {name}", host.nbytes / device_seconds(call, check.device) / 1e9, "GB/s")


def _launches(check: Check) -> None:
    """Host time of a launch of torch's, and of one of our kernels."""
    small = torch.zeros(1, device=check.device)
    check.record("launch of an operation", _each(check, lambda: small.add_(1.0)) * 1e6, "us of the host")
    if check.device.type != "cuda":
        return
    from ds_fira.core import kernels

    moments = torch.zeros(2, 1, device=check.device)
    options = {"step": 1, "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    call = lambda: kernels.adamw_(small, small, moments[0], moments[1], **options)  # noqa: E731
    check.record("launch of a kernel", _each(check, call) * 1e6, "us of the host", kernel="adamw_")


def _each(check: Check, call: object) -> float:
    count = LAUNCHES if check.device.type == "cuda" else 10
    call()
    if check.device.type == "cuda":
        torch.cuda.synchronize(check.device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    taken = time.perf_counter() - start
    if check.device.type == "cuda":
        torch.cuda.synchronize(check.device)
    return taken / count
