"""Time of one optimizer step without a refresh beside its peers, in one run on one device.

    python -m benchmarks.speed.step [--models small 60m 130m 350m 1b] [--peers fira AdamW ...] [--json FILE]
    python -m benchmarks.speed.step --partition-of 8 --models 7b [--ranks 256 1024]     # one rank's share

The first form steps every distinct matrix shape of a LLaMA of the paper at the paper's rank, all optimizers in turn
on the same gradient; the figures are ratios of medians. On a GPU peers are stepped with torch's products in float32,
their default, and in TF32, which is ours. The second builds the flat partitions that rank 0 of N holds under ZeRO-2
and steps them as the engine does, beside fused AdamW on the same flat tensors; the amortised step counts one refresh
in 200 steps. The floor is the bytes that a step must move (gradient read twice, weight read and written, states) over
the bandwidth of a copy, plus its matrix products over the rate of one, both measured in the run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from benchmarks.common import default_device, device_name, geometric_mean, medians, rates, save, seconds
from benchmarks.communication.partition import LLAMAS, llama_shapes, plan_llama_run, rank_partition
from benchmarks.peers import PEERS, available, make_ds_fira
from ds_fira.core.precision import matmul_precision
from ds_fira.core.subspace import low_rank_shape, projection_side

GAP = 200  # steps from one refresh to the next, for the amortised step


def stepper(make: Callable[..., torch.optim.Optimizer], shape: tuple[int, int], rank: int, device: torch.device):
    """A function that makes one step of a fresh optimizer on one weight, its first (refresh) step already made."""
    generator = torch.Generator(device).manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02)
    param.grad = torch.randn(shape, generator=generator, device=device)
    optimizer = make(param, rank)
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer.step()
    return optimizer.step


def peer_steps(
    peers: Iterable[str], shape: tuple[int, int], rank: int, device: torch.device, precisions: Sequence[str]
) -> dict[str, Callable[[], object]]:
    """What steps every peer, with torch's products in each of some precisions; the first has no mark in the name."""

    def at(precision: str, step: Callable[[], object]) -> Callable[[], object]:
        @matmul_precision(precision)
        def stepped() -> object:
            return step()

        return stepped

    steps = {name: stepper(PEERS[name], shape, rank, device) for name in peers}
    marks = {precision: f" {precision}" if number else "" for number, precision in enumerate(precisions)}
    return {name + mark: at(precision, step) for name, step in steps.items() for precision, mark in marks.items()}


