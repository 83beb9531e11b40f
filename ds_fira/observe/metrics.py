"""What a run tells of Fira at work: captured energy, residual norm, limiter activations, refreshes and their time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds_fira.core.step import StepStats


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the steps of one process, or of all of them; the difference of two is what happened in between.

    Attributes:
        steps: optimizer steps made.
        matrix_steps: matrices stepped with a gradient that is finite and not zero, summed over steps.
        captured_energy_sum: sum of |P'G|^2 / |G|^2 over those.
        limiter_activations: those in which the limiter shrank the residual.
        residual_square_sum: sum of |S|^2 over those; S is the residual of the update after the limiter, times
            `residual_scale`, before the step size.
        refreshes: bases computed or received.
        refresh_seconds: wall time of refreshes, what they send and wait for included.
    """

    steps: float = 0.0
    matrix_steps: float = 0.0
    captured_energy_sum: float = 0.0
    limiter_activations: float = 0.0
    residual_square_sum: float = 0.0
    refreshes: float = 0.0
    refresh_seconds: float = 0.0

    def __sub__(self, earlier: Totals) -> Totals:
        return Totals(*(new - old for new, old in zip(astuple(self), astuple(earlier), strict=True)))

    @classmethod
    def over_ranks(cls, parts: Sequence[Totals], replicated: bool) -> Totals:
        """What all ranks did together: sums, but all make the same steps, and the slowest rank's refreshes count.

        Args:
            parts: one of each rank.
            replicated: whether every rank steps, and counts, the same matrices.
        """
        added = parts[0] if replicated else cls(*map(sum, zip(*map(astuple, parts), strict=True)))
        slowest = max(part.refresh_seconds for part in parts)
        return replace(added, steps=max(part.steps for part in parts), refresh_seconds=slowest)

    def figures(self) -> dict[str, float | int]:
        """What a user sees of them.

        Returns:
            `captured_energy`, the mean of |P'G|^2 / |G|^2 over matrix steps; `residual_norm`, the root mean square over
            steps of sqrt(sum over matrices of |S|^2); `limiter_activations` and `limiter_share`, of the matrix steps;
            `refreshes`; `refresh_seconds`; `matrix_steps`.
        """
        return {
            "captured_energy": self.captured_energy_sum / max(self.matrix_steps, 1.0),
            "residual_norm": math.sqrt(self.residual_square_sum / max(self.steps, 1.0)),
            "limiter_activations": int(self.limiter_activations),
            "limiter_share": self.limiter_activations / max(self.matrix_steps, 1.0),
            "refreshes": int(self.refreshes),
            "refresh_seconds": self.refresh_seconds,
            "matrix_steps": int(self.matrix_steps),
        }


