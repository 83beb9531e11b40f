"""How far 8-bit states take a step off where the columns or rows of a gradient differ in scale.

A block of 256 elements shares a scale, and on the left it runs over 256 columns of R, on the right over 256 / r rows.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.int8_scales
"""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import nn

from ds_fira import FiraAdam

SIZE, LONG, RANK, STEPS, LAST = 48, 512, 16, 24, 8
SPREADS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e6)
CASES = (
    ("left", RANK, "int8", "mixed"),
    ("left", RANK, "int8", "sorted"),
    ("right", RANK, "int8", "mixed"),
    ("left", None, "int8", "mixed"),
    ("right", None, "int8", "mixed"),
    ("left", RANK, "bfloat16", "mixed"),
)


def step_error(
    spread: float, side: str, rank: int | None = RANK, state_dtype: str = "int8", order: str = "mixed"
) -> float:
    """The relative error of the last steps' sum against that of float32 states, over lines weighted alike.

    Args:
        spread: quotient of the largest and the smallest scale of a column (left) or row (right).
        side: which side is projected.
        rank: None for AdamW's part.
        state_dtype: of the states that are compared.
        order: of the scales over the lines: "mixed" at random, "sorted" so that neighbours are alike.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (SIZE, LONG) if side == "left" else (LONG, SIZE)
    lines = torch.logspace(0.0, -1.0, LONG, base=spread)
    if order == "mixed":
        lines = lines[torch.randperm(LONG, generator=generator)]
    scales = lines if side == "left" else lines.unsqueeze(1)
    gradients = [torch.randn(shape, generator=generator) * scales for _ in range(STEPS)]
    moved = []
    for kept in ("float32", state_dtype):
        param = nn.Parameter(torch.zeros(shape))
        beside = nn.Parameter(torch.zeros(2, 3))
        groups = [{"params": [param], "rank": rank}, {"params": [beside], "rank": 1}]
        # eps far below every scale: it is not what is looked at.
        settings = {"eps": 1e-12, "proj_type": side, "residual_scale": 0.0, "subspace": "gram"}
        optimizer = FiraAdam(groups, lr=1.0, state_dtype=kept, **settings)
        for step, gradient in enumerate(gradients):
            if step == STEPS - LAST:
                start = param.detach().clone()
            param.grad = gradient.clone()
            optimizer.step()
        moved.append(param.detach() - start)
    along = 0 if side == "left" else 1
    exact, found = moved
    errors = (found - exact).norm(dim=along) / exact.norm(dim=along)
    return float(errors.square().mean().sqrt())


def main() -> None:
    """Print the table of docs/numerics.md."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("side  rank states    order   " + "".join(f"{spread:>9g}" for spread in SPREADS))
    for side, rank, kept, order in CASES:
        values = [step_error(spread, side, rank, kept, order) for spread in SPREADS]
        print(f"{side:<6}{rank or '-':<5}{kept:<10}{order:<8}" + "".join(f"{value:>9.1%}" for value in values))


if __name__ == "__main__":
    main()
