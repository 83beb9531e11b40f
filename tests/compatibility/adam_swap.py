"""Trains with FiraAdam wherever DeepSpeed is asked for Adam or AdamW: imported by a copy of DeepSpeed's own tests.

`deepspeed_tests.py` puts the import into the copy. A config's optimizer keeps its learning rate, betas, eps, Adam's own
where it gives none, and weight decay; an optimizer object is made anew of its param groups.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import hjson
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

import ds_fira

RANK = 4
ADAM_EPS = 1e-8  # where a config gives none; FiraAdam's own is 1e-6
TYPES = ("adam", "adamw")
CLASSES = (torch.optim.Adam, torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam)
# What FiraAdam has of Adam's settings, and what DeepSpeed reads in a param group.
KEPT = ("lr", "betas", "eps", "weight_decay", "moe", "name")


def swap_config(config: object) -> object:
    """A config with FiraAdam in Adam's place; a file is read."""
    if isinstance(config, str | Path):
        config = hjson.loads(Path(config).read_text())  # DeepSpeed reads files so
    optimizer = config.get("optimizer") if isinstance(config, Mapping) else None
    if not optimizer or str(optimizer.get("type")).lower() not in TYPES:
        return config
    kept = {name: value for name, value in optimizer.get("params", {}).items() if name in KEPT}
    return {**config, "optimizer": {"type": "FiraAdam", "params": {"eps": ADAM_EPS, **kept, "rank": RANK}}}


def swap_optimizer(optimizer: object) -> object:
    """A FiraAdam of an Adam's param groups, or of what a function makes; anything else as it is."""
    if isinstance(optimizer, CLASSES):
        groups = [
            {"params": group["params"], **{name: group[name] for name in KEPT if name in group}}
            for group in optimizer.param_groups
        ]
        return ds_fira.FiraAdam(groups, rank=RANK)
    if inspect.isroutine(optimizer):
        return lambda params: swap_optimizer(optimizer(params))
    return optimizer


def install() -> None:
    """Let `deepspeed.initialize` swap, once in a process."""
    initialize: Callable[..., Any] = deepspeed.initialize
    if getattr(initialize, "swaps_adam", False):
        return

    @functools.wraps(initialize)
    def swapped(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(initialize).bind(*args, **kwargs).arguments
        for name in ("config", "config_params"):
            if given.get(name) is not None:
                given[name] = swap_config(given[name])
        if given.get("optimizer") is not None:
            given["optimizer"] = swap_optimizer(given["optimizer"])
        return initialize(**given)

    swapped.swaps_adam = True
    deepspeed.initialize = swapped


install()
