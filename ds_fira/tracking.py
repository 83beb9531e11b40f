"""What a run tells of Fira at work: captured energy, limiter activations, refreshes."""

from __future__ import annotations

import torch
from torch import Tensor


class StepMetrics:
    """Sums over the matrix steps of one process since its optimizer was built; not part of a checkpoint.

    The sums of matrices on a device stay there until they are asked for.

    Attributes:
        refreshes: bases computed or received.
    """

    def __init__(self) -> None:
        self.refreshes = 0
        # By device: matrix steps, captured energy, limiter activations.
        self._sums: dict[torch.device, Tensor] = {}
        self._host = [0.0, 0.0, 0.0]

    def record_energy(
        self, low_rank_square: Tensor, grad_square: Tensor, usable: Tensor, on_host: bool = False
    ) -> None:
        """Count steps of matrices.

        Args:
            low_rank_square: |R|^2, (k,) or 0-dim.
            grad_square: |G|^2.
            usable: whether G is finite.
            on_host: whether they are 0-dim and may be read at once.
        """
        if on_host:
            # Quicker to add up than tensors are.
            low_rank, whole = float(low_rank_square), float(grad_square)
            if whole > 0.0 and bool(usable):
                self._host[0] += 1.0
                self._host[1] += low_rank / whole
            return
        counted = usable & (grad_square > 0.0)
        sums = self._of(grad_square.device)
        sums[0] += counted.sum()
        sums[1] += torch.where(counted, low_rank_square / grad_square, 0.0).sum()

    def record_limiter(self, active: Tensor) -> None:
        """Count matrix steps in which the limiter shrank the residual."""
        self._of(active.device)[2] += active.sum()

    @property
    def matrix_steps(self) -> int:
        """Matrices stepped with a gradient that is finite and not zero, summed over steps."""
        return int(self._total(0))

    @property
    def captured_energy_sum(self) -> float:
        """Sum of |P'G|^2 / |G|^2 over those."""
        return self._total(1)

    @property
    def limiter_activations(self) -> int:
        """Matrix steps in which the limiter shrank the residual."""
        return int(self._total(2))

    def totals(self) -> dict[str, float]:
        """The sums as plain numbers, for other processes; waits for a GPU."""
        return {
            "matrix_steps": self.matrix_steps,
            "captured_energy_sum": self.captured_energy_sum,
            "limiter_activations": self.limiter_activations,
            "refreshes": self.refreshes,
        }

    def _of(self, device: torch.device) -> Tensor:
        if device not in self._sums:
            self._sums[device] = torch.zeros(3, dtype=torch.float64, device=device)
        return self._sums[device]

    def _total(self, index: int) -> float:
        return self._host[index] + sum(float(sums[index]) for sums in self._sums.values())
