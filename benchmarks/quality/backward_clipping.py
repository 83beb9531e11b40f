"""Validation loss by how gradients are clipped where every parameter steps in the backward pass, seed by seed.

    python -m benchmarks.quality.backward_clipping FOLDER [--seeds 0 1 2] [--max-norm 1.0] [--steps 400]
    [--layers 4] [--preset recommended] [--json FILE]

A LLaMA of about one million parameters on the packaged film reviews (prepared once in FOLDER), trained by `FiraAdam`.
"none" does not clip, "global" is `torch.nn.utils.clip_grad_norm_` before `step()`; "previous" and "parameter" are the
ways of `ds_fira.step_in_backward`. All runs of a seed see the same weights and batches. Printed are the losses, in nats
per token, the share of steps in which "global" clips, and of every way the differences to "global".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import ds_fira
from benchmarks.quality.gradients import text
from benchmarks.quality.paired import conclude, losses_of
from benchmarks.quality.refresh_quality import HIDDEN, VOCAB_SIZE, final_loss, plainly
from ds_fira.optim.presets import PRESETS

REFERENCE = "global"
WAYS = ("none", REFERENCE, "previous", "parameter")


def stepping(way: str, max_norm: float, norms: list[float]) -> Callable[..., Callable[[], object]]:
    """What makes a step in one of the ways; `norms` takes those of all gradients, where the way knows them."""

    def globally(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        def step() -> None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
            optimizer.step()

        return step

    def in_backward(model: nn.Module, optimizer: ds_fira.FiraAdam) -> Callable[[], object]:
        ds_fira.step_in_backward(model, optimizer, max_norm=max_norm, clip=way)
        return optimizer.step

    return {"none": plainly, REFERENCE: globally}.get(way, in_backward)


def main() -> None:
    """A line for each run, then the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--preset", choices=PRESETS, help="instead of the published method")
    parser.add_argument("--json", help="also write the losses to this file")
    args = parser.parse_args()
    data = text(args.folder, args.seq_length, VOCAB_SIZE)
    preset = {} if args.preset is None else {"preset": args.preset}
    norms: list[float] = []

    def loss_of(way: str, seed: int) -> float:
        step = stepping(way, args.max_norm, norms)
        return final_loss(data, seed, args, step, rank=HIDDEN // 4, update_proj_gap=50, **preset)

    losses = losses_of(WAYS, args, loss_of)
    clipped = sum(norm > args.max_norm for norm in norms) / len(norms)
    print(f"{REFERENCE!r} clips {clipped:.0%} of its steps")
    conclude(losses, REFERENCE, args, clipped=clipped)


if __name__ == "__main__":
    main()
