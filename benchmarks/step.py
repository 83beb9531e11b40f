"""Time of one optimizer step without a refresh, beside PyPI `fira` and `torch.optim.AdamW`, in one run on one device.

    python benchmarks/step.py [--models 60m 130m] [--repeats 9] [--json FILE]

For every distinct matrix shape of a LLaMA of the paper, at the paper's rank, the three optimizers step the same
gradient in turn; the figure is the ratio of medians. Machines are noisy: quote ratios, not times.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable

import fira
import torch

import ds_fira
from benchmarks.layout import LLAMAS


def stepper(
    make: Callable[[list], torch.optim.Optimizer], shape: tuple[int, int], rank: int | None
) -> Callable[[], None]:
    """A function that makes one step of a fresh optimizer on one weight, its first (refresh) step already made."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
    group = {"params": [weight]}
    if rank is not None:
        group |= {"rank": rank, "update_proj_gap": 10**9, "alpha": 0.25, "proj_type": "std"}
    optimizer = make([group])
    weight.grad = torch.randn(shape, generator=generator)
    optimizer.step()
    return optimizer.step


def seconds(step: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(shape: tuple[int, int], rank: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step of each optimizer, taken in turn."""
    steps = {
        "fira": stepper(lambda groups: fira.FiraAdamW(groups, lr=1e-3, no_deprecation_warning=True), shape, rank),
        "ds_fira": stepper(lambda groups: ds_fira.FiraAdam(groups, lr=1e-3), shape, rank),
        "AdamW": stepper(lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True), shape, None),
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["60m", "130m", "350m"], choices=[m for m in LLAMAS if m != "7b"]
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="also write the medians to this file")
    args = parser.parse_args()
    print(f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print(f"{'model':6}{'shape':>14}{'rank':>6}{'ds_fira / fira':>16}{'ds_fira / AdamW':>17}")
    rows, ratios = [], []
    for model in args.models:
        hidden, intermediate, _, _, rank = LLAMAS[model]
        for shape in ((hidden, hidden), (intermediate, hidden), (hidden, intermediate)):
            times = compare(shape, rank, args.repeats)
            ratios.append(times["ds_fira"] / times["fira"])
            rows.append({"model": model, "shape": shape, "rank": rank, "seconds": times})
            print(
                f"{model:6}{shape[0]:>8} x{shape[1]:>5}{rank:>5}{ratios[-1]:>16.2f}"
                f"{times['ds_fira'] / times['AdamW']:>17.2f}"
            )
    mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
    print(f"geometric mean of ds_fira / fira: {mean:.2f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
