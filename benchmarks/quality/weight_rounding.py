"""Validation loss of weights in bfloat16 without master weights, by how a step is rounded, seed by seed.

    python -m benchmarks.quality.weight_rounding FOLDER [--seeds 0 1 2] [--steps 400] [--preset recommended]
    [--ways stochastic nearest "stochastic, int8"] [--width 128] [--json FILE]

A LLaMA of about one million parameters, or wider, on the packaged film reviews (prepared once in FOLDER), trained by
`FiraAdam`.
In every way the model computes in bfloat16. "masters" steps weights in float32, of which the model has copies, as
DeepSpeed's `bf16` does; the other ways step the model's own weights, by `weight_rounding`, and "int8" stores moments so
besides. All runs of a seed see the same weights and batches. A run that is done is kept in FOLDER, and not made again.
Printed are the losses, in nats per token, and of every way the differences to "masters".
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.quality.gradients import text
from benchmarks.quality.paired import conclude, kept_loss, losses_of
from benchmarks.quality.refresh_quality import HIDDEN, VOCAB_SIZE, final_loss, plainly
from ds_fira.optim.presets import PRESETS

REFERENCE = "masters"
WAYS = {
    "stochastic": {"weight_rounding": "stochastic"},
    "nearest": {},
    "stochastic, int8": {"weight_rounding": "stochastic", "state_dtype": "int8"},
}


class Masters:
    """Float32 weights that are stepped for a model that computes in bfloat16."""

    def build(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The model that computes, and the one that is stepped."""
        self._computing, self._stepped = copy.deepcopy(model).to(torch.bfloat16), model
        return self._computing, self._stepped

    def stepping(self, _: nn.Module, optimizer: Optimizer) -> Callable[[], object]:
        """What makes a step: gradients go up to the master weights, weights come down."""
        pairs = list(zip(self._computing.parameters(), self._stepped.parameters(), strict=True))

        @torch.no_grad()
        def step() -> None:
            for param, master in pairs:
                master.grad = param.grad.float()
            optimizer.step()
            for param, master in pairs:
                param.copy_(master)

        return step


def alone(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model in bfloat16 that computes and is stepped."""
    model = model.to(torch.bfloat16)
    return model, model


def main() -> None:
    """A line for each run, then the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=HIDDEN, help="a multiple of 32")
    parser.add_argument("--rank", type=int, help="a quarter of the width by default")
    parser.add_argument("--gap", type=int, default=50)
    parser.add_argument("--preset", choices=PRESETS, help="instead of the published method")
    parser.add_argument("--json", help="also write the losses to this file")
    args = parser.parse_args()
    args.rank = args.rank or args.width // 4
    data = text(args.folder, args.seq_length, VOCAB_SIZE)

    def loss_of(way: str, seed: int) -> float:
        settings = {"rank": args.rank, "update_proj_gap": args.gap, **WAYS.get(way, {})}
        settings |= {} if args.preset is None else {"preset": args.preset}
        held = Masters()
        how = (held.stepping, held.build) if way == REFERENCE else (plainly, alone)
        run = functools.partial(final_loss, data, seed, args, *how, width=args.width, **settings)
        return kept_loss(args.folder, ("weights", way, seed), args, run)

    conclude(losses_of((REFERENCE, *args.ways), args, loss_of), REFERENCE, args)


if __name__ == "__main__":
    main()
