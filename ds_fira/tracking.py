"""What a run tells of Fira at work: captured energy, limiter activations, refreshes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StepMetrics:
    """Sums over the matrix steps of one process since its optimizer was built; not part of a checkpoint.

    Attributes:
        matrix_steps: matrices stepped with a gradient that is not zero, summed over steps.
        captured_energy_sum: sum of |P'G|^2 / |G|^2 over those.
        limiter_activations: matrix steps in which the limiter shrank the residual.
        refreshes: bases computed or received.
    """

    matrix_steps: int = 0
    captured_energy_sum: float = 0.0
    limiter_activations: int = 0
    refreshes: int = 0

    def record_energy(self, low_rank_square: float, grad_square: float) -> None:
        """Count one matrix step with |R|^2 and |G|^2."""
        if grad_square > 0.0:
            self.matrix_steps += 1
            self.captured_energy_sum += low_rank_square / grad_square
