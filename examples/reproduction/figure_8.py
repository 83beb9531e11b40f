"""Theorem 1 and Figure 8 (Appendix A.1): does averaging over a rank lower the variance of Fira's scaling factor?

Gradients are N(0, sigma^2), independent over steps and elements; sigma = 1 here, since every quantity scales with a
power of it. psi = 1 / sqrt(v_hat) is Adam's adaptive rate after t steps, v_hat the bias-corrected second moment with
beta2 = 0.999, and phi^2 = sum psi_i^2 g_i^2 / sum g_i^2 over the n elements of a vector, n the rank. Three situations:

- "assumed": psi of steps 1 to t, g of a further step. psi is independent of g, as the proof assumes.
- "adam": v_hat contains the g that it is applied to, as in Adam.
- "momentum": phi^2 = sum (m_hat_i psi_i)^2 / sum g_i^2 with Adam's first moment, the factor that Algorithm 1 computes.

    python -m examples.reproduction.figure_8
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import integrate, special

from examples.reproduction.lib import figure_8_report
from examples.reproduction.lib.alone import run_alone
from examples.reproduction.lib.provenance import stamp

NAME = "figure_8"
TITLE = "Theorem 1 and Figure 8: the variance of the scaling factor"
RANKS = (1, 5, 10, 50, 100)  # of Figure 8
SITUATIONS = ("assumed", "adam", "momentum")
QUANTITIES = ("phi", "phi2")


@dataclass(frozen=True)
class Simulation:
    """How the variances are simulated.

    Attributes:
        steps: of training that are recorded, ascending; Figure 8 does not give its own.
        repetitions: independent vectors of `max(RANKS)` elements. A vector of a smaller rank is a part of one, so a
            rank n has `max(RANKS) / n` times as many samples.
        seed: of NumPy's PCG64.
        beta1: of the first moment, in "momentum" alone.
        beta2: of the second moment.
        chunk: repetitions simulated at a time, which bounds the memory.
    """

    steps: tuple[int, ...] = (*range(1, 20), *range(20, 101, 5))
    repetitions: int = 20_000
    seed: int = 2410_01623
    beta1: float = 0.9
    beta2: float = 0.999
    chunk: int = 2_000


class Moments:
    """Power sums of samples for a variance and its standard error.

    Summed about 1, near the mean, so that nothing cancels.
    """

    def __init__(self) -> None:
        """No samples yet."""
        self.count = 0
        self.sums = np.zeros(4)

    def add(self, samples: np.ndarray) -> None:
        """Take in samples of any shape."""
        shifted = samples.ravel() - 1
        squares = shifted * shifted
        self.count += shifted.size
        self.sums += (shifted.sum(), squares.sum(), squares @ shifted, squares @ squares)

    def result(self) -> dict[str, float]:
        """`mean`, `variance` (unbiased), and `error`, its standard error from the fourth central moment."""
        n, (a, b, c, d) = self.count, self.sums / self.count
        second = b - a**2
        fourth = d - 4 * a * c + 6 * a**2 * b - 3 * a**4
        return {
            "mean": float(1 + a),
            "variance": float(second * n / (n - 1)),
            "error": math.sqrt(max(fourth - second**2 * (n - 3) / (n - 1), 0.0) / n),
        }


def simulate(simulation: Simulation, ranks: tuple[int, ...] = RANKS) -> dict[tuple[str, str, int, int], dict[str, Any]]:
    """Simulate phi and phi^2 in every situation.

    Args:
        simulation: steps, repetitions and constants.
        ranks: each a divisor of the largest.

    Returns:
        By (situation, quantity, rank, step): what `Moments.result` gives.
    """
    found: dict[tuple[str, str, int, int], Moments] = {}
    generator = np.random.default_rng(simulation.seed)
    left = simulation.repetitions
    while left > 0:
        size = min(simulation.chunk, left)
        left -= size
        for situation, step, weighted, squares in _steps(simulation, (size, max(ranks)), generator):
            for rank in ranks:
                blocks = (size, -1, rank)
                phi2 = weighted.reshape(blocks).sum(axis=2) / squares.reshape(blocks).sum(axis=2)
                found.setdefault((situation, "phi2", rank, step), Moments()).add(phi2)
                found.setdefault((situation, "phi", rank, step), Moments()).add(np.sqrt(phi2))
    return {key: moments.result() for key, moments in found.items()}


def _steps(
    simulation: Simulation, shape: tuple[int, int], generator: np.random.Generator
) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """(situation, step, squares of the corrected gradients, squares of the gradients) of independent elements."""
    beta1, beta2 = simulation.beta1, simulation.beta2
    first, second = np.zeros(shape), np.zeros(shape)
    for step in range(1, simulation.steps[-1] + 2):
        gradient = generator.standard_normal(shape)
        squares = gradient * gradient
        if step - 1 in simulation.steps:
            # The rate of the steps before this one knows nothing of this gradient.
            yield "assumed", step - 1, squares * ((1 - beta2 ** (step - 1)) / second), squares
        first += (1 - beta1) * (gradient - first)
        second += (1 - beta2) * (squares - second)
        if step not in simulation.steps:
            continue
        rate = (1 - beta2**step) / second
        yield "adam", step, squares * rate, squares
        yield "momentum", step, (first / (1 - beta1**step)) ** 2 * rate, squares


@functools.cache
def rate_moment(power: float, step: int, beta2: float = Simulation.beta2) -> float:
    """E[psi^(2 power)] for sigma = 1, exact for Adam's weighted mean of squares: a one-dimensional integral.

    E[v^-s] is the integral of l^(s-1) E[exp(-l v)] / Gamma(s) over l > 0, and E[exp(-l v)] is the product of
    (1 + 2 l w_j)^-1/2 over the weights w_j of the squares.

    Args:
        power: s; 1/2 gives E[psi], 1 gives E[psi^2], 2 gives E[psi^4].
        step: t.
        beta2: of the second moment.

    Returns:
        Infinity where the moment does not exist, for t <= 2 s.
    """
    if step <= 2 * power:
        return math.inf
    weights = (1 - beta2) * beta2 ** np.arange(step) / (1 - beta2**step)

    # With l = exp(u) the integrand is smooth and falls on both sides.
    def integrand(u: float) -> float:
        return math.exp(power * u - 0.5 * float(np.log1p(2 * math.exp(u) * weights).sum()))

    low = -40 / power
    high = 80 / (step / 2 - power) + 2 * math.log(step + 1)
    value = integrate.quad(integrand, low, high, points=(0.0,), limit=500, epsabs=0, epsrel=1e-10)[0]
    return value / float(special.gamma(power))


def rate_variance(step: int, quantity: str = "phi2", beta2: float = Simulation.beta2) -> float:
    """Var[psi] (of "phi") or Var[psi^2] (of "phi2") after t steps, exact; infinite for t <= 2 and t <= 4."""
    power = {"phi": 0.5, "phi2": 1.0}[quantity]
    second = rate_moment(2 * power, step, beta2)
    return math.inf if math.isinf(second) else second - rate_moment(power, step, beta2) ** 2


def scaled_inverse_chi_square_variance(degrees: float) -> float:
    """Var[psi^2] of the paper's scale-inverse-chi-square distribution with sigma = 1; infinite for p <= 4."""
    return 2 * degrees**2 / ((degrees - 2) ** 2 * (degrees - 4)) if degrees > 4 else math.inf


