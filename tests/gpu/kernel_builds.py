"""Compiles every kernel for an H100, which takes no GPU, and prints what the assembler says of each: one JSON a line.

Run as `python -m tests.gpu.kernel_builds`, without TRITON_INTERPRET; with `quick` for one side and the tensor cores
alone. The wrappers are called on meta tensors of the sizes of a 7B model, and what they would launch is compiled with
the tiles, strides and dtypes of that launch.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from ds_fira.core import kernels

H100 = GPUTarget("cuda", 90, 32)
BETAS = (0.9, 0.999)
# (m, n, r, side): the two sides of a 7B model's feed-forward layers.
SHAPES = ((4096, 11008, 512, "left"), (11008, 4096, 512, "right"))
# Precision of the products, dtype of the weight, dtype of the gradient.
DTYPES = (
    ("bfloat16", torch.bfloat16, torch.bfloat16),
    ("tf32", torch.float32, torch.float32),
    ("float32", torch.float32, torch.float32),
)


def specialized(value: object, path: tuple[int, ...], constant: bool, constants: dict, attributes: dict) -> object:
    """The type of an argument, or of each part of one that is a tuple; what a launch knows of its value is added."""
    if isinstance(value, tuple):
        parts = [specialized(part, (*path, i), constant, constants, attributes) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if constant or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    return mangle_type(value)


def compiled(kernel: Any, grid: tuple[int, ...], tensor: torch.Tensor, *args: Any, **options: Any) -> dict[str, Any]:
    """Compile what `launch` with these arguments would run; the name, and the assembler's numbers."""
    settings = {key: options.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in options}
    signature, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, (*args, *options.values()), strict=True)):
        signature[name] = specialized(value, (place,), name in options, constants, attributes)
    log = io.StringIO()
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    with contextlib.redirect_stdout(log):
        source = ASTSource(kernel, signature, constants, attributes)
        built = triton.compile(source, target=H100, options={**settings, "enable_fp_fusion": True})
    said = log.getvalue()
    return {
        "kernel": kernel.__name__,
        "grid": grid,
        **{key: value for key, value in options.items() if isinstance(value, (str, int))},
        **settings,
        "shared": built.metadata.shared,
        "registers": int(re.findall(r"Used (\d+) registers", said)[-1]),
        "spilled": sum(int(size) for size in re.findall(r"(\d+) bytes spill", said)),
        "mma": sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync)", built.asm["ptx"]))),
    }


def builds(
    shapes: tuple = SHAPES, dtypes: tuple = DTYPES, batch: tuple[int, ...] = (), odd: int = 0
) -> Iterator[dict[str, Any]]:
    """Every kernel's build, for every shape and choice of dtypes."""
    found: list[dict[str, Any]] = []
    record = lambda *args, **options: found.append(compiled(*args, **options))  # noqa: E731
    homes = ("projection", "moments", "residual", "update")
    with contextlib.ExitStack() as stack:
        kernels.project, kernels.adamw_, kernels.apply_update_, kernels.residual_square  # noqa: B018
        for home in homes:
            stack.enter_context(mock.patch(f"ds_fira.core.kernels.{home}.launch", record))
        for m, n, r, side in shapes:
            m, n, r = m - odd, n - odd, r - odd
            for precision, weight_dtype, grad_dtype in dtypes:
                weight = torch.empty(*batch, m, n, dtype=weight_dtype, device="meta")
                grad = torch.empty(*batch, m, n, dtype=grad_dtype, device="meta")
                basis = torch.empty(*batch, m if side == "left" else n, r, device="meta")
                usable = torch.empty(batch, dtype=torch.bool, device="meta")
                low_rank, grad_sq = kernels.project(grad, basis, side, precision)
                phi = grad_sq.float()
                if precision == dtypes[0][0]:
                    moments = torch.empty_like(low_rank), torch.empty_like(low_rank)
                    kernels.adam_direction_(low_rank, *moments, betas=BETAS, eps=1e-6, side=side, grad_finite=usable)
                kernels.residual_square(
                    grad, basis, low_rank, phi, side=side, alpha=1.0, needed=usable, precision=precision
                )
                left, right = (basis, low_rank) if side == "left" else (low_rank, basis.mT)
                kernels.apply_update_(
                    weight,
                    grad,
                    left,
                    right,
                    phi,
                    by_row=side == "right",
                    decay_factor=0.5,
                    grad_finite=usable,
                    precision=precision,
                )
                yield from found
                found.clear()
        flat = torch.empty(2**20, device="meta")
        kernels.adamw_(flat.bfloat16(), flat, flat, flat, step=1, lr=0.1, betas=BETAS, eps=1e-6, weight_decay=0.0)
        yield from found


if __name__ == "__main__":
    for build in builds(SHAPES[:1], DTYPES[:2]) if "quick" in sys.argv else builds():
        print(json.dumps(build), flush=True)
