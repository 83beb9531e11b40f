"""Products of several matrices of one shape as one batch, over a loop of single products: what a device prefers.

    python -m benchmarks.speed.batching [--models 60m 1b] [--json FILE]

The two products of a step, for 4 matrices of every shape of a LLaMA; below 1 the batch is faster.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.common import default_device, device_name, geometric_mean, medians, save
from benchmarks.communication.partition import LLAMAS, llama_shapes

COUNT = 4


def compare(shape: tuple[int, int], rank: int, device: torch.device) -> tuple[float, float]:
    """Time of a batch over that of a loop: projection, back-projection into the weights."""
    m, n = shape
    basis, grad, carried = (torch.randn(COUNT, *size, device=device) for size in ((m, rank), (m, n), (rank, n)))
    taken = medians(
        {
            "project batch": lambda: basis.mT @ grad,
            "project loop": lambda: [basis[i].mT @ grad[i] for i in range(COUNT)],
            "back batch": lambda: grad.baddbmm_(basis, carried, alpha=-1e-9),
            "back loop": lambda: [grad[i].addmm_(basis[i], carried[i], alpha=-1e-9) for i in range(COUNT)],
        },
        9,
        device,
    )
    return taken["project batch"] / taken["project loop"], taken["back batch"] / taken["back loop"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["60m", "1b"], choices=list(LLAMAS))
    parser.add_argument("--json", help="also write the ratios to this file")
    args = parser.parse_args()
    device = default_device()
    print(device_name(device))
    rows = []
    for model in args.models:
        for shape in llama_shapes(model):
            project, back = compare(shape, LLAMAS[model][4], device)
            rows.append({"model": model, "shape": shape, "project": project, "back": back})
            print(f"{model:6}{shape[0]:>6} x{shape[1]:>5}  project {project:.2f}  back {back:.2f}")
    print(f"geometric mean {geometric_mean(row[key] for row in rows for key in ('project', 'back')):.2f}")
    save(args.json, device, rows=rows)


if __name__ == "__main__":
    main()