def compute(simulation: Simulation | None = None) -> dict[str, Any]:
    """Simulate, and put beside every variance what is exact.

    Returns:
        `simulation`, its settings; `exact` by quantity, the variance of the rate at every step (None where infinite);
        `first_order`, Var[psi^2] / (4 E[psi^2]), the paper's equation 30; `variances` by situation, quantity and rank,
        lists over steps of `mean`, `variance` and `error`; `stamp`. Numbers have six digits.
    """
    simulation = simulation or Simulation()
    steps, beta2 = simulation.steps, simulation.beta2
    simulated = simulate(simulation)
    exact = {quantity: [rate_variance(step, quantity, beta2) for step in steps] for quantity in QUANTITIES}
    first_order = [
        variance / (4 * rate_moment(1.0, step, beta2)) if math.isfinite(variance) else math.inf
        for step, variance in zip(steps, exact["phi2"], strict=True)
    ]
    return {
        "simulation": asdict(simulation),
        "exact": {quantity: _rounded(values) for quantity, values in exact.items()},
        "first_order": _rounded(first_order),
        "variances": {
            situation: {
                quantity: {
                    str(rank): {
                        key: _rounded(simulated[situation, quantity, rank, step][key] for step in steps)
                        for key in ("mean", "variance", "error")
                    }
                    for rank in RANKS
                }
                for quantity in QUANTITIES
            }
            for situation in SITUATIONS
        },
        "stamp": stamp(),
    }


def _rounded(values: Iterable[float]) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def section(results: dict[str, Any], figures: Path) -> str:
    """The section of the page, and its plot `theorem.png`."""
    return figure_8_report.section(TITLE, results, figures)


if __name__ == "__main__":
    run_alone(NAME, compute, section)
