"""Energy and time of a subspace refresh by method, on real gradients.

    python -m benchmarks.speed.refresh FOLDER [--models 60m 1b] [--repeats 3] [--no-times | --no-energies] [--json FILE]

FOLDER holds the gradients, or gets them (`benchmarks/quality/gradients.py`). Energy is |P'G|^2 over the largest that a
basis of the rank can have, the least and the mean over the weights of a shape and over the kept steps. A cold start has
no basis; a warm one starts from the method's own basis at the kept step before.

"rotated" is a warm start whose basis need not be ordered, as with `refresh_moments = "rotate"`.

Times are taken in turn on the last gradient of each shape, the svd's over the method's: quote ratios, for machines are
noisy. On a CPU they are the processor's seconds, which other programs stretch less than the clock's. The floor is the
method's operations at the rate measured for G'P; it counts an eigendecomposition as `ds_fira/core/iteration_plan.py`
does. The last column is what one refresh in 200 steps adds to each, in steps of fused AdamW on that weight.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import device_name, medians, save
from benchmarks.communication.partition import LLAMAS
from benchmarks.quality.gradients import RUNS, snapshots
from ds_fira.core.iteration_plan import BFLOAT16_SPEED, cheapest, fast_bfloat16, iteration, operations
from ds_fira.core.subspace import Side, compute_basis, projection_side

# Steps from one refresh to the next, by default.
GAP = 200
WAYS = (("gram", ""), ("randomized", "cold"), ("randomized", "warm"), ("randomized", "rotated"))
Key = tuple[tuple[int, int], int, str, str]  # shape, rank, method, start


def side_of(grad: Tensor) -> Side:
    """The side that is projected by default."""
    return projection_side((grad.shape[0], grad.shape[1]), "std", "released")


def energy(grad: Tensor, basis: Tensor) -> float:
    """|P'G|^2, or |GP|^2 on the right."""
    low_rank = basis.t() @ grad if side_of(grad) == "left" else grad @ basis
    return float(low_rank.double().square().sum())


def energies(grads: list[Tensor], ranks: list[int]) -> dict[Key, list[float]]:
    """Relative energies of one weight's gradients at successive kept steps."""
    found: dict[Key, list[float]] = defaultdict(list)
    warm: dict[int, Tensor] = {}
    rotated: dict[int, Tensor] = {}
    for grad in grads:
        shape, side = (grad.shape[0], grad.shape[1]), side_of(grad)
        short = grad if grad.shape[0] <= grad.shape[1] else grad.t()
        spectrum = torch.linalg.eigvalsh(short @ short.t()).flip(0).double()
        for rank in ranks:
            optimum = float(spectrum[:rank].sum())
            found[shape, rank, "gram", ""].append(energy(grad, compute_basis(grad, rank, side, "gram")) / optimum)
            cold = compute_basis(grad, rank, side, "randomized")
            found[shape, rank, "randomized", "cold"].append(energy(grad, cold) / optimum)
            if rank in warm:
                cold = compute_basis(grad, rank, side, "randomized", warm[rank])
                found[shape, rank, "randomized", "warm"].append(energy(grad, cold) / optimum)
                basis = compute_basis(grad, rank, side, "randomized", rotated[rank], ordered=False)
                found[shape, rank, "randomized", "rotated"].append(energy(grad, basis) / optimum)
                rotated[rank] = basis
            else:
                rotated[rank] = cold
            warm[rank] = cold
    return found


