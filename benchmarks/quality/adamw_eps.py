"""How far AdamW's part of FiraAdam, as the released code has it, is from torch.optim.AdamW.

The released code divides by sqrt(V) + eps and corrects the step size, torch corrects V before it adds eps; and the
released code decays the weights after the step, torch before it.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.adamw_eps
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from ds_fira import FiraAdam

SIZES = (1.0, 1e-3, 1e-5, 1e-7)
SHOWN = (1, 10, 100, 1000)
ELEMENTS = 1000
LR = 1e-3


def differences(size: float, eps: float = 1e-6, theirs: float | None = None, **settings: Any) -> list[float]:
    """|ours - torch's| / |torch's change of the weights| after each of the steps `SHOWN`.

    Args:
        size: of the gradients, normally distributed.
        eps: ours.
        theirs: torch's eps; None for the same.
        **settings: of both.
    """
    generator = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(ELEMENTS, generator=generator)
    ours, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    groups = [{"params": [ours]}, {"params": [nn.Parameter(torch.zeros(2, 3))], "rank": 1}]
    both = (
        FiraAdam(groups, lr=LR, eps=eps, **settings),
        torch.optim.AdamW([other], lr=LR, eps=eps if theirs is None else theirs, **{"weight_decay": 0.0, **settings}),
    )
    found = []
    for step in range(1, SHOWN[-1] + 1):
        gradient = size * torch.randn(ELEMENTS, generator=generator)
        for param, optimizer in zip((ours, other), both, strict=True):
            param.grad = gradient.clone()
            optimizer.step()
        if step in SHOWN:
            found.append(float((ours - other).detach().norm() / (other.detach() - start).norm()))
    return found


def main() -> None:
    """Print the table of docs/numerics.md."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'gradients':28}" + "".join(f"{f'step {step}':>12}" for step in SHOWN))
    for size in SIZES:
        print(f"{f'{size:g}, eps 1e-6 in both':28}" + "".join(f"{value:>12.2e}" for value in differences(size)))
    for size in SIZES:
        values = differences(size, theirs=1e-8)
        print(f"{f'{size:g}, 1e-6 and 1e-8':28}" + "".join(f"{value:>12.2e}" for value in values))
    values = differences(1.0, weight_decay=0.1)
    print(f"{'1, weight decay 0.1':28}" + "".join(f"{value:>12.2e}" for value in values))


if __name__ == "__main__":
    main()
