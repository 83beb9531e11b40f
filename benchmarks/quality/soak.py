"""A long run of small steps: does memory grow, and do the ranks stay alike?

    torchrun --standalone --nproc_per_node 2 -m benchmarks.quality.soak [--steps 3000] [--json FILE]

A small model under ZeRO-2 in bf16 with cut matrices, refreshes every 20 steps, a comparison of the weights over the
ranks every 50 and a checkpoint every 500. Resident memory and the number of Python objects are read at intervals, after
a garbage collection; growth is that of a straight line through the readings behind the warm-up.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import tempfile
import time
from typing import Any

import deepspeed
import psutil
import torch
from torch import Tensor, nn

import ds_fira
from benchmarks.common import default_device, device_name, save
from ds_fira.engine.deepspeed import tensor_hash

WIDTH, VOCABULARY, LAYERS = 48, 64, 3


class Model(nn.Module):
    """An embedding, a few linear layers and a head; about 25,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        # Three of one shape: two ranks cut one of them.
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return nn.functional.cross_entropy(self.lm_head(self.norm(hidden)).flatten(0, 1), tokens.flatten())


def engine_config(every: int) -> dict[str, Any]:
    """ZeRO-2 in bf16; weights are compared every `every` steps."""
    params = {"lr": 0.002, "rank": 8, "update_proj_gap": 20, "check_sync_every": every}
    params |= {"subspace": "randomized", "refresh_moments": "rotate", "state_dtype": "bfloat16"}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "FiraAdam", "params": params},
    }


def soak(steps: int, warm_up: int, read_every: int, save_every: int, check_every: int = 50) -> dict[str, Any]:
    """Train, on every rank.

    Args:
        steps: optimizer steps.
        warm_up: those before the first reading that counts.
        read_every: steps between readings.
        save_every: steps between checkpoints, each in the place of the one before.
        check_every: steps between comparisons of the weights, which stop the run where they differ.

    Returns:
        `readings`, (step, resident bytes, Python objects) of this rank; `bytes_per_step` and `objects_per_step`, their
        growth; `least_bytes_per_step`, the growth between the two neighbouring readings where it is least;
        `first_loss`, `last_loss`; `equal`, whether all ranks end with the same weights; `refreshes`; `seconds`.
    """
    torch.manual_seed(0)
    model = Model().bfloat16()
    config = engine_config(check_every)
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    generator = torch.Generator().manual_seed(1 + deepspeed.comm.get_rank())
    process, readings, losses = psutil.Process(), [], []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        deepspeed.comm.broadcast_object_list(folder, src=0)
        for step in range(1, steps + 1):
            loss = engine(torch.randint(0, VOCABULARY, (4, 16), generator=generator).to(engine.device))
            engine.backward(loss)
            engine.step()
            if step in (1, steps):
                losses.append(float(loss.detach()))
            del loss
            if step % save_every == 0:
                engine.save_checkpoint(folder[0], tag="soak")
            if step % read_every == 0 and step >= warm_up:
                release_free_memory()
                readings.append((step, process.memory_info().rss, len(gc.get_objects())))
        deepspeed.comm.barrier()
    seconds = time.perf_counter() - began
    hashes = tensor_hash.hash_tensors([param.detach() for param in engine.module.parameters()])
    result = {
        "readings": readings,
        "bytes_per_step": slope([(step, size) for step, size, _ in readings]),
        "least_bytes_per_step": least_growth([(step, size) for step, size, _ in readings]),
        "objects_per_step": slope([(step, count) for step, _, count in readings]),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "equal": engine.basic_optimizer.communicator.all_equal(tensor_hash.combine(hashes)),
        "refreshes": ds_fira.metrics(engine)["refreshes"],
        "seconds": seconds,
    }
    del model
    engine.destroy()
    return result


def release_free_memory() -> None:
    """Collect garbage and, where the C library is glibc, give the pages that are free back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def slope(points: list[tuple[int, int]]) -> float:
    """Of the straight line nearest to the points."""
    x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def least_growth(points: list[tuple[int, int]]) -> float:
    """Of all neighbouring readings: what a step leaves behind is in each, what the allocator keeps only in some."""
    return min((after[1] - before[1]) / (after[0] - before[0]) for before, after in itertools.pairwise(points))


def main() -> None:
    """Print and save the figures of the first rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    ds_fira.init_distributed()
    found = soak(args.steps, warm_up=args.steps // 6, read_every=args.steps // 30, save_every=args.steps // 6)
    if deepspeed.comm.get_rank() == 0:
        device = default_device()
        print(f"{device_name(device)}, {deepspeed.comm.get_world_size()} processes, {args.steps} steps")
        print(f"{'step':>6}{'resident MB':>13}{'objects':>10}")
        for step, size, count in found["readings"]:
            print(f"{step:>6}{size / 1e6:>13.2f}{count:>10}")
        print(f"growth per step: {found['bytes_per_step']:.1f} bytes, {found['objects_per_step']:.3f} objects")
        print(f"loss {found['first_loss']:.3f} to {found['last_loss']:.3f}, {found['refreshes']} refreshes, ", end="")
        print(
            f"weights {'equal' if found['equal'] else 'DIFFERENT'} on all ranks, {found['seconds']:.0f} s", flush=True
        )
        save(args.json, device, steps=args.steps, world_size=deepspeed.comm.get_world_size(), **found)
    ds_fira.shutdown()


if __name__ == "__main__":
    main()
