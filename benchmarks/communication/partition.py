"""One rank's share of a large model under ZeRO: its real fragments, planned as the engine plans them, no processes."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import LlamaForCausalLM

from ds_fira.optim.fira_adam import FiraAdam
from ds_fira.sharding.local_matrices import LocalMatrices
from ds_fira.tools.dry_run import PlannedRun, plan_run
from ds_fira.tools.estimate.model import load_model
from ds_fira.tools.models import NAMES, PAPER_RANKS, config_file


def _sizes(name: str) -> tuple[int, int, int, int, int]:
    config = json.loads(config_file(name).read_text())
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    return (*(config[key] for key in keys), PAPER_RANKS[name])


# (hidden, intermediate, heads, layers, rank) by size, from the package's config files.
LLAMAS = {name.removeprefix("llama_"): _sizes(name) for name in NAMES}


def llama_shapes(model: str) -> list[tuple[int, int]]:
    """The distinct shapes of projected weights of a LLaMA of the paper."""
    hidden, intermediate = LLAMAS[model][:2]
    return [(hidden, hidden), (intermediate, hidden), (hidden, intermediate)]


def meta_llama(model: str) -> LlamaForCausalLM:
    """A LLaMA of the paper on the meta device: shapes, no memory."""
    return load_model(f"llama_{model}")


def plan_llama_run(model: str, ranks: int, **params: Any) -> PlannedRun:
    """Plan a LLaMA under ZeRO-2 as the engine would, with the settings of a JSON `params` block."""
    return plan_run(meta_llama(model), ranks, zero_stage=2, **params)


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
            if group.layout.split:
                raise ValueError(f"--partition-of {run.ranks} cuts matrices of this model; choose 1, 2, 4 or 8")
            whole = group.layout.unsplit[dp_rank]
            bindings.append((flat, LocalMatrices(whole, tuple(range(len(whole))))))
    optimizer = FiraAdam(groups)
    for group, flat in zip(optimizer.param_groups, flats, strict=True):
        group["params"] = [flat]
    for flat, binding in bindings:
        optimizer.bind(flat, binding)
    return optimizer, flats


def _random(size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(size, generator=generator, device=device).mul_(0.02)
