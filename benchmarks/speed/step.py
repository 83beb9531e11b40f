"""Time of one optimizer step without a refresh beside its peers, in one run on one device.

    python -m benchmarks.speed.step [--models small 60m 130m 350m 1b] [--peers fira AdamW ...] [--threads 1 2]
    python -m benchmarks.speed.step --partition-of 8 --models 7b [--ranks 256 1024]     # one rank's share

The first form steps every distinct matrix shape of a LLaMA of the paper at the paper's rank, all optimizers in turn
on the same gradient; the figures are ratios of medians, of processor time with one thread on a CPU, or, with
OMP_WAIT_POLICY=passive, of the first thread's with several, else of wall time. On a GPU peers are stepped with torch's
products in float32, their default, and in TF32, which is ours. The second builds the flat partitions that rank 0 of N
holds under ZeRO-2 and steps them as the engine does, beside fused AdamW on the same flat tensors; the amortised step
counts one refresh in 200 steps. The floor is measured in turn with the optimizers, of the same shapes: both products,
the second one accumulated into W, another reading of G, and Adam on R.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import torch

from benchmarks.common import default_device, device_name, geometric_mean, medians, save, seconds
from benchmarks.communication.partition import LLAMAS, llama_shapes, plan_llama_run, rank_partition
from benchmarks.peers import PEERS, available, make_ds_fira
from ds_fira.core.functional import fused_adam_
from ds_fira.core.precision import matmul_precision
from ds_fira.core.subspace import low_rank_shape, projection_side

# Elements under which a step is repeated more often, for it is short.
SMALL = 2**20
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


def floor(shape: tuple[int, int], rank: int, device: torch.device) -> Callable[[], object]:
    """A function that does what no float32 step of one matrix can do without, and nothing between.

    That is two products, of which each reads G or reads and writes W, Adam on R, and G once more, for its part of the
    update or for the residual's norm.
    """
    left = projection_side(shape, "std", "released") == "left"
    grad, weight = (torch.randn(shape, device=device) for _ in range(2))
    basis = torch.linalg.qr(torch.randn(min(shape), min(rank, *shape), device=device))[0].contiguous()
    low_rank, update, exp_avg, exp_avg_sq = (
        torch.zeros(low_rank_shape(shape, rank, "left" if left else "right"), device=device) for _ in range(4)
    )

    def work() -> None:
        torch.mm(*((basis.t(), grad) if left else (grad, basis)), out=low_rank)
        torch.linalg.vector_norm(grad)
        fused_adam_(update, low_rank, exp_avg, exp_avg_sq, step_size=1e-3, betas=(0.9, 0.999), eps=1e-6)
        weight.addmm_(*((basis, update) if left else (update, basis.t())), alpha=-1e-3)

    return work


def clock_of(device: torch.device, threads: int) -> Callable[[], float]:
    """Processor time on a CPU, of which what else a machine runs takes no part, else wall time.

    Of several threads the first one's, which does all that is not shared out, if it sleeps where it waits for others
    (OMP_WAIT_POLICY=passive); it would count its waiting otherwise, and so would the sum over all.
    """
    if device.type == "cpu" and threads == 1:
        return time.process_time
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    return time.thread_time if device.type == "cpu" and passive else time.perf_counter


def by_shape(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Step every shape with every optimizer and print the table of ratios."""
    peers, reasons = available(args.peers, device)
    for name, reason in reasons.items():
        print(f"{name} does not run here: {reason}")
    # On a GPU ours multiply in TF32 by default, and torch does not.
    precisions = ("float32", "tf32") if device.type == "cuda" else ("float32",)
    columns = [name + mark for name in peers for mark in ("", " tf32")[: len(precisions)]]
    print(
        f"{'threads':>7} {'model':6}{'shape':>14}{'rank':>6}{'/ floor':>9}"
        + "".join(f"{'/ ' + n:>16}" for n in columns)
    )
    rows: list[dict[str, Any]] = []
    settings = {"state_dtype": args.state_dtype, "matmul_precision": args.matmul_precision, "subspace": "randomized"}
    named = {"small": [((128, 128), 32), ((512, 512), 128)]}
    named |= {model: [(shape, LLAMAS[model][4]) for shape in llama_shapes(model)] for model in LLAMAS}
    threads = args.threads or [torch.get_num_threads()]
    for number, model in product(threads, args.models):
        torch.set_num_threads(number)
        for shape, rank in named[model]:
            steps = {"ds_fira": stepper(lambda p, r: make_ds_fira(p, r, **settings), shape, rank, device)}
            steps |= {**peer_steps(peers, shape, rank, device, precisions), "floor": floor(shape, rank, device)}
            clock = clock_of(device, number)
            small = max(1, SMALL // (shape[0] * shape[1]))
            times = medians(steps, args.repeats * small, device, clock)
            del steps
            rows.append({"threads": number, "model": model, "shape": shape, "rank": rank, "seconds": times})
            ratios = "".join(f"{times['ds_fira'] / times[name]:>16.2f}" for name in columns)
            over = times["ds_fira"] / times["floor"]
            print(
                f"{number:7} {model:6}{shape[0]:>8} x{shape[1]:>5}{rank:>5}{over:>9.2f}{ratios}",
                flush=True,
            )
    means = {
        f"{number} threads": {
            name: geometric_mean(
                row["seconds"]["ds_fira"] / row["seconds"][name] for row in rows if row["threads"] == number
            )
            for name in ("floor", *columns)
        }
        for number in threads
    }
    for name, found in means.items():
        print(f"{'geometric mean, ' + name:34}{found['floor']:>9.2f}" + "".join(f"{found[n]:>16.2f}" for n in columns))
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
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="of a CPU, one table each")
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
