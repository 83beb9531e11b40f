"""Lets the ranks of DeepSpeed's own tests start quickly: imported by a copy of them, for FiraAdam and for the control.

Each test starts processes anew, by Python's fork server. Here the server imports torch and DeepSpeed once, and a rank
is a fork of it: a second instead of ten. A fork must not follow the first threads, so OMP_NUM_THREADS is to be 1.
"""

from __future__ import annotations

import multiprocessing

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

# Imported by the fork server, and with them torch, DeepSpeed, and what the copy has put into them.
PRELOADED = ["unit.common", "unit.simple_model"]


def install() -> None:
    """Preload; without a GPU leave DeepSpeed's shared-memory collectives uncompiled, and let fp16 train in torch."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        get_accelerator().is_fp16_supported = lambda: True


install()
