"""Which linear layers of an engine's module are recorded under AdamW (`record_scaling_factors`)."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_fira.core.selection import find_projected_weights, shape_of
from ds_fira.engine.deepspeed.flat_groups import FlatGroup
from ds_fira.engine.deepspeed.holders import Holders
from ds_fira.observe.scaling_recorder import under_adamw
from ds_fira.optim.base import LowRankOptimizer


def record_weights(
    engine: DeepSpeedEngine, optimizer: LowRankOptimizer, flats: Sequence[FlatGroup], holders: Holders
) -> None:
    """Tell an optimizer's recorder where the weights lie that a rank would project, and that are not projected.

    Args:
        engine: has the module.
        optimizer: is attached to the engine.
        flats: that it steps.
        holders: of the module's parameters.
    """
    recorder = optimizer.recorder
    recorder.names = holders.order
    linear = find_projected_weights(engine.module)
    for flat in flats:
        group = optimizer.param_groups[flat.group]
        if not all(under_adamw(shape_of(param), group) for param in flat.lp_params):
            continue
        matrices, communicator = flat.matrices(holders.names, linear), flat.communicator
        if optimizer.attachment.replicas:  # every rank has all of it
            matrices = [{communicator.dp_rank: fragments[0]} for fragments in matrices]
        recorder.watch(flat.hp_partition, matrices, group, communicator)
