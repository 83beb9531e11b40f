"""Stage 9: the kernels of two steps of one rank of 8, from torch's profiler; the trace is kept."""

from __future__ import annotations

import torch
from torch.profiler import profile

from benchmarks.gpu_check.partition import partition
from benchmarks.gpu_check.record import TRACE, Check
from benchmarks.gpu_check.timing import activities
from ds_fira.core import kernels

STEPS = 2
# Lines of the table.
MOST = 30


def measure(check: Check) -> None:
    """Two steps behind those in which kernels are compiled and bases found."""
    if check.rehearsal:
        kernels.interpret_on_cpu(True)
    optimizer, _ = partition(check, rank=check.sizes.ranks[0])
    for _ in range(1 if check.rehearsal else 3):
        optimizer.step()
    on_device = check.device.type == "cuda"
    with profile(activities=activities(check.device)) as profiler:
        for _ in range(1 if check.rehearsal else STEPS):
            optimizer.step()
        if on_device:
            torch.cuda.synchronize(check.device)
    profiler.export_chrome_trace(str(check.out / TRACE))
    events = profiler.key_averages()
    if on_device:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    time_of = (lambda event: event.self_device_time_total) if on_device else (lambda event: event.self_cpu_time_total)
    total = sum(map(time_of, events))
    if not total:
        check.record("kernel in two steps", None, "", reason="the profiler sees no kernels here")
    check.record("kernels in two steps", total / 1e3, "ms", calls=sum(event.count for event in events))
    for event in sorted(events, key=time_of, reverse=True)[:MOST]:
        check.record(
            "kernel in two steps",
            time_of(event),
            "us",
            kernel=event.key[:120],
            calls=event.count,
            share=time_of(event) / total,
        )
