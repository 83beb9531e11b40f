"""Validation loss by how bases are computed and what happens to the moments at a refresh.

    python -m benchmarks.quality.refresh_quality FOLDER [--steps 400] [--ranks 32 4] [--gaps 20 200] [--seeds 0 1]
    [--json FILE]

A LLaMA of about one million parameters on the packaged film reviews (prepared once in FOLDER), with `FiraAdam` as a
user calls it. All runs of a seed see the same weights and batches. The table has the mean over the seeds of the final
validation loss, in nats per token, and the difference to "svd, keep", the released code's way, seed by seed.

At this size "randomized" would find the exact decomposition cheaper, and take it; here it is made to iterate, for the
iteration is what larger models get.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import ds_fira
from benchmarks.common import default_device, save
from benchmarks.quality.gradients import TextData, llama, text, training_batches
from ds_fira.core import subspace_solvers

HIDDEN, HEAD_DIM, VOCAB_SIZE = 128, 32, 1024
WARMUP_SHARE, LAST_SHARE = 0.1, 0.1
REFERENCE = "svd, keep"
WAYS = ("svd, keep", "svd, rotate", "svd, reset", "gram, keep", "gram, rotate")
WAYS += ("gram, reset", "randomized, keep", "randomized, rotate", "randomized, reset")


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def plainly(_: nn.Module, optimizer: Optimizer) -> Callable[[], object]:
    """What makes the step after a backward pass: the optimizer by itself."""
    return optimizer.step


def final_loss(
    data: TextData,
    seed: int,
    args: argparse.Namespace,
    stepping: Callable[[nn.Module, Optimizer], Callable[[], object]] = plainly,
    built: Callable[[nn.Module], tuple[nn.Module, nn.Module]] = lambda model: (model, model),
    width: int = HIDDEN,
    **settings: Any,
) -> float:
    """Validation loss, in nats per token, at the end of one run.

    Args:
        data: to train and to validate on.
        seed: of weights and batches.
        args: `layers`, `steps` and `batch_size`.
        stepping: given the model that computes and the optimizer, what makes the step after a backward pass.
        built: from the model in float32, the one that computes and the one whose parameters the optimizer has.
        width: of the model, a multiple of 32.
        settings: of the optimizer's projected matrices; alpha is 0.25 unless they name a preset.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    model, stepped = built(llama(width, width * 11 // 4, args.layers, width // HEAD_DIM, VOCAB_SIZE).to(device))
    settings = settings if "preset" in settings else {"alpha": 0.25, **settings}
    groups = ds_fira.param_groups(stepped, **settings)
    optimizer = ds_fira.FiraAdam(groups, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, args.steps))
    batches, step = training_batches(data, args.batch_size, seed), stepping(model, optimizer)
    for _ in range(args.steps):
        ids = next(batches).to(device)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        step()
        scheduler.step()
    losses = []
    with torch.no_grad():
        for first in range(0, min(len(data.validation), 512) - 63, 64):
            ids = data.validation[first : first + 64]["input_ids"].long().to(device)
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    return statistics.fmean(losses)


def main() -> None:
    """Print the table, one line as soon as its runs are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[HIDDEN // 4, HIDDEN // 32])
    parser.add_argument("--gaps", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--json", help="also write the losses to this file")
    args = parser.parse_args()
    subspace_solvers.cheapest = lambda *_: "direct"
    data = text(args.folder, args.seq_length, VOCAB_SIZE)
    print(f"{'rank':>5}{'gap':>5}  {'way':20}{'loss':>8}{'to svd, keep':>14}   by seed", flush=True)
    rows = []
    for rank in args.ranks:
        for gap in args.gaps:
            reference: list[float] = []
            for way in args.ways:
                start = time.perf_counter()
                subspace, moments = way.split(", ")
                settings = {"rank": rank, "update_proj_gap": gap, "subspace": subspace, "refresh_moments": moments}
                losses = [final_loss(data, seed, args, **settings) for seed in args.seeds]
                reference = losses if way == REFERENCE else reference
                differences = [loss - other for loss, other in zip(losses, reference, strict=False)]
                seconds = (time.perf_counter() - start) / len(losses)
                rows.append({"rank": rank, "gap": gap, "way": way, "losses": losses, "seconds": seconds})
                print(
                    f"{rank:>5}{gap:>5}  {way:20}{statistics.fmean(losses):>8.3f}"
                    f"{statistics.fmean(differences) if differences else math.nan:>+14.3f}   "
                    + " ".join(f"{loss:.3f}" for loss in losses),
                    flush=True,
                )
                options = vars(args) | {"folder": None, "json": None}
                save(args.json, default_device(), options=options, rows=rows)


if __name__ == "__main__":
    main()
