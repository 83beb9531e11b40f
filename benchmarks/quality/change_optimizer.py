"""The losses around a change of the optimizer in one run, seed by seed: AdamW, then FiraAdam, then AdamW again.

    torchrun --standalone --nproc_per_node 1 -m benchmarks.quality.change_optimizer FOLDER [--seeds 0 1 2]
    [--steps 500] [--after 100] [--lr 0.002] [--warmups 0 100] [--json FILE]

A LLaMA of about one million parameters on the packaged film reviews (prepared once in FOLDER) under ZeRO-2, each part
of the run by `load_checkpoint` from the checkpoint of the part before. Printed is, for every change, the largest loss
of the last 100 steps before it and of the first 100 behind it, in nats per token. AdamW's moments start at zero behind
the way back, so that its first steps are as large as its rate; --warmups are steps over which that rate grows.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

import ds_fira
from benchmarks.common import default_device, save
from benchmarks.quality.gradients import llama, text, training_batches

HIDDEN, INTERMEDIATE, HEADS, LAYERS, VOCAB_SIZE, RANK = 128, 336, 4, 4, 1024, 32
ADAM = {"type": "AdamW", "params": {"lr": 0.002, "betas": [0.9, 0.999], "weight_decay": 0.0, "torch_adam": True}}
FIRA = {"rank": RANK, "update_proj_gap": 50, "subspace": "randomized", "refresh_moments": "rotate"}
# The settings of FiraAdam that are tried beside its rate, which is AdamW's unless a preset says otherwise.
KINDS: dict[str, dict[str, Any]] = {
    "alpha 0.25": {**FIRA, "alpha": 0.25},
    "alpha 1": {**FIRA, "alpha": 1.0},
    "preset": {**FIRA, "preset": "recommended"},
}


def part(
    optimizer: dict[str, Any], batches: Iterator[Tensor], steps: int, load: Path | None, kept: Path | None, seed: int
) -> list[float]:
    """Train a part of the run from a checkpoint; its losses.

    Args:
        optimizer: block of the DeepSpeed config.
        batches: of token ids, from here on.
        steps: to make.
        load: folder of the checkpoint; None for none.
        kept: folder to save into at the end; None for none.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    model = llama(HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCAB_SIZE)
    warmup = optimizer.get("warmup", 0)
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "optimizer": {name: optimizer[name] for name in ("type", "params")},
    }
    engine = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]
    if load is not None:
        assert engine.load_checkpoint(str(load))[0] is not None
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    losses = []
    for step in range(steps):
        for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / warmup) if warmup else rate
        ids = next(batches).to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    if kept is not None:
        engine.save_checkpoint(str(kept))
    engine.destroy()
    return losses


def changes(seed: int, args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Every change of one seed, with the largest losses around it."""
    data, rows = text(args.folder, args.seq_length, VOCAB_SIZE), []
    adam = {**ADAM, "params": {**ADAM["params"], "lr": args.lr}}

    def from_step(step: int) -> Iterator[Tensor]:
        return itertools.islice(training_batches(data, 16, seed), step, None)

    def row(change: str, before: list[float], after: list[float]) -> None:
        rows.append({"change": change, "seed": seed, "before": max(before[-100:]), "after": max(after[:100])})
        rows[-1] |= {"mean_before": sum(before[-100:]) / len(before[-100:]), "mean_after": sum(after) / len(after)}
        print(
            f"seed {seed}  {change:34} largest {rows[-1]['before']:.3f} -> {rows[-1]['after']:.3f}   mean "
            f"{rows[-1]['mean_before']:.3f} -> {rows[-1]['mean_after']:.3f}",
            flush=True,
        )

    first = part(adam, from_step(0), args.steps, None, scratch / "adam", seed)
    row("AdamW goes on", first, part(adam, from_step(args.steps), args.after, scratch / "adam", None, seed))
    for kind, params in KINDS.items():
        rate = {} if "preset" in params else {"lr": args.lr}
        fira = {"type": "FiraAdam", "params": {**params, **rate}}
        kept = scratch / kind
        behind = part(fira, from_step(args.steps), args.after, scratch / "adam", kept, seed)
        row(f"AdamW to FiraAdam, {kind}", first, behind)
    start = args.steps + args.after
    behind = part(
        {"type": "FiraAdam", "params": {**KINDS["preset"]}},
        from_step(start),
        args.after,
        scratch / "preset",
        scratch / "fira",
        seed,
    )
    for warmup in args.warmups:
        adam["warmup"] = warmup
        back = part(adam, from_step(start + args.after), args.after, scratch / "fira", None, seed)
        row(f"FiraAdam to AdamW, warm-up {warmup}", behind, back)
    return rows


def main() -> None:
    """A line for each change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--after", type=int, default=100)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--warmups", type=int, nargs="+", default=[0, 100])
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    ds_fira.init_distributed()
    rows = []
    for seed in args.seeds:
        scratch = Path(tempfile.mkdtemp(prefix="change-", dir=args.folder))
        rows += changes(seed, args, scratch)
        shutil.rmtree(scratch)
    settings = {name: getattr(args, name) for name in ("steps", "after", "seq_length", "lr")}
    save(args.json, default_device(), settings=settings, kinds=KINDS, changes=rows)
    ds_fira.shutdown()


if __name__ == "__main__":
    main()
