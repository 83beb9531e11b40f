"""Stage 5: the step of `fira`, GaLore and APOLLO on one matrix, products in float32, their default, and in TF32."""

from __future__ import annotations

from typing import Any

from benchmarks.common import medians
from benchmarks.gpu_check.record import Check
from benchmarks.peers import available, make_ds_fira
from benchmarks.speed.step import peer_steps, stepper

PEERS = ["fira", "galore", "apollo", "AdamW"]
# The first step of fira and of GaLore is an exact decomposition. Matrices in turn, with their ranks.
CASES = (((2048, 5461), 512), ((4096, 4096), 256), ((4096, 4096), 1024))
REHEARSED = (((32, 80), 8),)
NEEDS = 9.0


def measure(check: Check) -> None:
    """Every peer on every matrix, for as long as there is time."""
    working, reasons = available(PEERS, check.device)
    for name, reason in reasons.items():
        check.record("ds_fira / peer", None, "ratio", peer=name, reason=reason)
    for shape, rank in REHEARSED if check.rehearsal else CASES:
        facts: dict[str, Any] = {"shape": list(shape), "rank": rank}
        if check.enough("ds_fira / peer", 0.5 if check.rehearsal else NEEDS, **facts):
            with check.attempt("ds_fira / peer", **facts):
                _matrix(check, working, shape, rank, facts)


def _matrix(check: Check, working: list[str], shape: tuple[int, int], rank: int, facts: dict[str, Any]) -> None:
    precisions = ("float32", "tf32") if check.device.type == "cuda" else ("float32",)
    steps = {"ds_fira": stepper(lambda p, r: make_ds_fira(p, r, subspace="randomized"), shape, rank, check.device)}
    steps |= peer_steps(working, shape, rank, check.device, precisions)
    medians(steps, 3, check.device)
    taken = medians(steps, 9, check.device)
    for name, value in taken.items():
        check.record("step of one matrix", value * 1e3, "ms", optimizer=name, **facts)
        if name != "ds_fira":
            check.record("ds_fira / peer", taken["ds_fira"] / value, "ratio", peer=name, **facts)
