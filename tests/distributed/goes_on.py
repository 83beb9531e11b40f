"""A run that loads, trains, saves and goes on: the same for every kind of engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ds_fira
from ds_fira.checkpoint.atomic_save import CheckpointError


def goes_on(
    engine: Any,
    steps_of: Callable[[Any, int, int], list[float]],
    weights_of: Callable[[Any], dict[str, Any]],
    steps: tuple[int, int, int],
    load: str | None,
    save: str | None,
) -> dict[str, Any]:
    """What is there at the end of a run, or why a checkpoint could not be loaded or saved.

    Args:
        engine: of FiraAdam or another optimizer.
        steps_of: trains it from a step to before another, and gives the losses.
        weights_of: the weights on this rank.
        steps: the first that is made, the one before which is saved, and the one before which the run ends.
        load: a folder, or None.
        save: a folder, or None.

    Returns:
        `loaded`, the weights behind a load, and `path`, what it returned; `weights`, `losses` and, of FiraAdam,
        `metrics` at the end; or `message`.
    """
    result: dict[str, Any] = {}
    first, saved, last = steps
    try:
        if load is not None:
            path, _ = engine.load_checkpoint(load)
            result |= {"path": path, "loaded": weights_of(engine)}
        losses = steps_of(engine, first, saved)
        if save is not None:
            engine.save_checkpoint(save)
        losses += steps_of(engine, saved, last)
        result |= {"weights": weights_of(engine), "losses": losses}
        if isinstance(engine.basic_optimizer, ds_fira.FiraAdam):
            result["metrics"] = ds_fira.metrics(engine)
    except (ValueError, CheckpointError) as error:
        result["message"] = str(error)
    return result
