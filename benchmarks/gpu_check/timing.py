"""Seconds of a call on the device and on the host, its launches, its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import seconds

# A call that takes longer is timed once more and not again.
SLOW = 0.1
# Milliseconds of warming up and of measuring that a short call gets.
WARM_UP, REPEATED = 10, 60


def device_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call on the device, with nothing of it left in the L2 cache; on a CPU of one call.

    The call has to bear being repeated, some twenty times.
    """
    call()
    once = seconds(call, device)
    if device.type != "cuda":
        return once
    if once > SLOW:
        return seconds(call, device)
    from triton.testing import do_bench

    return float(do_bench(call, warmup=WARM_UP, rep=REPEATED, return_mode="median")) / 1e3


def host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds until a call returns, with an empty queue before it: what the host does of it."""
    taken = []
    for _ in range(5 if device.type == "cuda" else 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def activities(device: torch.device) -> list[ProfilerActivity]:
    """What a profiler records here."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def launches(call: Callable[[], object], device: torch.device) -> int:
    """Kernels, copies and fills that a call puts on the device; on a CPU torch's operations."""
    with profile(activities=activities(device)) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    return sum(event.count for event in profiler.key_averages() if event.device_type == kind)


def peak_beyond(call: Callable[[], object], device: torch.device) -> tuple[int, int] | None:
    """Bytes that a call allocates beyond what was held before it, and the peak of all; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return peak - before, peak
