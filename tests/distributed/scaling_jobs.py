"""What the ranks of a test pool run to see which scaling factors are recorded: all ranks have the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

import ds_fira
from ds_fira.optim.registry import fira_of
from ds_fira.sharding import plan
from tests.distributed.zero_jobs import ExpertNet, Net, batches, build

SHAPES = [(12, 40), (40, 12), (13, 37), (12, 40), (31, 17), (40, 12), (4, 300)]


def model_of(kind: str) -> nn.Module:
    """`Net` over `SHAPES`, or `ExpertNet`; the same everywhere."""
    torch.manual_seed(0)
    return ExpertNet() if kind == "experts" else Net(SHAPES)


def train(
    ds_config: dict[str, Any],
    steps: int,
    kind: str = "net",
    save_at: int | None = None,
    load: bool = False,
    folder: str = "",
    turn_numel: int | None = None,
) -> dict[str, Any]:
    """Train through an engine.

    Args:
        ds_config: DeepSpeed config.
        steps: optimizer steps of the whole run.
        kind: of `model_of`.
        save_at: saves and ends after this step.
        load: whether to go on from what was saved at `save_at`.
        folder: of the checkpoint, and of the file that `write_scaling_factors` writes.
        turn_numel: elements of split matrices that an owner assembles at a time; None for the package's bound.

    Returns:
        `factors`; `weights`, full masters by name; `collectives` of the optimizer up to the last step; `low_rank` and
        `gathered`, how many matrices are stepped either way; `turns`, in how many the latter are stepped.
    """
    bound = plan.MAX_TURN_NUMEL
    plan.MAX_TURN_NUMEL = turn_numel or bound
    try:
        engine = build(ds_config, [], model=model_of(kind))
    finally:
        plan.MAX_TURN_NUMEL = bound
    optimizer = fira_of(engine)
    accumulation = ds_config.get("gradient_accumulation_steps", 1)
    first, last = (save_at, steps) if load else (0, save_at or steps)
    if load:
        engine.load_checkpoint(folder)
    for tokens in batches(steps * accumulation, rank=0)[first * accumulation : last * accumulation]:
        engine.backward(engine(tokens))
        engine.step()
    collectives = optimizer.communicator.collectives
    if save_at is not None and not load:
        engine.save_checkpoint(folder)
    if folder:
        ds_fira.write_scaling_factors(engine, Path(folder, f"rank {engine.global_rank}.npz"))
    # Of the binding, which the bound shaped.
    turns = [len(binding.exchanges) for binding in optimizer._bound.values()]
    ways = [matrix.way for group in optimizer.layouts for matrix in group.split]
    result = {
        "factors": ds_fira.scaling_factors(engine) if optimizer.recorder is not None else None,
        "weights": weights_of(engine),
        "collectives": collectives,
        "low_rank": ways.count("low_rank"),
        "gathered": ways.count("gathered"),
        "turns": max(turns, default=0),
    }
    del optimizer
    engine.destroy()
    return result


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """Full weights by name; at stage 3 the masters."""
    stage = engine.zero_optimization_stage()
    return {
        name: (safe_get_full_fp32_param(param) if stage == 3 else param.detach()).clone()
        for name, param in engine.module.named_parameters()
    }


def train_plain(params: dict[str, Any], steps: int, kind: str, accumulation: int) -> dict[str, dict[str, Any]]:
    """The factors of the same training in one process without DeepSpeed."""
    model = model_of(kind)
    settings = {key: value for key, value in params.items() if key != "exact_cuts"}
    optimizer = ds_fira.FiraAdam(model, **settings)
    for index, tokens in enumerate(batches(steps * accumulation, rank=0)):
        (model(tokens) / accumulation).backward()
        if (index + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return ds_fira.scaling_factors(optimizer)