class StepMetrics:
    """Sums over the matrix steps of one process since its optimizer was built, or since the run began that it resumes.

    The sums of matrices on a device stay there until they are asked for.

    Attributes:
        refreshes: bases computed or received.
    """

    def __init__(self) -> None:
        self.refreshes = 0
        # By parameter, since ZeRO steps one param group in a call.
        self._steps: dict[Tensor, int] = {}
        self._steps_before = 0
        # By device, in the order of `Totals`: matrix steps, captured energy, limiter activations, residual squares.
        self._sums: dict[torch.device, Tensor] = {}
        self._host = [0.0, 0.0, 0.0, 0.0]
        # By type of device, sums loaded that no matrix on such a device has continued yet.
        self._loaded: dict[str, list[float]] = {}
        self._refresh_seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def count_step(self, param: Tensor) -> int:
        """Count a step of a param group; the same parameter stands for the group each time. Gives the step's number."""
        self._steps[param] = self._steps.get(param, 0) + 1
        return self._steps_before + self._steps[param]

    def next_step(self, param: Tensor) -> int:
        """The number that `count_step` will give."""
        return self._steps_before + self._steps.get(param, 0) + 1

    def count_refresh(self) -> None:
        """Count one new basis."""
        self.refreshes += 1

    def record(self, stats: StepStats, residual_scale: float) -> None:
        """Count one step of a matrix, or of k; nothing is read from a device.

        Args:
            stats: of the step.
            residual_scale: multiplies S in the update.
        """
        if stats.device is not None:
            stats.add_to_(self._of(stats.device), residual_scale)
            return
        # Quicker to add up than tensors are.
        if stats.grad_sq > 0.0:
            shrunk = 1.0 if stats.limiter_divisor is None else stats.limiter_divisor
            self._host[0] += 1.0
            self._host[1] += float(stats.low_rank_sq.sum(-1)) / stats.grad_sq
            self._host[2] += shrunk > 1.0
            self._host[3] += max(stats.residual_sq, 0.0) * (residual_scale / shrunk) ** 2

    @contextmanager
    def refreshing(self, device: torch.device) -> Iterator[None]:
        """Add the time inside the block to that of refreshes; on a GPU by events in its stream, without waiting."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._refresh_seconds += time.perf_counter() - start
            return
        # The stream of the matrices' device, which need not be the current one; only there it waits for their kernels.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(device))
        yield
        end.record(torch.cuda.current_stream(device))
        self._pending.append((begin, end))
        while self._pending and self._pending[0][1].query():
            self._read_oldest()

    def totals(self) -> Totals:
        """The sums as plain numbers; waits for a GPU."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._read_oldest()
        steps = self._steps_before + max(self._steps.values(), default=0)
        on_devices = [*self._loaded.values(), *(sums.tolist() for sums in self._sums.values())]
        together = [sum(values) for values in zip(self._host, *on_devices, strict=True)]
        return Totals(float(steps), *together, float(self.refreshes), self._refresh_seconds)

    def state_dict(self) -> dict[str, Any]:
        """The sums in plain Python, kept apart where they are added up apart; waits for a GPU."""
        totals = self.totals()
        on_devices = {device.type: sums.tolist() for device, sums in self._sums.items()}
        return {
            "steps": int(totals.steps),
            "refreshes": self.refreshes,
            "refresh_seconds": totals.refresh_seconds,
            "host": list(self._host),
            "devices": {**self._loaded, **on_devices},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the sums of `state_dict`: further steps give the same bits as if there had been no pause."""
        self._steps, self._steps_before = {}, int(state["steps"])
        self.refreshes = int(state["refreshes"])
        self._refresh_seconds, self._pending = float(state["refresh_seconds"]), []
        self._host, self._sums = list(state["host"]), {}
        self._loaded = {kind: list(values) for kind, values in state["devices"].items()}

    @staticmethod
    def together(states: Sequence[dict[str, Any]], replicated: bool, counts: bool) -> dict[str, Any]:
        """What one process goes on from where another number of them counted.

        Args:
            states: of the processes of the run that was saved, in order of rank.
            replicated: whether each of them counted the same matrices.
            counts: whether this process takes the sums over; the others of a run with shares begin at zero.
        """
        counted = states[:1] if replicated and counts else states if counts else []
        rows = [row for state in counted for row in (state["host"], *state["devices"].values())]
        return {
            "steps": max(state["steps"] for state in states),
            "refreshes": sum(state["refreshes"] for state in counted),
            "refresh_seconds": max(state["refresh_seconds"] for state in states),
            "host": [sum(column) for column in zip(*rows, strict=True)] or [0.0] * 4,
            "devices": {},
        }

    def _read_oldest(self) -> None:
        begin, end = self._pending.pop(0)
        self._refresh_seconds += begin.elapsed_time(end) / 1000.0

    def _of(self, device: torch.device) -> Tensor:
        if device not in self._sums:
            start = self._loaded.pop(device.type, [0.0] * 4)
            self._sums[device] = torch.tensor(start, dtype=torch.float64, device=device)
        return self._sums[device]
