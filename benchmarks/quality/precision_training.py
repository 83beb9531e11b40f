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
from pathlib import Path

from benchmarks.quality.gradients import TextData, text
from benchmarks.quality.paired import conclude, kept_loss, losses_of
from benchmarks.quality.precision import OPERANDS, emulated
from benchmarks.quality.refresh_quality import VOCAB_SIZE, final_loss
from ds_fira.core import subspace_solvers
from ds_fira.optim.presets import PRESETS

REFERENCE = "float32"
SETTINGS = {"subspace": "randomized", "refresh_moments": "rotate"}


def loss_of(data: TextData, precision: str, seed: int, args: argparse.Namespace) -> float:
    """Final validation loss of one run, read where it was made before with the same options."""
    preset = {} if args.preset is None else {"preset": args.preset}

    def make() -> float:
        with emulated(precision):
            return final_loss(
                data,
                seed,
                args,
                rank=args.rank,
                update_proj_gap=args.gap,
                # On a CPU products under "tf32", the default, are in float32; "float32" would refresh in another way.
                matmul_precision="tf32" if precision == REFERENCE else precision.removesuffix(", cut"),
                **SETTINGS,
                **preset,
            )

    return kept_loss(args.folder, ("precision", precision, seed), args, make)


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
    ways = (REFERENCE, *args.precisions)
    conclude(losses_of(dict.fromkeys(ways), args, lambda way, seed: loss_of(data, way, seed, args)), REFERENCE, args)


if __name__ == "__main__":
    main()
