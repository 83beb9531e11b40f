"""Which linear layers of an engine's module are recorded under AdamW (`record_scaling_factors`).

Reads the books of DeepSpeed's wrappers through `ds_fira.engine.deepspeed.flat_groups`, and the engine's `module` and
ZeRO stage.
"""

from __future__ import annotations

from typing import Any

from ds_fira.core.selection import find_projected_weights, shape_of
from ds_fira.engine.deepspeed.flat_groups import flat_groups
from ds_fira.observe.scaling_recorder import under_adamw
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.geometry import matrices_of


def watch_weights(engine: Any, optimizer: LowRankOptimizer, names: dict[int, str]) -> None:
    """Tell an optimizer's recorder where the weights lie that a rank would project, and that are not projected.

    Args:
        engine: its optimizer wrapper is built.
        optimizer: has been told what its tensors hold.
        names: of the module's parameters, by their `id`.
    """
    recorder, communicator = optimizer.recorder, optimizer.communicator
    recorder.names = list(names.values())
    linear = find_projected_weights(engine.module)
    if engine.zero_optimization_stage() == 0:
        shapes = {names[id(p)]: shape_of(p) for p in engine.module.parameters() if id(p) in linear}
        for group in optimizer.param_groups:
            for param in [param for param in group["params"] if under_adamw(param.shape, group)]:
                name = optimizer.pieces[param][0].name
                if name in shapes:
                    matrices = matrices_of(name, shapes[name])
                    recorder.watch(param, [{communicator.dp_rank: matrix} for matrix in matrices], group, communicator)
        return
    for flat in flat_groups(engine.optimizer, communicator.dp_size):
        group = optimizer.param_groups[flat.group]
        if not all(under_adamw(shape_of(param), group) for param in flat.lp_params):
            continue
        matrices = [
            flat.partitioning.fragments(index, matrix)
            for index, param in enumerate(flat.lp_params)
            if id(param) in linear
            for matrix in matrices_of(names[id(param)], shape_of(param))
        ]
        recorder.watch(flat.hp_partition, matrices, group, communicator)
