"""Checks that the ranks of a DeepSpeed engine still hold the same weights: `check_sync_every`.

Written against DeepSpeed 0.19.8. What it relies on: `DeepSpeedEngine._take_model_step` makes the optimizer step on
every rank and counts `global_steps`; at stages 0, 1 and 2 the module's parameters are whole on every rank afterwards.

Ranks that drift apart go unnoticed otherwise: a flipped bit in one GPU's memory, a kernel that is not deterministic at
stage 0, a script that changes weights on one rank. Each rank goes on with its own weights, and averages gradients of
different models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_fira.engine.deepspeed import tensor_hash
from ds_fira.engine.deepspeed.chosen import trains_ours
from ds_fira.optim.base import LowRankOptimizer

T = TypeVar("T")
# Steps between two comparisons at stage 0, unless `check_sync_every` is given: about 0.02% of a training step there
# (docs/monitoring.md).
DEFAULT = 100


def check_after_step(take_model_step: Callable[..., T], engine: DeepSpeedEngine, *args: object, **kwargs: object) -> T:
    """`_take_model_step`: compares the weights over the ranks every `check_sync_every` steps."""
    result = take_model_step(engine, *args, **kwargs)
    every = _interval(engine)
    if every and engine.global_steps % every == 0:
        check_sync(engine)
    return result


def refuse_partitioned_weights(engine: DeepSpeedEngine) -> None:
    """Stop where weights are to be compared that no rank holds whole.

    Raises:
        ValueError: the stage is 3.
    """
    every = _interval(engine)
    if every and engine.zero_optimization_stage() == 3:
        raise ValueError(
            f"{engine.basic_optimizer.algorithm.name}: check_sync_every = {every} has nothing to compare at "
            "zero_optimization.stage = 3, where every weight is held by one rank alone; set it to 0, or use stage 0, 1 "
            "or 2."
        )


def check_sync(engine: DeepSpeedEngine) -> None:
    """Compare the weights of all data-parallel ranks to the bit; a collective call.

    One number for each rank is compared; only where they differ are those of all parameters gathered.

    Args:
        engine: a DeepSpeed engine that trains with an optimizer of this package, at stage 0, 1 or 2.

    Raises:
        RuntimeError: they differ; on every rank, one sentence with the step, the parameters, the ranks, the remedy.
    """
    optimizer = engine.basic_optimizer
    communicator = optimizer.communicator
    if communicator.dp_size == 1:
        return
    names, tensors = zip(*_replicated(engine, optimizer), strict=True)
    hashes = tensor_hash.hash_tensors(tensors)
    if communicator.all_equal(tensor_hash.combine(hashes)):
        return
    difference = tensor_hash.describe_difference(names, communicator.gather_objects(hashes.tolist()))
    given = optimizer.check_sync_every
    default = " (the default at stage 0; 0 switches it off)" if given is None else ""
    raise RuntimeError(
        f"{optimizer.algorithm.name}: check_sync_every = {_interval(engine)}{default} found at step "
        f"{engine.global_steps} that the ranks no longer hold the same weights, {difference} of the data-parallel "
        "group: load the last checkpoint from before, and where it happens again check the memory of that machine and "
        "what changes weights on one rank only."
    )


def _interval(engine: DeepSpeedEngine) -> int:
    """Steps from one comparison to the next, 0 for none."""
    every = engine.basic_optimizer.check_sync_every if trains_ours(engine) else 0
    if every is None:
        return DEFAULT if engine.zero_optimization_stage() == 0 else 0
    return every


def _replicated(engine: DeepSpeedEngine, optimizer: LowRankOptimizer) -> list[tuple[str, Tensor]]:
    """What every rank has to hold alike: the module's parameters, frozen ones too, and at stage 0 the master copies."""
    found = list(engine.module.named_parameters())
    if optimizer.replicated:
        own = {id(param) for _, param in found}
        found += [
            (f"master copy of {held[0].name or i}", param)
            for i, (param, held) in enumerate(optimizer.attachment.slices.items())
            if id(param) not in own
        ]
    return found
