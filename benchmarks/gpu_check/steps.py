"""Stage 4: the step of one rank of 8 of LLaMA 7B beside fused AdamW on the same tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from benchmarks.common import seconds
from benchmarks.gpu_check.graphs import capture_and_replay
from benchmarks.gpu_check.partition import partition
from benchmarks.gpu_check.record import Check
from benchmarks.gpu_check.timing import device_seconds, host_seconds, launches, peak_beyond
from ds_fira import FiraAdam
from ds_fira.core import kernels

DEFAULT = {"precision": "tf32", "states": "float32", "kernels": "auto"}
# Beside each rank with the defaults; each at the rank of most interest.
VARIANTS = (
    {"precision": "bfloat16"},
    {"states": "bfloat16"},
    {"states": "int8"},
    {"precision": "float32"},
    {"kernels": "off"},
)
NAMES = {"precision": "matmul_precision", "states": "state_dtype", "kernels": "kernels"}
NEEDS = 6.0


def measure(check: Check) -> None:
    """AdamW first, then the ranks, then precisions and states, and a step in a CUDA graph."""
    if check.rehearsal:
        kernels.interpret_on_cpu(True)
    peer = None
    with check.attempt("fused AdamW"):
        peer = _adamw(check)
    ranks = check.sizes.ranks
    settings: list[dict[str, Any]] = [{"rank": rank} for rank in ranks]
    settings += [{"rank": ranks[0], **variant} for variant in VARIANTS]
    settings += [{"rank": ranks[1], "precision": "bfloat16"}]
    if check.rehearsal:
        settings = [{"rank": ranks[0]}, {"rank": ranks[0], "states": "int8"}, {"rank": ranks[0], "kernels": "off"}]
    for chosen in settings:
        facts = {**DEFAULT, **chosen}
        if check.enough("step", NEEDS if check.device.type == "cuda" else 1.0, **facts):
            with check.attempt("step", **facts):
                _fira(check, peer, facts)
    if check.enough("replay of a step", NEEDS):
        with check.attempt("replay of a step"):
            capture_and_replay(check)


def _adamw(check: Check) -> float:
    _, flats = partition(check, rank=check.sizes.ranks[0])
    adamw = torch.optim.AdamW(flats, lr=1e-6, fused=True)
    adamw.step()
    peer = device_seconds(adamw.step, check.device)
    elements = sum(flat.numel() for flat in flats)
    facts = {"elements": elements, "GB/s": 28 * elements / peer / 1e9}
    check.record("fused AdamW", peer * 1e3, "ms", **facts)
    check.record("host time of fused AdamW", host_seconds(adamw.step, check.device) * 1e3, "ms")
    return peer


def _fira(check: Check, peer: float | None, facts: dict[str, Any]) -> None:
    optimizer, flats = partition(check, rank=facts["rank"], **{NAMES[key]: facts[key] for key in DEFAULT})
    # What starts with a process is in no figure: kernels are compiled, handles made.
    optimizer.step()
    optimizer.state.clear()
    refreshed = seconds(optimizer.step, check.device)
    step = device_seconds(optimizer.step, check.device)
    check.record("step", step * 1e3, "ms", **facts)
    if peer is not None:
        check.record("step / fused AdamW", step / peer, "ratio", **facts)
    check.record("refresh of all matrices", max(0.0, refreshed - step) * 1e3, "ms", start="cold", **facts)
    _record(check, optimizer, flats, facts)


def _record(check: Check, optimizer: FiraAdam, flats: list[Parameter], facts: dict[str, Any]) -> None:
    check.record("host time of a step", host_seconds(optimizer.step, check.device) * 1e3, "ms", **facts)
    with check.attempt("launches of a step", **facts):
        number = launches(optimizer.step, check.device)
        reason = {} if number else {"reason": "the profiler sees no kernels here"}
        check.record("launches of a step", number or None, "launches", **facts, **reason)
    found = peak_beyond(optimizer.step, check.device)
    if found is not None:
        check.record("peak beyond", found[0] / 2**20, "MiB", **facts)
        check.record("peak", found[1] / 2**30, "GiB", elements=sum(flat.numel() for flat in flats), **facts)
