"""The random number generators of a process, as plain tensors and numbers that a checkpoint can carry."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

# The parts of numpy's legacy generator's state beside its key.
NUMPY_PARTS = ("algorithm", "key", "position", "has_gauss", "cached_gaussian")


def rng_state() -> dict[str, Any]:
    """The states of torch's generators on the CPU and on this process's device, of Python's `random` and of numpy.

    Returns:
        Tensors, numbers, strings and lists, so that `torch.load(..., weights_only=True)` reads it: about 12 kB. The
        device's is None where the device is the CPU.
    """
    version, internal, gauss_next = random.getstate()
    numpy = dict(zip(NUMPY_PARTS, np.random.get_state(), strict=True))  # the generator that others draw from
    return {
        "cpu": torch.get_rng_state(),
        "device": get_accelerator().get_rng_state() if get_accelerator().device_name() != "cpu" else None,
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss_next],
        "numpy": {**numpy, "key": torch.from_numpy(numpy["key"].astype(np.int64))},
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Let the generators go on where `rng_state` was called; one of a device is left where the device is another.

    Args:
        state: of `rng_state`, of this process or one like it.
    """
    torch.set_rng_state(state["cpu"].cpu())
    if state["device"] is not None and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(state["device"].cpu())
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))
    numpy = {**state["numpy"], "key": state["numpy"]["key"].numpy().astype(np.uint32)}
    np.random.set_state(tuple(numpy[part] for part in NUMPY_PARTS))
