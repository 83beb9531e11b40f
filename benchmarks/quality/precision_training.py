"""Validation loss by the precision of the optimizer's products, seed by seed: is bfloat16 good enough?

    python -m benchmarks.quality.precision_training FOLDER [--precisions float32 tf32 bfloat16] [--seeds 0 1 2]
    [--steps 400] [--layers 4] [--rank 32] [--gap 50] [--preset recommended] [--json FILE]

A LLaMA of about one million parameters on the packaged film reviews (prepared once in FOLDER), trained by `FiraAdam`
with the settings of `ds_configs/`, of the published method or of a preset. The products are emulated wherever this
runs: their operands are rounded to what the kernels round them to on a GPU (G, P, R and C; not the G of phi * G), and
multiplied and added in float32. All runs of a seed see the same weights and batches. A run that is done is kept in
FOLDER, and not made again: an interrupted command goes on where it was. Printed are the losses, in nats per token, and
for every precision the differences to float32 by seed, their mean and its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

from benchmarks.common import default_device, save
from benchmarks.quality.gradients import TextData, text
from benchmarks.quality.precision import OPERANDS, emulated
from benchmarks.quality.refresh_quality import VOCAB_SIZE, final_loss
from ds_fira.core import subspace_solvers
from ds_fira.optim.presets import PRESETS

REFERENCE = "float32"
SETTINGS = {"subspace": "randomized", "refresh_moments": "rotate"}


def loss_of(data: TextData, precision: str, seed: int, args: argparse.Namespace) -> float:
    """Final validation loss of one run, read where it was made before with the same options."""
    options = {name: getattr(args, name) for name in ("steps", "batch_size", "seq_length", "layers", "rank", "gap")}
    key = "-".join([precision, f"seed{seed}", *(f"{name}{value}" for name, value in options.items())])
    preset = {} if args.preset is None else {"preset": args.preset}
    key += "".join(f"-{name}" for name in preset.values())
    kept = args.folder / f"precision-{key}.json"
    if kept.exists():
        return json.loads(kept.read_text())["loss"]
    start = time.perf_counter()
    with emulated(precision):
        loss = final_loss(
            data,
            seed,
            args,
            rank=args.rank,
            update_proj_gap=args.gap,
            # On a CPU products under "tf32", the default, are in float32; "float32" would refresh in another way too.
            matmul_precision="tf32" if precision == REFERENCE else precision.removesuffix(", cut"),
            **SETTINGS,
            **preset,
        )
    scratch = kept.with_suffix(".partial")
    scratch.write_text(json.dumps({"loss": loss, "seconds": time.perf_counter() - start}))
    scratch.rename(kept)
    return loss


def differences(losses: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of every precision to the reference, seed by seed, as far as both have run."""
    reference = losses[REFERENCE]
    return {
        precision: [loss - other for loss, other in zip(found, reference, strict=False)]
        for precision, found in losses.items()
        if precision != REFERENCE
    }


def said(precision: str, found: list[float]) -> str:
    """A line of paired differences."""
    spread = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    by_seed = " ".join(f"{value:+.4f}" for value in found)
    return f"{precision:12} to {REFERENCE}: {statistics.fmean(found):+.4f} +- {spread:.4f}   by seed {by_seed}"


def main() -> None:
    """A line for each run, then the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precisions", nargs="+", default=["float32", "tf32", "bfloat16"], choices=list(OPERANDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gap", type=int, default=50)
    parser.add_argument("--preset", choices=PRESETS, help="instead of the published method")
    parser.add_argument("--json", help="also write the losses to this file")
    args = parser.parse_args()
    # As in larger models, whose bases are not found exactly.
    subspace_solvers.cheapest = lambda *_: "direct"
    data = text(args.folder, args.seq_length, VOCAB_SIZE)
    losses: dict[str, list[float]] = {REFERENCE: []} | {precision: [] for precision in args.precisions}
    # Seed by seed, so that pairs are there early.
    for seed in args.seeds:
        for precision, found in losses.items():
            found.append(loss_of(data, precision, seed, args))
            print(f"seed {seed}, {precision}: {found[-1]:.4f}", flush=True)
        options = vars(args) | {"folder": None, "json": None}
        save(args.json, default_device(), options=options, losses=losses, differences=differences(losses))
    for precision, found in differences(losses).items():
        print(said(precision, found))


if __name__ == "__main__":
    main()
