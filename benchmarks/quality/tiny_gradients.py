"""How long the limiter holds the residual back after a first gradient that is tiny, and what helps.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.tiny_gradients

Least squares of a 64 x 96 matrix at rank 8 with noisy gradients, the first of which is scaled down.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.common import device_name
from ds_fira import FiraAdam

ROWS, COLUMNS, RANK, SAMPLES, STEPS = 64, 96, 8, 128, 400
SHOWN = (1, 100, 200, 400)
VARIANTS: dict[str, tuple[float, dict[str, Any]]] = {
    "as it is": (1.0, {}),
    "as it is, eps 1e-12": (1.0, {"eps": 1e-12}),
    "1e-3": (1e-3, {}),
    "1e-6": (1e-6, {}),
    "1e-9": (1e-9, {}),
    "1e-9, eps 1e-10": (1e-9, {"eps": 1e-10}),
    "1e-9, eps 1e-12": (1e-9, {"eps": 1e-12}),
    "1e-9, gamma 1.05": (1e-9, {"gamma": 1.05}),
    "1e-9, gamma 1.1": (1e-9, {"gamma": 1.1}),
}


def descend(first_scale: float, settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean squared error and norm of the residual after every step.

    Args:
        first_scale: multiplies the first gradient.
        settings: of FiraAdam.
    """
    torch.manual_seed(0)
    target, weight = torch.randn(ROWS, COLUMNS), torch.nn.Parameter(torch.zeros(ROWS, COLUMNS))
    generator = torch.Generator().manual_seed(1)
    optimizer = FiraAdam([{"params": [weight], "rank": RANK, **settings}], lr=0.01)
    losses, norms = [], []
    for step in range(STEPS):
        inputs = torch.randn(SAMPLES, COLUMNS, generator=generator)
        grad = (weight - target).detach() @ inputs.t() @ inputs / SAMPLES
        weight.grad = grad * (first_scale if step == 0 else 1.0)
        optimizer.step()
        losses.append(float((weight - target).detach().square().mean()))
        norms.append(float(optimizer.state[weight]["residual_norm"]))
    return losses, norms


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(device_name(torch.device("cpu")))
    print(f"{'first gradient':22}" + "".join(f"{f'|S| at {step}':>12}{f'loss at {step}':>13}" for step in SHOWN))
    for name, (first_scale, settings) in VARIANTS.items():
        losses, norms = descend(first_scale, settings)
        row = "".join(f"{norms[step - 1]:>12.2e}{losses[step - 1]:>13.3f}" for step in SHOWN)
        print(f"{name:22}{row}", flush=True)


if __name__ == "__main__":
    main()
