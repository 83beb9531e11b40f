"""The parameters of a live engine by name, or their gradients, put together from the slices of all ranks."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed

from ds_fira.engine.deepspeed.save_load.written import stepped_params
from ds_fira.engine.deepspeed.swapped import mapped
from ds_fira.optim.registry import fira_of
from tests.distributed.probes import describe_groups


def members_of(engine: Any) -> list[list[tuple[str, tuple[int, ...], int]]]:
    """By param group, (name, shape, offset) of its parameters; the offset counts in the buffer over all ranks.

    At stage 0, where each is a tensor of its own, as if they lay back to back.
    """
    groups = [group["members"] for group in describe_groups(engine)]
    if any(groups):
        return groups
    names = {id(param): name for name, param in engine.module.named_parameters()}
    lp_groups = getattr(engine.optimizer, "fp16_groups", None)
    if lp_groups is None:
        lp_groups = [group["params"] for group in fira_of(engine).param_groups]
    result = []
    for params in lp_groups:
        ends = list(itertools.accumulate((p.numel() for p in params), initial=0))
        result.append([(names[id(p)], tuple(p.shape), end) for p, end in zip(params, ends[:-1], strict=True)])
    return result


def whole_buffers(engine: Any, tensors: list[list[Tensor]]) -> list[Tensor]:
    """By param group, the parts of all ranks back to back: of a group's parameters, or of their gradients."""
    mine = [torch.cat([tensor.detach().reshape(-1) for tensor in group]) for group in tensors]
    if engine.zero_optimization_stage() == 0:
        return mine
    ranks = distributed.get_world_size()
    result = []
    for part in mine:
        parts = [torch.empty_like(part) for _ in range(ranks)]
        distributed.all_gather(parts, part.contiguous())
        result.append(torch.cat(parts))
    return result


def by_name(engine: Any, tensors: list[list[Tensor]]) -> dict[str, Tensor]:
    """The parameters, or their gradients, by name.

    Args:
        engine: the engine.
        tensors: what lies in this rank's stepped tensors, see `stepped_tensors`.
    """
    if engine.zero_optimization_stage() == 3:
        return from_slices(engine, tensors)
    buffers = whole_buffers(engine, tensors)
    return {
        name: buffers[i][offset : offset + torch.Size(shape).numel()].view(shape).clone()
        for i, members in enumerate(members_of(engine))
        for name, shape, offset in members
    }


def stepped_tensors(engine: Any) -> list[list[Tensor]]:
    """The tensors that are stepped at a time: of a param group, at stage 3 of a sub-group."""
    with stepped_params(engine):
        groups = [list(group["params"]) for group in fira_of(engine).param_groups]
    return [[tensor] for group in groups for tensor in group] if engine.zero_optimization_stage() == 3 else groups


def in_memory(engine: Any) -> AbstractContextManager[None]:
    """While what is swapped out to files is there."""
    return mapped(engine.optimizer) if getattr(engine.optimizer, "swap_optimizer", False) else nullcontext()


def from_slices(engine: Any, tensors: list[list[Tensor]]) -> dict[str, Tensor]:
    """As `by_name` at stage 3: every rank has an even slice of every parameter of `fp16_groups`, in their order."""
    names = {id(param): name for name, param in engine.module.named_parameters()}
    mine, ranks = {}, distributed.get_world_size()
    with in_memory(engine):
        for params, (flat,) in zip(engine.optimizer.fp16_groups, tensors, strict=True):
            slices = flat.detach().reshape(-1).clone().split([-(-param.ds_numel // ranks) for param in params])
            mine |= {names[id(param)]: (param, part) for param, part in zip(params, slices, strict=True)}
    result = {}
    for name, (param, part) in mine.items():
        parts = [torch.empty_like(part) for _ in range(ranks)]
        distributed.all_gather(parts, part.contiguous())
        result[name] = torch.cat(parts)[: param.ds_numel].view(param.ds_shape).clone()
    return result
