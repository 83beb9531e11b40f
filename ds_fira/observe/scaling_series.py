"""The scaling factors of one matrix over a training: Fira's equations 9 and 11, as `record_scaling_factors` keeps them.

The factor of a gradient R is |psi(R)| / |R|, psi(R) = sqrt(1 - beta2^t) / (1 - beta1^t) M / (sqrt(V) + eps) what Adam
makes of it (equation 4): of a projected matrix R = P'G, of a weight under AdamW R = G. It is taken for the whole
matrix, and for every column on the left or row on the right, the side that a projection leaves as long as it is. Bias
correction is in it whatever the `formulation`; the limiter and `residual_scale` are not. The 1e-8 that the update has
in the denominator is not either: where a gradient is exactly zero there is no factor. A normalized residual has another
factor, |S| / |D| of equation 10's S = phi * D, and that is recorded.

Everything stays on the device of the step. Two norms of every recorded step are kept, and for every column two sums
over the steps. A matrix whose columns are kept by several processes is put together at the end: its norms are the roots
of sums of squares.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_fira.core.scalars import Scalar
from ds_fira.core.step import StepStats
from ds_fira.core.subspace import Side

# What `ds_fira.scaling_factors` gives.
Factors = dict[str, dict[str, Any]]
# Recorded steps that a series has room for at first; it doubles when it is full.
FIRST_ROOM = 64


class Series:
    """The factors of one matrix, or of the entries of it that this process keeps.

    Attributes:
        name: the parameter's name; an expert of a 3-D tensor has its index appended in brackets.
        shape: (m, n) of the whole matrix.
        side: the projected side.
        rank: r; None under AdamW.
        entries: the columns on the left, rows on the right, that are kept here.
        steps: the steps recorded, counted from 1.
    """

    def __init__(self, name: str, shape: tuple[int, int], side: Side, rank: int | None, entries: range) -> None:
        self.name, self.shape, self.side, self.rank, self.entries = name, shape, side, rank, entries
        self.steps: list[int] = []
        # |psi(R)| and |R| by step, NaN where there are none; sum and number of the factors by entry.
        self._norms = torch.empty(0, 2)
        self._sums = torch.zeros(2, len(entries), dtype=torch.float64)

    def open(self, step: int) -> Series:
        """Begin a step; without an `add` it has no factor."""
        self.steps.append(step)
        return self

    def add(
        self,
        direction_sq: Tensor,
        low_rank_sq: Tensor,
        bias_correction: Scalar,
        grad_finite: Tensor | bool = True,
    ) -> None:
        """Record the step begun last. Nothing is read from the device.

        Args:
            direction_sq: squared norms of N, without bias correction, (entries,), float64; or of S.
            low_rank_sq: those of R; or of D.
            bias_correction: Adam's, 0-dim or plain; or 1.
            grad_finite: whether the gradient is finite.
        """
        device, place = direction_sq.device, len(self.steps) - 1
        if place >= len(self._norms):
            grown = torch.full((max(FIRST_ROOM, 2 * place), 2), torch.nan, device=device)
            grown[: len(self._norms)] = self._norms
            self._norms, self._sums = grown, self._sums.to(device)
        norms = torch.stack([direction_sq.sum(), low_rank_sq.sum()]).sqrt_()
        norms[0] *= bias_correction
        factors = (direction_sq / low_rank_sq).sqrt_() * bias_correction
        defined = factors.isfinite()
        if isinstance(grad_finite, Tensor):
            norms = torch.where(grad_finite, norms, torch.nan)
            defined &= grad_finite
        self._norms[place] = norms
        self._sums += torch.stack([torch.where(defined, factors, 0.0), defined.double()])

    def plain(self) -> dict[str, Any]:
        """What is recorded, on the CPU; waits for a GPU."""
        norms = torch.full((len(self.steps), 2), torch.nan)
        filled = min(len(self.steps), len(self._norms))
        norms[:filled] = self._norms[:filled].cpu()
        return {
            "name": self.name,
            "shape": self.shape,
            "side": self.side,
            "rank": self.rank,
            "entries": self.entries,
            "steps": list(self.steps),
            "norms": norms,
            "sums": self._sums.cpu(),
        }


def add_batch(series: Sequence[Series], stats: StepStats) -> None:
    """Record the same step of the k matrices of one shape, or of one matrix, that `stats` is of."""
    rows = (*stats.quotient(), stats.grad_finite)
    if stats.low_rank_sq.ndim == 1:
        series[0].add(*rows)
        return
    for one, *row in zip(series, *rows, strict=True):
        one.add(*row)


def join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One matrix from what the processes that keep its entries have recorded."""
    first = parts[0]
    squares = sum(part["norms"].double().square() for part in parts)
    factors = (squares[:, 0] / squares[:, 1]).sqrt()
    defined = factors.isfinite()
    sums = torch.zeros(2, first["shape"][first["side"] == "left"], dtype=torch.float64)
    for part in parts:
        entries = part["entries"]
        sums[:, entries.start : entries.stop] = part["sums"]
    return {
        "steps": [step for step, there in zip(first["steps"], defined.tolist(), strict=True) if there],
        "matrix": factors[defined].float(),
        "column": sums[0] / sums[1],
        "count": sums[1],
        "side": first["side"],
        "rank": first["rank"],
        "shape": tuple(first["shape"]),
    }


def carry_on(name: str, earlier: dict[str, Any], later: dict[str, Any] | None) -> dict[str, Any]:
    """What was recorded before and after a resume, as one; only the latter where a matrix is trained otherwise now."""
    if later is None:
        return earlier
    for key in ("shape", "side", "rank"):
        if earlier[key] != later[key]:
            warnings.warn(
                f"The scaling factors that the resumed run had recorded of {name} are left out, because its "
                f"{key} was {earlier[key]!r} and is {later[key]!r}.",
                stacklevel=4,
            )
            return later
    count = earlier["count"] + later["count"]
    total = sum(torch.where(part["count"] > 0, part["column"] * part["count"], 0.0) for part in (earlier, later))
    return {
        **later,
        "steps": earlier["steps"] + later["steps"],
        "matrix": torch.cat([earlier["matrix"], later["matrix"]]),
        "column": total / count,
        "count": count,
    }
