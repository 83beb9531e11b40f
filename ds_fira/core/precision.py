"""The precision of matrix products, set for one product at a time.

A GPU multiplies float32 matrices on its tensor cores only if their elements may be rounded first: to TF32 (10 bits of
mantissa, the exponent of float32) or to bfloat16 (7 bits). Sums stay in float32 either way.
"""

from __future__ import annotations

import functools
from contextlib import ContextDecorator
from typing import NamedTuple

import torch


class Rounding(NamedTuple):
    """Below which shares a residual counts as rounding of the products, for a gradient that is exact in float32.

    Attributes:
        squares: the share of |G_j|^2 under which |G_j|^2 - |R_j|^2 is rounding; that of a normalized residual's floor.
        norm: the share of |phi * G| under which |S|, summed from the residual itself, is rounding.
    """

    squares: float
    norm: float


# By the precision of the products. What an emulation leaves of a gradient that lies in the subspace:
#   float32   of |R|^2 1e-6, the rounding of long sums, and 3e-7 of |G|; 1e-6 |G| over the root of 1e-4 is 1e-4
#   tf32      1e-5 and 3.3e-4; 1.4e-3 and 1.5e-3 where operands are cut to it, as torch's own products on a GPU may do
#   bfloat16  of operands that are rounded by up to 2^-9 up to 8e-3, and 2.7e-3
ROUNDING = {"float32": Rounding(1e-4, 1e-4), "tf32": Rounding(2e-3, 2e-3), "bfloat16": Rounding(1e-2, 5e-3)}
# By the device, a backend of torch and what a setting means to it. The CPU has no TF32 units worth asking for, and
# torch's CUDA products of float32 matrices know nothing between TF32 and bfloat16 operands.
_BACKENDS = (
    ("cuda", torch.backends.cuda.matmul, {"float32": "ieee", "tf32": "tf32", "bfloat16": "tf32"}),
    ("cpu", torch.backends.mkldnn.matmul, {"float32": "ieee", "tf32": "ieee", "bfloat16": "bf16"}),
)


class matmul_precision(ContextDecorator):
    """Let torch multiply float32 matrices in `precision`, whatever the user has set for the model's own products.

    A class, as a step enters it twice for every matrix, and a generator takes twice the time.

    Args:
        precision: "float32", "tf32" (on the CPU the same) or "bfloat16" (TF32 in torch's own products on CUDA; the
            Triton kernels take it at its word).
        device: where the products are made, so that one backend is looked at; None for all.
    """

    def __init__(self, precision: str, device: torch.device | None = None) -> None:
        kind = None if device is None else device.type
        self._wanted = [(backend, meanings[precision]) for name, backend, meanings in _BACKENDS if kind in (None, name)]
        # What to put back, for each block entered: as a decorator it may be entered again inside.
        self._before: list[list[tuple[object, str]]] = []

    def __enter__(self) -> None:
        changed = []
        for backend, wanted in self._wanted:
            before = backend.fp32_precision
            # What nobody has set is float32; to set a value takes longer than to look.
            if before != wanted and (before, wanted) != ("none", "ieee"):
                backend.fp32_precision = wanted
                changed.append((backend, before))
        self._before.append(changed)

    def __exit__(self, *_: object) -> None:
        for backend, before in self._before.pop():
            backend.fp32_precision = before


@functools.cache
def precision_of(device: torch.device) -> str:
    """The precision of products on a device where the user names none: bfloat16 where it has units for it.

    On a GPU with compute capability 8.0 or more; earlier ones multiply float32. A CPU takes TF32, which is float32.
    """
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if fast else "tf32"


def negligible_ratio(dtype: torch.dtype, precision: str) -> float:
    """The share of |phi * G| under which a residual norm is only the rounding of gradients and products.

    Args:
        dtype: in which the gradient was computed.
        precision: in which the products are made, where that is another one than the gradient's.
    """
    # Of float64 gradients products are in float64.
    own = ROUNDING["float32" if dtype == torch.float64 else precision]
    return max(torch.finfo(dtype).eps, own.norm)
