"""One rank's share of a large model under ZeRO: its real fragments, planned as the engine plans them, no processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import LlamaConfig, LlamaForCausalLM

from ds_fira.binding import Binding
from ds_fira.groups import build_groups, group_defaults
from ds_fira.layout import GroupLayout, plan_groups
from ds_fira.memory import ParamRecord
from ds_fira.optimizer import FiraAdam
from ds_fira.settings import check_params
from ds_fira.shard import matrices_of

# (hidden, intermediate, heads, layers, rank): the paper's Tables 2 and 5, and its 7B at the higher of its two ranks.
LLAMAS = {
    "60m": (512, 1376, 8, 8, 128),
    "130m": (768, 2048, 12, 12, 256),
    "350m": (1024, 2736, 16, 24, 256),
    "1b": (2048, 5461, 32, 24, 512),
    "7b": (4096, 11008, 32, 32, 1024),
}


def llama_shapes(model: str) -> list[tuple[int, int]]:
    """The distinct shapes of projected weights of a LLaMA of the paper."""
    hidden, intermediate = LLAMAS[model][:2]
    return [(hidden, hidden), (intermediate, hidden), (hidden, intermediate)]


def meta_llama(model: str) -> LlamaForCausalLM:
    """A LLaMA of the paper on the meta device: shapes, no memory."""
    hidden, intermediate, heads, layers, _ = LLAMAS[model]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_hidden_layers=layers,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class PlannedGroup:
    """One param group of a planned run.

    Attributes:
        settings: of the group, defaults filled in; with a rank for projected ones.
        partition_size: elements that every rank holds of its flat buffer.
        layout: of projected groups, None for AdamW's.
    """

    settings: dict[str, Any]
    partition_size: int
    layout: GroupLayout | None


@dataclass(frozen=True)
class PlannedRun:
    """A model's param groups over ZeRO's ranks.

    Attributes:
        ranks: data-parallel ranks.
        groups: in the optimizer's order.
        records: every parameter with its settings.
    """

    ranks: int
    groups: list[PlannedGroup]
    records: list[ParamRecord]


def plan_run(model: str, ranks: int, **params: Any) -> PlannedRun:
    """Plan a LLaMA under ZeRO-2 as the engine would, with the settings of a JSON `params` block."""
    module = meta_llama(model)
    settings = check_params(params)
    buffers: list[tuple[dict[str, Any], list, int]] = []
    records = []
    for group in build_groups(module, module.parameters(), settings, zero_stage=2, dp_size=ranks):
        own = {**group_defaults(settings), **{key: value for key, value in group.items() if key != "params"}}
        matrices, begin = [], 0
        for param in group["params"]:
            records.append(ParamRecord.of("", tuple(param.shape), own))
            if "rank" in own:
                matrices += matrices_of(f"matrix {len(records)}", tuple(param.shape), begin)
            begin += param.numel()
        # ZeRO pads a buffer to a multiple of twice the ranks.
        buffers.append((own, matrices, math.ceil(begin / (2 * ranks)) * 2))
    projected = [(matrices, size) for own, matrices, size in buffers if "rank" in own]
    layouts = iter(plan_groups(projected, ranks, [own for own, _, _ in buffers if "rank" in own]))
    groups = [PlannedGroup(own, size, next(layouts) if "rank" in own else None) for own, _, size in buffers]
    return PlannedRun(ranks, groups, records)


def rank_partition(run: PlannedRun, dp_rank: int, device: torch.device) -> tuple[FiraAdam, list[Parameter]]:
    """A FiraAdam on the flat partitions that one rank holds, float32, with random weights and gradients.

    Raises:
        ValueError: a partition boundary cuts a matrix of this rank, whose step needs the other ranks.
    """
    groups, bindings, flats = [], [], []
    generator = torch.Generator(device).manual_seed(0)
    for group in run.groups:
        flat = Parameter(_random(group.partition_size, generator, device))
        flat.grad = _random(group.partition_size, generator, device)
        flats.append(flat)
        # As in ZeRO, the flat buffer takes the parameters' place when the optimizer is there.
        groups.append({**group.settings, "params": [Parameter(torch.empty(1, 1))]})
        if group.layout is not None:
            if group.layout.cuts:
                raise ValueError(f"--partition-of {run.ranks} cuts matrices of this model; choose 1, 2, 4 or 8")
            whole = group.layout.whole[dp_rank]
            bindings.append((flat, Binding(whole, tuple(range(len(whole))))))
    optimizer = FiraAdam(groups)
    for group, flat in zip(optimizer.param_groups, flats, strict=True):
        group["params"] = [flat]
    for flat, binding in bindings:
        optimizer.bind(flat, binding)
    return optimizer, flats


def _random(size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(size, generator=generator, device=device).mul_(0.02)
