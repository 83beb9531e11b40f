"""What `check_sync_every` costs: a comparison beside a training step of the quickstart's model.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.speed.sync [--steps 40] [--stage 0] [--json FILE]

The comparison is timed after each training step, so that a busy machine slows both alike; medians are over the steps,
on the first rank. The share for other intervals is the cost of one comparison over as many steps. The last line is the
hash alone, per byte, beside a copy of the same tensor.
"""

from __future__ import annotations

import argparse
import statistics
import time

import deepspeed
import torch

import ds_fira
from benchmarks.common import default_device, device_name, medians, save
from benchmarks.speed.monitoring import SEQ_LENGTH, SHAPE, WARMUP, build, timed_step
from ds_fira.engine.deepspeed.tensor_hash import hash_tensor
from ds_fira.engine.deepspeed.weight_sync import check_sync


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="timed steps")
    parser.add_argument("--stage", type=int, help="of ZeRO; default the config file's")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    ds_fira.init_distributed()
    device = default_device()
    engine = build("", None, args.stage)
    rows: list[tuple[float, float, float]] = []
    for step in range(WARMUP + args.steps):
        tokens = torch.randint(0, SHAPE["vocab_size"], (8, SEQ_LENGTH), device=device)
        whole, _, _ = timed_step(engine, tokens)
        deepspeed.comm.barrier()
        begin, used = time.perf_counter(), time.process_time()
        check_sync(engine)
        if step >= WARMUP:
            rows.append((whole, time.perf_counter() - begin, time.process_time() - used))
    step_seconds, check_seconds, check_cpu = (statistics.median(column) for column in zip(*rows, strict=True))
    shares = {str(every): check_seconds / every / step_seconds for every in (1, 10, 100, 1000)}
    if deepspeed.comm.get_rank() == 0:
        count = sum(param.numel() for param in engine.module.parameters())
        print(f"{device_name(device)}, {deepspeed.comm.get_world_size()} processes, {count:,} parameters in bf16")
        print(f"training step {1e3 * step_seconds:.1f} ms, comparison {1e3 * check_seconds:.2f} ms", end="")
        print(f" (CPU time {1e3 * check_cpu:.2f} ms)")
        for every, share in shares.items():
            print(f"check_sync_every = {every:>4}: {100 * share:.3f}% of a training step")
        values = torch.randn(2**24, device=device)
        alone = medians({"hash": lambda: hash_tensor(values), "copy": values.clone}, 7, device)
        per_byte = {name: 1e9 * seconds / (4 * values.numel()) for name, seconds in alone.items()}
        print(f"hash {per_byte['hash']:.2f} ns a byte, a copy {per_byte['copy']:.2f}", flush=True)
        save(
            args.json,
            device,
            parameters=count,
            step_seconds=step_seconds,
            check_seconds=check_seconds,
            check_cpu_seconds=check_cpu,
            share_of_step=shares,
            nanoseconds_per_byte=per_byte,
        )
    engine.destroy()
    del engine
    ds_fira.shutdown()


if __name__ == "__main__":
    main()
