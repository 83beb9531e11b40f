"""What a training script asks about a run: how the low-rank steps go, bytes of state, recorded scaling factors.

Every function takes an optimizer of this package, or an engine that trains with one. Under an engine each is a
collective call: every rank makes it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch

from ds_fira.observe.metrics import Totals
from ds_fira.observe.scaling_series import Factors
from ds_fira.optim.registry import fira_of
from ds_fira.optim.state_size import adamw_bytes, formula_bytes, state_bytes


def metrics(engine_or_optimizer: object) -> dict[str, float | int]:
    """Fira at work since the run began, over all ranks. Under an engine a collective call.

    A checkpoint carries the counters, so the steps before a resume are included.

    Args:
        engine_or_optimizer: an optimizer of this package, or a DeepSpeed engine that trains with one.

    Returns:
        `captured_energy`, the mean over matrix steps of |P'G|^2 / |G|^2; `residual_norm`, the root mean square over
        steps of the norm of all matrices' residuals as they went into the update; `limiter_activations`, matrix steps
        in which the limiter shrank the residual, and `limiter_share`, of all; `refreshes`, bases computed;
        `refresh_seconds`, wall time of refreshes on the rank that spent most; `matrix_steps`; `projected_matrices`.

    Raises:
        ValueError: the engine trains with another optimizer.
    """
    optimizer = fira_of(engine_or_optimizer)
    ranks = [optimizer.metrics.totals()]
    if optimizer.communicator is not None:
        ranks = [Totals(*row) for row in optimizer.communicator.gather_numbers(astuple(ranks[0]))]
    together = Totals.over_ranks(ranks, optimizer.replicated)
    return {**together.figures(), "projected_matrices": sum(record.matrices for record in optimizer.inventory)}


def memory_report(engine_or_optimizer: object) -> dict[str, int | list[int]]:
    """Bytes of optimizer state. Under an engine a collective call.

    Args:
        engine_or_optimizer: as in `metrics`.

    Returns:
        `optimizer_state_bytes`, measured, one figure for each rank; `paper_formula_bytes`, mr + 2nr + 1 per projected
        matrix and AdamW for the rest at four bytes, over all ranks; `adamw_bytes`, what AdamW would hold. Measured
        states are more than the formula where partition boundaries cut matrices and `exact_cuts` is off: each rank
        that shares one projected on the right holds its basis, nr more for every rank beyond the first; on the left a
        row of the basis is held twice where its row of the matrix is cut. At stage 3 only such rows are held twice.

    Raises:
        ValueError: as in `metrics`.
    """
    optimizer = fira_of(engine_or_optimizer)
    held, communicator = state_bytes(optimizer), optimizer.communicator
    return {
        "optimizer_state_bytes": [held] if communicator is None else communicator.gather_objects(held),
        "paper_formula_bytes": formula_bytes(optimizer.inventory),
        "adamw_bytes": adamw_bytes(optimizer.inventory),
    }


def scaling_factors(engine_or_optimizer: object) -> Factors:
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
            f"{optimizer.algorithm.name}: record_scaling_factors = 0 records no scaling factors; give a number of "
            "steps, such as 10, before training."
        )
    return optimizer.recorder.gather(optimizer.communicator, optimizer.replicated, optimizer.counts)


def write_scaling_factors(engine_or_optimizer: object, path: str | Path) -> None:
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
    entries = {f"{name}/{key}": value for name, one in factors.items() for key, value in one.items()}
    np.savez(path, **{key: 0 if value is None else value for key, value in entries.items()})


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
            if key in ("matrix", "column", "count"):
                found[name][key] = torch.from_numpy(value)
            elif key in ("steps", "shape"):
                found[name][key] = value.tolist() if key == "steps" else tuple(value.tolist())
            else:
                found[name][key] = value.item() or None
    return dict(found)
