"""The full-size operations of a step as fused Triton kernels, for float32, bfloat16 and float16 tensors on a GPU.

`step_together` makes the whole step of some matrices alike, of which `ds_fira.core.kernels.step` lists the
kernels. Each of the other functions does what the torch function of the same name in `ds_fira.core.functional` does, on
one matrix (m, n) or on a batch (k, m, n) of equal shapes. All do it without a synchronization with the host, and give
the same bits on every run.
Triton is imported when a kernel is first asked for, so that this package can be imported where there is none.

    project            R and the squared norms of G's columns or rows in one pass over G
    adam_direction_    moments, direction and the squared norms of direction and R
    residual_square    |phi * (G - a P R)|^2 from the residual itself, without forming it
    apply_update_      the update of W in one pass over G and W
    adamw_             AdamW on any fragment of a parameter; `adamw_together_` on many, with moments of any
                       `state_dtype`
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from ds_fira.core.capture import refuse_if_capturing

if TYPE_CHECKING:
    from ds_fira.core.kernels.adamw import adamw_, adamw_together_
    from ds_fira.core.kernels.moments import adam_direction_
    from ds_fira.core.kernels.projection import project
    from ds_fira.core.kernels.residual import residual_square
    from ds_fira.core.kernels.step import step_together
    from ds_fira.core.kernels.update import apply_update_

__all__ = ["adam_direction_", "adamw_", "adamw_together_", "apply_update_", "project", "residual_square"]
__all__ += ["step_together"]
__all__ += ["Choice", "chosen", "fault", "interpret_on_cpu", "supports", "switched"]

# What the setting `kernels` may say.
Choice = Literal["auto", "off"]
# Set to 0 in the environment, it switches the kernels off whatever the setting says.
VARIABLE = "DS_FIRA_KERNELS"

# Which module a function comes from; they import Triton.
_HOMES = {
    "adam_direction_": "moments",
    "adamw_": "adamw",
    "adamw_together_": "adamw",
    "apply_update_": "update",
    "project": "projection",
    "residual_square": "residual",
    "step_together": "step",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Older devices have neither bfloat16 products nor TF32.
_LEAST_CAPABILITY = (8, 0)
# Inside a tile of 256 rows or columns offsets are 32-bit numbers.
_MOST_STRIDE = 2**23 - 1

_cpu_allowed = False
_switched_off: ContextVar[bool] = ContextVar("_switched_off", default=False)


def __getattr__(name: str) -> Callable[..., object]:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = function
    return function


def chosen(setting: Choice) -> Choice:
    """What the setting `kernels` comes to in this process: "off" too where DS_FIRA_KERNELS is 0.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(
            f"{VARIABLE} = {value!r} in the environment is not legal; set it to 0 to compute with torch functions "
            "instead of the kernels, or leave it out."
        )
    return "off" if value == "0" else setting


@contextmanager
def switched(choice: Choice) -> Iterator[None]:
    """Inside the block `supports` says False of everything where `choice` is "off"; other threads go on as they do."""
    token = _switched_off.set(choice == "off")
    try:
        yield
    finally:
        _switched_off.reset(token)


def supports(tensor: Tensor) -> bool:
    """Whether the kernels can work on `tensor`: its dtype, its device, and a Triton that can compile for it.

    The answer for a device is found once; after that a call costs a few look-ups.

    Args:
        tensor: a weight or a gradient, on any device.

    Returns:
        True for float32, bfloat16 and float16 on an NVIDIA GPU of compute capability 8.0 or newer where a kernel
        compiles and runs, and rows of fewer than 2^23 elements; on the CPU only after `interpret_on_cpu(True)`. False
        for everything else, float64 included, and for all where the kernels are `switched` off.

    Raises:
        ValueError: a CUDA graph captures the first step on the device.
    """
    if _switched_off.get() or tensor.dtype not in _DTYPES or max(tensor.stride()[-2:], default=1) > _MOST_STRIDE:
        return False
    return (tensor.is_cuda or (_cpu_allowed and tensor.device.type == "cpu")) and _runs_on(tensor.device)


class Fault(NamedTuple):
    """Why the kernels do not run on a device.

    Attributes:
        reason: for a message.
        known: whether they are not for such a device, or Triton is not installed: no fault that a user has to be told.
    """

    reason: str
    known: bool

    @property
    def advice(self) -> str:
        """The reason, what is done, and what a user can do."""
        return (
            f"{self.reason}. Torch functions compute the steps instead, more slowly; give Triton what it lacks (a C "
            f"compiler such as gcc, Python's headers, a cache folder that it can write), or set kernels = 'off'."
        )


def fault(device: torch.device) -> Fault | None:
    """Why the kernels do not run on a device; None where they do. Found once, by a launch."""
    if not (device.type == "cuda" or (device.type == "cpu" and _cpu_allowed)):
        return Fault(f"the kernels are not for {device}", known=True)
    if device.type == "cuda":
        if torch.version.cuda is None or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
            return Fault(f"{device} is no NVIDIA GPU of compute capability 8.0 or newer", known=True)
        if not _triton_found():
            return Fault("Triton cannot be imported", known=True)
    failure = _failure_of_a_launch(device)
    return None if failure is None else Fault(f"the Triton kernels do not run on {device} ({failure})", known=False)


@functools.cache
def _runs_on(device: torch.device) -> bool:
    # A launch that finds it out is no part of a step, and is read by the host: its failure would last.
    refuse_if_capturing("no step was made before it", "make one or more without a capture first")
    found = fault(device)
    if found is not None and not found.known:
        warnings.warn(found.advice, stacklevel=6)
    return found is None


@functools.cache
def _failure_of_a_launch(device: torch.device) -> str | None:
    """What a step of AdamW of one element raises; where Triton imports, it may still lack what it compiles with."""
    try:
        param, grad, *moments = (torch.full((1,), value, device=device) for value in (1.0, 2.0, 0.0, 0.0))
        # Betas of zero make the direction 1.
        step = importlib.import_module(f"{__name__}.adamw").adamw_
        step(param, grad, *moments, step=1, lr=0.5, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
        # Read by the host, because a launch ends before the kernel does.
        found = float(param)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None if found == 0.5 else f"a kernel computes {found} where 0.5 belongs"


def interpret_on_cpu(allowed: bool) -> None:
    """Let the kernels work on CPU tensors through Triton's interpreter, which is for tests: it is slow.

    Args:
        allowed: whether `supports` may say True of a CPU tensor from now on.

    Raises:
        RuntimeError: TRITON_INTERPRET is not set, or Triton is not installed.
    """
    global _cpu_allowed
    if allowed and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"TRITON_INTERPRET = {os.environ.get('TRITON_INTERPRET')!r} lets no kernel run on the CPU; "
            "set it to 1 before Triton is imported."
        )
    if allowed and not _triton_found():
        raise RuntimeError("interpret_on_cpu(True) needs Triton, which cannot be imported; install it.")
    _cpu_allowed = allowed


@functools.cache
def _triton_found() -> bool:
    try:
        importlib.import_module("triton.language")
    except ImportError:
        return False
    return True
