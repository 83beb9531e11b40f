"""The optimizers that FiraAdam is measured beside, each as a function of one matrix and a rank."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

import ds_fira

LOW_RANK = {"update_proj_gap": 10**9, "proj_type": "std"}


def make_ds_fira(param: torch.nn.Parameter, rank: int, **settings: Any) -> Optimizer:
    """FiraAdam on one matrix."""
    group = {"params": [param], "rank": rank, "alpha": 0.25, **LOW_RANK}
    return ds_fira.FiraAdam([group], lr=1e-3, **settings)


def _fira(param: torch.nn.Parameter, rank: int) -> Optimizer:
    fira = importlib.import_module("fira")
    group = {"params": [param], "rank": rank, "alpha": 0.25, **LOW_RANK}
    return fira.FiraAdamW([group], lr=1e-3, no_deprecation_warning=True)


def _galore(param: torch.nn.Parameter, rank: int) -> Optimizer:
    galore = importlib.import_module("galore_torch")
    group = {"params": [param], "rank": rank, "scale": 0.25, **LOW_RANK}
    return galore.GaLoreAdamW([group], lr=1e-3, no_deprecation_warning=True)


def _apollo(param: torch.nn.Parameter, rank: int) -> Optimizer:
    apollo = importlib.import_module("apollo_torch")
    settings = {"scale": 1.0, "scale_type": "channel", "proj": "random"}
    return apollo.APOLLOAdamW([{"params": [param], "rank": rank, **settings, **LOW_RANK}], lr=1e-3)


def _ds_fira_apollo(param: torch.nn.Parameter, rank: int) -> Optimizer:
    return ds_fira.ApolloAdam([{"params": [param], "rank": rank, **LOW_RANK}], lr=1e-3)


def _adamw(param: torch.nn.Parameter, rank: int) -> Optimizer:
    return torch.optim.AdamW([param], lr=1e-3, fused=True)


def _muon(param: torch.nn.Parameter, rank: int) -> Optimizer:
    return torch.optim.Muon([param], lr=1e-3)


def _deepspeed(param: torch.nn.Parameter, rank: int) -> Optimizer:
    adam = importlib.import_module("deepspeed.ops.adam")
    return adam.FusedAdam([param], lr=1e-3) if param.is_cuda else adam.DeepSpeedCPUAdam([param], lr=1e-3)


PEERS: dict[str, Callable[[torch.nn.Parameter, int], Optimizer]] = {
    "fira": _fira,
    "AdamW": _adamw,
    "galore": _galore,
    "apollo": _apollo,
    "ApolloAdam": _ds_fira_apollo,
    "Muon": _muon,
    "DeepSpeed": _deepspeed,
}


def available(names: list[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Which peers run here, and why the others do not: each makes a step on a small matrix.

    DeepSpeed's Adam is compiled on first use: FusedAdam on a GPU, DeepSpeedCPUAdam elsewhere.
    """
    working, reasons = [], {}
    for name in names:
        param = torch.nn.Parameter(torch.randn(64, 32, device=device))
        param.grad = torch.randn_like(param)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                PEERS[name](param, 8).step()
        except Exception as error:  # whatever a peer's build or import may raise is the answer
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        else:
            working.append(name)
    return working, reasons
