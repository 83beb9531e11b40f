"""What DeepSpeed's checkpoints lack for a run that goes on: random number generators, Fira's counters and records.

Written against DeepSpeed 0.19.8. What it relies on: `DeepSpeedEngine.save_checkpoint` writes `client_state` beside the
weights, and `load_checkpoint` gives it back, both on every rank. DeepSpeed itself saves weights, optimizer, scheduler,
loss scale and the counts of steps and samples.

Every rank's part travels in one entry of the client state, `ds_fira`, which the caller does not see. It is read only
where optimizer states are loaded. Of another number of ranks, each takes over the generators that the rank of its
number had, and those beyond keep their own; counters go on from the sums. Recorded scaling factors are put together
over the ranks as they are saved.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_fira.engine.deepspeed.chosen import trains_ours
from ds_fira.engine.deepspeed.monitor import forget_hook
from ds_fira.engine.deepspeed.save_load.loadable import warn_if_unloadable
from ds_fira.engine.deepspeed.save_load.rng import rng_state, set_rng_state
from ds_fira.observe.metrics import StepMetrics

KEY = "ds_fira"


def save_with_resume_state(save: Callable[..., object], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> object:
    """`save_checkpoint`: also saves what an exact resume needs."""
    if not trains_ours(engine):
        return save(engine, *args, **kwargs)
    given = inspect.signature(save).bind(engine, *args, **kwargs)
    given.apply_defaults()
    client_state, tag = given.arguments["client_state"], given.arguments["tag"]
    given.arguments["client_state"] = {**client_state, KEY: _state_of_all(engine)}
    done = save(*given.args, **given.kwargs)
    folder = Path(given.arguments["save_dir"], f"global_step{engine.global_steps}" if tag is None else str(tag))
    warn_if_unloadable(engine, folder, client_state)
    return done


def load_with_resume_state(
    load: Callable[..., tuple[Any, Any]], engine: DeepSpeedEngine, *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    """`load_checkpoint`: also takes over what `save_with_resume_state` saved, where states are loaded."""
    path, client_state = load(engine, *args, **kwargs)
    saved = client_state.pop(KEY, None) if client_state else None
    given = inspect.signature(load).bind(engine, *args, **kwargs)
    given.apply_defaults()
    with_states = given.arguments["load_optimizer_states"] and not given.arguments["load_module_only"]
    if saved is not None and with_states and trains_ours(engine):
        _restore(engine, saved)
    return path, client_state


def _state_of_all(engine: Any) -> dict[str, Any]:
    """Generators and counters of every rank, in order of rank; a collective call."""
    optimizer = engine.basic_optimizer
    own = {"rng": rng_state(), "metrics": optimizer.metrics.state_dict()}
    state = {"ranks": optimizer.communicator.gather_objects(own), "replicated": optimizer.replicated}
    if optimizer.recorder is not None:
        state["scaling_factors"] = optimizer.recorder.gather(optimizer.communicator, optimizer.replicated)
    return state


def _restore(engine: Any, saved: dict[str, Any]) -> None:
    optimizer, ranks = engine.basic_optimizer, saved["ranks"]
    rank, size = optimizer.communicator.dp_rank, optimizer.communicator.dp_size
    if rank < len(ranks):
        set_rng_state(ranks[rank]["rng"])
    counters = [part["metrics"] for part in ranks]
    if size == len(ranks):
        own = counters[rank]
    else:
        own = StepMetrics.together(counters, saved["replicated"], counts=optimizer.replicated or rank == 0)
    optimizer.metrics.load_state_dict(own)
    if optimizer.recorder is not None:
        optimizer.recorder.restart(saved.get("scaling_factors") or {})
    # It has counted the steps before the load, which belong to another run or are to be made again.
    forget_hook(engine)
