"""Stage 6: time and energy of a refresh on gradients with a falling spectrum: cold, warm, from the Gram matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.record import SEED, Check
from benchmarks.speed.refresh import energies, times

# sigma_k falls with this power of k, as those of real gradients do roughly.
DECAY = 0.8
# Shape, rank and seconds that a GPU takes of it.
CASES = (((4096, 11008), 256, 8), ((4096, 4096), 256, 6), ((4096, 11008), 1024, 10), ((11008, 4096), 1024, 10))
REHEARSED = (((32, 80), 8, 1),)


def gradients(shape: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Two gradients, float32, of one spectrum, the second turned a little away from the first."""
    m, n = shape
    generator = torch.Generator(device).manual_seed(SEED)
    make = lambda *size: torch.randn(size, generator=generator, device=device)  # noqa: E731
    shorter = min(m, n)
    values = torch.arange(1, shorter + 1, device=device).float() ** -DECAY
    left, right = make(m, shorter), make(shorter, n)
    first = left * values @ right
    turned = (left + 0.3 * make(m, shorter)) * values @ (right + 0.3 * make(shorter, n))
    return [first, turned]


def measure(check: Check) -> None:
    """Times, then energies, for every shape and rank."""
    for shape, rank, needs in REHEARSED if check.rehearsal else CASES:
        facts: dict[str, Any] = {"shape": list(shape), "rank": rank}
        if check.enough("refresh", needs, **facts):
            with check.attempt("refresh", **facts):
                _refresh(check, shape, rank, facts)


def _refresh(check: Check, shape: tuple[int, int], rank: int, facts: dict[str, Any]) -> None:
    earlier, grad = gradients(shape, check.device)
    for (method, start), row in times(earlier, grad, rank, 3, exact=False).items():
        of = {"method": method, "start": start or "any", "of floor": row["floor_seconds"] / row["seconds"]}
        check.record("refresh", row["seconds"] * 1e3, "ms", **of, **facts)
    for (_, _, method, start), values in energies([earlier, grad], [rank]).items():
        least = {"method": method, "start": start or "any"}
        check.record("energy of the optimum", min(values), "share", **least, **facts)
