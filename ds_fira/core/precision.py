"""The precision of matrix products, set for one product at a time.

A GPU multiplies float32 matrices on its tensor cores only if their elements may be rounded first: to TF32 (10 bits of
mantissa, the exponent of float32) or to bfloat16 (7 bits). Sums stay in float32 either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A residual norm under this share of |phi * G| is rounding, not residual, when the gradient is exact in float32.
NEGLIGIBLE_RESIDUAL = 1e-4
# What a setting means to torch's backends: (CUDA, oneDNN on the CPU). The CPU has no TF32 units worth asking for, and
# torch's CUDA products of float32 matrices know nothing between TF32 and bfloat16 operands.
_BACKENDS = {"float32": ("ieee", "ieee"), "tf32": ("tf32", "ieee"), "bfloat16": ("tf32", "bf16")}


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let torch multiply float32 matrices in `precision`, whatever the user has set for the model's own products.

    Args:
        precision: "float32", "tf32" (on the CPU the same) or "bfloat16" (TF32 in torch's own products on CUDA; the
            Triton kernels take it at its word).
    """
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    if before == _BACKENDS[precision]:
        yield
        return
    cuda.fp32_precision, cpu.fp32_precision = _BACKENDS[precision]
    try:
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


def negligible_ratio(dtype: torch.dtype) -> float:
    """The share of |phi * G| under which a residual norm is only the rounding of gradients computed in `dtype`."""
    return max(torch.finfo(dtype).eps, NEGLIGIBLE_RESIDUAL)