def step_and_refresh(optimizer: torch.optim.Optimizer, repeats: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and of a cold refresh; what starts with a process (kernels, handles) is in neither."""
    optimizer.step()
    optimizer.state.clear()
    first = seconds(optimizer.step, device)
    step = medians({"step": optimizer.step}, repeats, device)["step"]
    return step, max(0.0, first - step)


def floor_seconds(shape: tuple[int, int], rank: int, flops: float, bandwidth: float) -> float:
    """What a float32 step of one matrix cannot go below at the measured rates."""
    m, n = shape
    a, b = low_rank_shape(shape, rank, projection_side(shape, "std", "released"))
    r = min(rank, m, n)
    # G twice, W both ways; both moments both ways, R and C both ways, the basis twice.
    moved = 4 * (4 * m * n + 8 * a * b + 2 * r * min(m, n))
    return moved / bandwidth + 4 * m * n * r / flops


def by_shape(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Step every shape with every optimizer and print the table of ratios."""
    peers, reasons = available(args.peers, device)
    for name, reason in reasons.items():
        print(f"{name} does not run here: {reason}")
    flops, bandwidth = rates(device)
    print(f"product {flops / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s")
    # On a GPU ours multiply in TF32 by default, and torch does not.
    precisions = ("float32", "tf32") if device.type == "cuda" else ("float32",)
    columns = [name + mark for name in peers for mark in ("", " tf32")[: len(precisions)]]
    print(f"{'model':6}{'shape':>14}{'rank':>6}{'/ floor':>9}" + "".join(f"{'/ ' + name:>16}" for name in columns))
    rows: list[dict[str, Any]] = []
    settings = {"state_dtype": args.state_dtype, "matmul_precision": args.matmul_precision, "subspace": "randomized"}
    named = {"small": [((128, 128), 32), ((512, 512), 128)]}
    named |= {model: [(shape, LLAMAS[model][4]) for shape in llama_shapes(model)] for model in LLAMAS}
    for model in args.models:
        for shape, rank in named[model]:
            steps = {"ds_fira": stepper(lambda p, r: make_ds_fira(p, r, **settings), shape, rank, device)}
            steps |= peer_steps(peers, shape, rank, device, precisions)
            times = medians(steps, args.repeats, device)
            del steps
            floor = floor_seconds(shape, rank, flops, bandwidth)
            rows.append({"model": model, "shape": shape, "rank": rank, "seconds": times, "floor_seconds": floor})
            ratios = "".join(f"{times['ds_fira'] / times[name]:>16.2f}" for name in columns)
            print(f"{model:6}{shape[0]:>8} x{shape[1]:>5}{rank:>5}{times['ds_fira'] / floor:>9.2f}{ratios}", flush=True)
    means = {name: geometric_mean(row["seconds"]["ds_fira"] / row["seconds"][name] for row in rows) for name in columns}
    print(f"{'geometric mean':35}" + "".join(f"{means[name]:>16.2f}" for name in columns))
    return {"settings": settings, "rows": rows, "ratio_geometric_means": means, "not_run": reasons}


def by_partition(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Step one rank's partitions, and refresh them once, beside fused AdamW on the same tensors."""
    rows = []
    columns = "".join(f"{name:>10}" for name in ("step", "refresh", "AdamW"))
    print(f"{'model':6}{'ranks':>6}{'rank':>6}{'elements':>11}{columns}{'amortised / AdamW':>19}")
    for model in args.models:
        for rank in args.ranks or [LLAMAS[model][4]]:
            run = plan_llama_run(
                model,
                args.partition_of,
                rank=rank,
                alpha=0.25,
                update_proj_gap=GAP,
                subspace=args.subspace,
                state_dtype=args.state_dtype,
                matmul_precision=args.matmul_precision,
            )
            optimizer, flats = rank_partition(run, 0, device)
            step, refresh = step_and_refresh(optimizer, args.repeats, device)
            optimizer.state.clear()
            adamw = torch.optim.AdamW(flats, lr=1e-3, fused=True)
            adamw.step()
            peer = medians({"AdamW": adamw.step}, args.repeats, device)["AdamW"]
            del adamw
            elements = sum(flat.numel() for flat in flats)
            ratio = (step + refresh / GAP) / peer
            print(
                f"{model:6}{args.partition_of:>6}{rank:>6}{elements / 1e6:>9.1f} M{step:>8.3f} s{refresh:>8.2f} s"
                f"{peer:>8.3f} s{ratio:>19.2f}",
                flush=True,
            )
            rows.append(
                {
                    "model": model,
                    "ranks": args.partition_of,
                    "rank": rank,
                    "elements": elements,
                    "step_seconds": step,
                    "cold_refresh_seconds": refresh,
                    "adamw_seconds": peer,
                    "amortised_over_adamw": ratio,
                }
            )
            del optimizer, flats
    return {"partition_rows": rows, "subspace": args.subspace, "matmul_precision": args.matmul_precision}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["60m", "130m", "350m", "1b"], choices=["small", *LLAMAS])
    parser.add_argument("--peers", nargs="*", default=["fira", "AdamW"], choices=list(PEERS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--partition-of", type=int, metavar="N", help="step one rank's share of N under ZeRO-2 instead")
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="subspace ranks for --partition-of, instead of the paper's"
    )
    parser.add_argument("--subspace", default="randomized", help="method of the refresh in --partition-of")
    parser.add_argument("--state-dtype", default="float32")
    parser.add_argument("--matmul-precision", default="tf32")
    parser.add_argument("--json", help="also write the medians to this file")
    args = parser.parse_args()
    device = default_device()
    print(device_name(device))
    results = by_partition(args, device) if args.partition_of else by_shape(args, device)
    save(args.json, device, **results)


if __name__ == "__main__":
    main()