def times(
    earlier: Tensor, grad: Tensor, rank: int, repeats: int, exact: bool = True
) -> dict[tuple[str, str], dict[str, float]]:
    """Median seconds by (method, start), taken in turn, and the floor of each; `exact`: the svd's too."""
    side, device = side_of(grad), grad.device
    previous = compute_basis(earlier, rank, side, "randomized")
    factor = torch.ones(grad.shape[1] if side == "right" else grad.shape[0], rank, device=device)
    weight = torch.nn.Parameter(torch.zeros_like(grad))
    weight.grad = grad
    adamw = torch.optim.AdamW([weight], lr=1e-3, fused=True)
    works: dict[tuple[str, str], Callable[[], object]] = {
        ("svd", ""): lambda: compute_basis(grad, rank, side, "svd"),
        ("gram", ""): lambda: compute_basis(grad, rank, side, "gram"),
        ("randomized", "cold"): lambda: compute_basis(grad, rank, side, "randomized"),
        ("randomized", "warm"): lambda: compute_basis(grad, rank, side, "randomized", previous),
        ("randomized", "rotated"): lambda: compute_basis(grad, rank, side, "randomized", previous, ordered=False),
        ("AdamW", ""): adamw.step,
        ("product", ""): lambda: factor.t() @ grad if side == "left" else grad @ factor,
    }
    if not exact:
        del works["svd", ""]
    for key, work in works.items():
        if key[0] != "svd" or device.type == "cuda":
            work()  # the first call is slower
    taken = medians(works, repeats, device, clock=time.perf_counter if device.type == "cuda" else time.process_time)
    rate = 2.0 * grad.numel() * rank / taken.pop(("product", ""))
    speed = BFLOAT16_SPEED if fast_bfloat16(device) else 1.0
    s, b = sorted(grad.shape)
    result = {}
    for (method, start), value in taken.items():
        plan = iteration(
            s, b, rank, start in ("warm", "rotated"), start != "rotated", folds=speed == 1.0 and device.type == "cpu"
        )
        costs = operations(s, b, plan, device.type, speed)
        way = "exact" if method == "gram" else cheapest(s, b, plan, device.type, speed)
        floor = costs[way] / rate if method in ("gram", "randomized") else math.nan
        result[method, start] = {"seconds": value, "floor_seconds": floor}
    return result


def ranks_of(model: str) -> list[int]:
    """The paper's rank, a quarter of the width, and low ranks."""
    return [16, 64, LLAMAS[model][4]] if model == "60m" else [128, LLAMAS[model][4]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-times", action="store_true", help="energies only")
    parser.add_argument("--no-energies", action="store_true", help="times only, which are few decompositions")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if args.device == "auto" else args.device)
    print(f"{device_name(device)}, torch {torch.__version__}, float32")
    print(f"{'model':6}{'shape':>12}{'rank':>6}  {'method':11}{'start':8}{'least energy':>13}{'mean':>8}", end="")
    print(f"{'svd / method':>14}{'floor / time':>14}{'/ 200 AdamW':>14}")
    rows = []
    for model in args.models:
        kept = {
            step: {weight: grad.to(device) for weight, grad in grads.items()}
            for step, grads in snapshots(model, args.folder).items()
        }
        found: dict[Key, list[float]] = defaultdict(list)
        timed: dict[tuple[int, int], dict] = {}
        for weight in next(iter(kept.values())):
            series = [grads[weight] for grads in kept.values()]
            shape = (series[0].shape[0], series[0].shape[1])
            if args.no_energies:
                found |= {(shape, LLAMAS[model][4], method, start): [math.nan] for method, start in WAYS}
            else:
                for key, values in energies(series, ranks_of(model)).items():
                    found[key] += values
            if shape not in timed and not args.no_times:
                timed[shape] = times(series[-2], series[-1], LLAMAS[model][4], args.repeats)
        for (shape, rank, method, start), values in sorted(found.items()):
            row = {"model": model, "shape": shape, "rank": rank, "method": method, "start": start}
            row |= {"least_energy": min(values), "mean_energy": statistics.fmean(values), "gradients": len(values)}
            if shape in timed and rank == LLAMAS[model][4]:
                row |= timed[shape][method, start]
                row["speed"] = timed[shape]["svd", ""]["seconds"] / row["seconds"]
                row["share_of_adamw"] = row["seconds"] / GAP / timed[shape]["AdamW", ""]["seconds"]
            rows.append(row)
            print(f"{model:6}{shape[0]:>6} x{shape[1]:>4}{rank:>6}  {method:11}{start:8}", end="")
            print(f"{row['least_energy']:>13.5f}{row['mean_energy']:>8.5f}", end="")
            floor = f"{row['speed']:>14.1f}{row['floor_seconds'] / row['seconds']:>14.2f}" if "speed" in row else ""
            print(floor + (f"{row['share_of_adamw']:>14.3f}" if floor else ""))
    means = {}
    for model in args.models:
        for method, start in WAYS:
            speeds = [
                row["speed"]
                for row in rows
                if "speed" in row and (row["model"], row["method"], row["start"]) == (model, method, start)
            ]
            if speeds:
                means[f"{model} {method} {start}".strip()] = statistics.geometric_mean(speeds)
    for what, mean in means.items():
        print(f"geometric mean of svd / method, {what}: {mean:.1f}")
    save(args.json, device, speed=means, rows=rows)


if __name__ == "__main__":
    main()
