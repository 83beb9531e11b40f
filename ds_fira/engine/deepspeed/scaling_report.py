"""The recorded scaling factors of a training for its user: in memory, and in a file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_fira.engine.deepspeed.attach import fira_of
from ds_fira.observe.scaling_series import Factors

_TENSORS = ("matrix", "column", "count")


def scaling_factors(engine_or_optimizer: Any) -> Factors:
    """The scaling factors |psi(R)| / |R| recorded so far, of all ranks. Under an engine a collective call.

    What they are of and what is in them: docs/monitoring.md. A checkpoint carries them on.

    Args:
        engine_or_optimizer: a FiraAdam with `record_scaling_factors`, or a DeepSpeed engine that trains with one.

    Returns:
        By name of the weight, in the model's order; an expert of a 3-D tensor has its index in brackets:
        `steps`, the recorded steps, counted from 1, without those that had no factor (a gradient of zero, or one that
        is not finite); `matrix`, the factor of the whole matrix at each of them, float32, (steps,);
        `column`, the mean over steps of each column's (`side` "left") or row's ("right") factor, float64, (n,) or (m,),
        NaN where there was none; `count`, the steps in that mean, float64, the same shape; `side`; `rank`, None under
        AdamW; `shape`, (m, n).

    Raises:
        ValueError: nothing is recorded, because `record_scaling_factors` is 0.
    """
    optimizer = fira_of(engine_or_optimizer)
    if optimizer.recorder is None:
        raise ValueError(
            "FiraAdam: record_scaling_factors = 0 records no scaling factors; give a number of steps, such as 10, "
            "before training."
        )
    return optimizer.recorder.gather(optimizer.communicator, optimizer.replicated)


def write_scaling_factors(engine_or_optimizer: Any, path: str | Path) -> None:
    """Write what `scaling_factors` gives to one NumPy .npz file. Under an engine a collective call; rank 0 writes.

    The file holds plain arrays under "NAME/steps", "NAME/matrix", "NAME/column", "NAME/count", "NAME/side",
    "NAME/rank" (0 under AdamW) and "NAME/shape", and opens with `numpy.load` or `ds_fira.read_scaling_factors`.

    Args:
        engine_or_optimizer: as in `scaling_factors`.
        path: of the file; its folder is made, and the name gets ".npz" where it has another ending.

    Raises:
        ValueError: as in `scaling_factors`.
    """
    factors, optimizer = scaling_factors(engine_or_optimizer), fira_of(engine_or_optimizer)
    if optimizer.communicator is not None and optimizer.communicator.dp_rank != 0:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{f"{name}/{key}": _array(value) for name, one in factors.items() for key, value in one.items()})


def read_scaling_factors(path: str | Path) -> Factors:
    """Read a file of `write_scaling_factors`.

    Returns:
        As `scaling_factors`.
    """
    found: Factors = defaultdict(dict)
    with np.load(path, allow_pickle=False) as file:
        for entry in file.files:
            name, _, key = entry.rpartition("/")
            value = file[entry]
            if key in _TENSORS:
                found[name][key] = torch.from_numpy(value)
            elif key in ("steps", "shape"):
                found[name][key] = value.tolist() if key == "steps" else tuple(value.tolist())
            else:
                found[name][key] = value.item() or None
    return dict(found)


def _array(value: Tensor | Iterable[int] | str | int | None) -> np.ndarray:
    return value.numpy() if isinstance(value, Tensor) else np.asarray(0 if value is None else value)
