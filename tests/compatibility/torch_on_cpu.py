"""Lets PyTorch's tests that want GPUs run on two CPU ranks over gloo: imported by a copy of them."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any

import torch
from torch.testing._internal import common_cuda, common_distributed, common_fsdp, common_utils
from torch.testing._internal.distributed._tensor import common_dtensor

RANKS = 2


def skip_if_lt(count: int, **_: object) -> Callable[[Any], Any]:
    """Skip what wants more ranks than there are."""
    return unittest.skipIf(count > RANKS, f"needs {count} ranks")


def install() -> None:
    """Say that there are as many devices as ranks, and that what is only for GPUs takes no time."""
    for module in (torch.cuda, torch.accelerator, torch.cpu):
        module.device_count = lambda: RANKS
    torch.cuda._sleep = lambda cycles: None
    torch.cuda.current_stream = torch.cpu.current_stream
    common_utils.get_cycles_per_ms = lambda: 1.0
    common_fsdp.DEVICE_COUNT = RANKS
    common_cuda.TEST_CUDA = True  # what tests skip by; those of torch itself have read it already
    common_distributed.skip_if_lt_x_gpu = common_dtensor.skip_if_lt_x_gpu = skip_if_lt


install()
