"""Lets the ranks of DeepSpeed's own tests start quickly: imported by a copy of them, for FiraAdam and for the control.

Each test starts processes anew, by Python's fork server. Here the server imports torch and DeepSpeed once, and a rank
is a fork of it: a second instead of ten. A fork must not follow the first threads, so OMP_NUM_THREADS is to be 1.
"""

from __future__ import annotations

import functools
import multiprocessing
from typing import Any

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


def raise_errors(harness: Any) -> None:
    """Let what is no `Exception`, as pytest's own failures, fail a test: a pool's worker ends by it, and nobody hears.

    Args:
        harness: DeepSpeed's class of tests on several ranks.
    """
    run = harness._dist_run

    @functools.wraps(run)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except Exception:
            raise
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error

    harness._dist_run = told


install()
