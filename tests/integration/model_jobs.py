"""What the ranks run to train transformers models of every kind, and to save and export them."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor

import ds_fira
from ds_fira.optim.registry import fira_of
from tests import small_models
from tests.distributed.probes import describe_groups
from tests.small_models import SEQUENCE, VOCABULARY, loss_of


def batches(steps: int, rank: int, rows: int = 4) -> list[Tensor]:
    """Token ids (rows, sequence) for every step, two batches by turns, different on every rank."""
    generator = torch.Generator().manual_seed(500 + rank)
    two = [torch.randint(0, VOCABULARY, (rows, SEQUENCE), generator=generator) for _ in range(2)]
    return [two[step % 2] for step in range(steps)]


def start(kind: str, ds_config: dict[str, Any], seed: int = 0) -> Any:
    """An engine around a small model, the same on every rank."""
    torch.manual_seed(seed)
    model = getattr(small_models, kind)()
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)[0]


def advance(engine: Any, tokens: list[Tensor]) -> list[float]:
    """Train on batches; returns the losses."""
    losses = []
    for batch in tokens:
        loss = loss_of(engine, batch.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def train(kind: str, ds_config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train a small model on this rank's batches."""
    engine = start(kind, ds_config)
    optimizer = fira_of(engine)
    before = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    losses = advance(engine, batches(steps, engine.global_rank))
    projected = [p for group in optimizer.param_groups if "rank" in group for p in group["params"]]
    result = {
        "losses": losses,
        "before": before,
        "after": {name: param.detach().clone() for name, param in engine.module.named_parameters()},
        "groups": describe_groups(engine),
        "partitions": [
            ("rank" in group, [param.numel() for param in group["params"]]) for group in optimizer.param_groups
        ],
        "steps_of_matrices": [optimizer.state[p]["step"].tolist() for p in projected if optimizer.state[p]],
        "low_rank_shapes": [
            (tuple(optimizer.state[p]["basis"].shape), tuple(optimizer.state[p]["exp_avg"].shape))
            for p in projected
            if optimizer.state[p]
        ],
        "layouts": optimizer.layouts,
        "metrics": ds_fira.metrics(engine),
        "memory": ds_fira.memory_report(engine),
    }
    del optimizer
    engine.destroy()
    return result


def save(kind: str, ds_config: dict[str, Any], steps: int, folder: str) -> dict[str, Any]:
    """Train, then save the training state to folder/state and, by rank 0, the module to folder/model.

    Returns:
        `groups` and `partitions` (this rank's master weights by group), from which the test puts the masters together;
        `module`, the module's weights; `safe`, what `safe_get_full_fp32_param` gives; `loss` of this rank's last batch.
    """
    engine = start(kind, ds_config)
    tokens = batches(steps, engine.global_rank)
    advance(engine, tokens)
    engine.save_checkpoint(f"{folder}/state")
    if engine.global_rank == 0:
        engine.module.save_pretrained(f"{folder}/model")
    named = dict(engine.module.named_parameters())
    result = {
        "groups": describe_groups(engine),
        "partitions": [group["params"][0].detach().clone() for group in fira_of(engine).param_groups],
        "module": {name: param.detach().clone() for name, param in named.items()},
        "safe": {name: deepspeed.utils.safe_get_full_fp32_param(param).clone() for name, param in named.items()},
        "loss": float(loss_of(engine, tokens[-1].to(engine.device)).detach()),
    }
    engine.destroy()
    return result
