"""What the benchmarks share: the device and versions a figure belongs to, timing in turn, JSON results."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "deepspeed", "transformers", "triton", "fira", "galore-torch", "apollo-torch", "torchao")


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = models[0] if models else model
    return f"{model}, {torch.get_num_threads()} threads"


def describe(device: torch.device) -> dict[str, Any]:
    """Device and versions, as they stand in every JSON result."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"device": device_name(device), "python": platform.python_version(), "versions": versions}


def seconds(call: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call by a clock, wall time by default, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def medians(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of every call, taken in turn, so that a noisy machine is unfair to none."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(seconds(call, device, clock))
    return {name: statistics.median(times) for name, times in taken.items()}


def geometric_mean(values: Iterable[float]) -> float:
    """The exponential of the mean logarithm."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def save(path: str | None, device: torch.device, **results: Any) -> None:
    """Write results with the device and versions they belong to as JSON; nothing without a path."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({**describe(device), **results}, indent=1) + "\n")
