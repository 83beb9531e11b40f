"""What a training script reports of a run: Fira at work, and the bytes of optimizer state on every rank."""

from __future__ import annotations

from typing import Any

from ds_fira.engine.deepspeed.attach import fira_of
from ds_fira.engine.deepspeed.monitor_events import over_ranks
from ds_fira.optim.state_size import adamw_bytes, formula_bytes, state_bytes


def metrics(engine: Any) -> dict[str, float | int]:
    """Fira at work since the run began, over all ranks. A collective call: every rank makes it.

    A checkpoint carries the counters, so the steps before a resume are included.

    Args:
        engine: a DeepSpeed engine (or its optimizer) that trains with FiraAdam.

    Returns:
        `captured_energy`, the mean over matrix steps of |P'G|^2 / |G|^2; `residual_norm`, the root mean square over
        steps of the norm of all matrices' residuals as they went into the update; `limiter_activations`, matrix steps
        in which the limiter shrank the residual, and `limiter_share`, of all; `refreshes`, bases computed;
        `refresh_seconds`, wall time of refreshes on the rank that spent most; `matrix_steps`; `projected_matrices`.

    Raises:
        ValueError: the engine does not train with FiraAdam.
    """
    optimizer = fira_of(engine)
    together = over_ranks(optimizer, optimizer.metrics.totals())
    return {**together.figures(), "projected_matrices": sum(record.matrices for record in optimizer.inventory)}


def memory_report(engine: Any) -> dict[str, Any]:
    """Bytes of optimizer state. A collective call: every rank makes it.

    Args:
        engine: a DeepSpeed engine (or its optimizer) that trains with FiraAdam.

    Returns:
        `optimizer_state_bytes`, measured, one figure for each rank; `paper_formula_bytes`, mr + 2nr + 1 per projected
        matrix and AdamW for the rest at four bytes, over all ranks; `adamw_bytes`, what AdamW would hold. Measured
        states are more than the formula where partition boundaries cut matrices and `exact_cuts` is off: each rank
        that shares one projected on the right holds its basis, nr more for every rank beyond the first; on the left a
        row of the basis is held twice where its row of the matrix is cut. At stage 3 only such rows are held twice.

    Raises:
        ValueError: the engine does not train with FiraAdam.
    """
    optimizer = fira_of(engine)
    held = state_bytes(optimizer)
    return {
        "optimizer_state_bytes": [held]
        if optimizer.communicator is None
        else optimizer.communicator.gather_objects(held),
        "paper_formula_bytes": formula_bytes(optimizer.inventory),
        "adamw_bytes": adamw_bytes(optimizer.inventory),
    }
