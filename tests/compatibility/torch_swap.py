"""Puts FiraAdam in the place of torch's optimizers: imported by a copy of PyTorch's own tests.

Some of these compare with one process within a few units of rounding, over steps of 1e-2 with gradients of hundreds:
DS_FIRA_EXACT_CUTS=1 has matrices gathered, which gives the bits of one process.
"""

from __future__ import annotations

import os
from typing import Any

import torch

import ds_fira

RANK = 2
EXACT = os.environ.get("DS_FIRA_EXACT_CUTS") == "1"
# Of torch's settings, what FiraAdam has too.
KEPT = ("lr", "betas", "eps", "weight_decay")


class Swapped(ds_fira.FiraAdam):
    """FiraAdam with the arguments of Adam, AdamW and SGD."""

    def __init__(self, params: Any, lr: float = 1e-3, **given: Any) -> None:
        kept = {name: value for name, value in given.items() if name in KEPT}
        super().__init__(params, lr=lr, rank=RANK, exact_cuts=EXACT, **kept)


def install() -> None:
    """Replace them."""
    for name in ("Adam", "AdamW", "SGD"):
        setattr(torch.optim, name, Swapped)


install()
