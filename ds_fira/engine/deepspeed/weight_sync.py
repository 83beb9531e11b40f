"""Checks that the ranks of a DeepSpeed engine still hold the same weights: `check_sync_every`.

Written against DeepSpeed 0.19.8. What it relies on: `DeepSpeedEngine._take_model_step` makes the optimizer step on
every rank and counts `global_steps`; at stages 0, 1 and 2 the module's parameters are whole on every rank afterwards
that holds them (`holders.py`).

Ranks that drift apart go unnoticed otherwise: a flipped bit in one GPU's memory, a kernel that is not deterministic at
stage 0, a script that changes weights on one rank. Each rank goes on with its own weights, and averages gradients of
different models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_fira.engine.deepspeed import tensor_hash
from ds_fira.engine.deepspeed.chosen import trains_ours
from ds_fira.engine.deepspeed.holders import Holders
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.comm import Communicator

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

    One number for each rank is compared among those that hold the same parameters; only where they differ are those of
    all parameters gathered.

    Args:
        engine: a DeepSpeed engine that trains with an optimizer of this package, at stage 0, 1 or 2.

    Raises:
        RuntimeError: they differ; on every rank, one sentence with the step, the parameters, the ranks, the remedy.
    """
    optimizer, everyone = engine.basic_optimizer, engine.fira_holders.everyone
    if everyone.dp_size == 1:
        return
    held = _replicated(engine, optimizer)
    hashes = tensor_hash.hash_tensors([tensor for _, tensor, _ in held])
    if _all_same(hashes, [holders for *_, holders in held], everyone):
        return
    own = dict(zip((name for name, *_ in held), hashes.tolist(), strict=True))
    difference = tensor_hash.describe_difference(everyone.gather_objects(own))
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


def _all_same(hashes: Tensor, holders: Sequence[Communicator], everyone: Communicator) -> bool:
    """Whether every tensor is the same on all ranks that hold it; the same answer on every rank.

    Args:
        hashes: of the tensors.
        holders: the ranks that hold each.
        everyone: all ranks.
    """
    places = {communicator: [] for communicator in (*holders, everyone)}
    for place, communicator in enumerate(holders):
        places[communicator].append(place)
    common = places.pop(everyone)
    # Of ranks of which each group holds its own, each finds out for itself, and tells the others.
    found = [one.all_equal(tensor_hash.combine(hashes[listed])) for one, listed in places.items()]
    told = torch.tensor([all(found)], dtype=torch.int64, device=hashes.device)
    return everyone.all_equal(torch.cat([tensor_hash.combine(hashes[common]), told])) and all(found)


def _replicated(engine: DeepSpeedEngine, optimizer: LowRankOptimizer) -> list[tuple[str, Tensor, Communicator]]:
    """What several ranks have to hold alike: the module's parameters, frozen ones too, and at stage 0 master copies.

    Returns:
        Their names, and the ranks that hold each.
    """
    known: Holders = engine.fira_holders
    params = list(engine.module.parameters())
    found = [(known.shown(param), param, known.alike([param])) for param in params]
    if optimizer.attachment.replicas:
        own, attachment = {id(param) for param in params}, optimizer.attachment
        shown = {known.labels[id(param)]: known.shown(param) for param in params}
        found += [
            (f"master copy of {shown.get(held[0].name, held[0].name or i)}", param, attachment.replicas[param])
            for i, (param, held) in enumerate(attachment.slices.items())
            if id(param) not in own and param in attachment.replicas
        ]
    return found
