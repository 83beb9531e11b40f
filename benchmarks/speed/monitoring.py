"""What a monitor costs: training steps of the quickstart's model without one, and with csv files.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.speed.monitoring [--steps 40]

The engines take turns step by step, so that a busy machine slows all of them alike; medians are over the steps, on the
first rank, which writes the files. CPU time is the process's own, and says more than wall time where others work on the
machine. No refresh is among the steps that are timed. A step between events writes DeepSpeed's own lr, and nothing of
Fira's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ds_fira
from benchmarks.common import default_device, device_name

CONFIG = Path(__file__).resolve().parents[2] / "ds_configs" / "zero2_bf16.json"
# The shape that the quickstart trains (examples/pretraining/options.py).
SHAPE = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
SEQ_LENGTH = 128
WARMUP = 5


def build(folder: str, interval: int | None, stage: int | None = None) -> Any:
    """An engine around the quickstart's model; `interval` None has no monitor, `stage` None is the file's."""
    config = json.loads(CONFIG.read_text())
    if stage is not None:
        config["zero_optimization"] = {"stage": stage}
    config["optimizer"]["params"]["update_proj_gap"] = 10**6
    if interval is not None:
        config["csv_monitor"] = {"enabled": True, "output_path": folder, "job_name": f"every{interval}"}
        config["steps_per_print"] = interval
    torch.manual_seed(0)
    shape = LlamaConfig(**SHAPE, num_attention_heads=4, max_position_embeddings=SEQ_LENGTH, use_cache=False)
    model = LlamaForCausalLM(shape)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def timed_step(engine: Any, tokens: torch.Tensor) -> tuple[float, float, float]:
    """Seconds of a training step, of `engine.step()` in it, and of CPU time in that."""
    begin = time.perf_counter()
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    middle, used = time.perf_counter(), time.process_time()
    engine.step()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    end = time.perf_counter()
    return end - begin, end - middle, time.process_time() - used


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each engine")
    args = parser.parse_args()
    ds_fira.init_distributed()
    device = default_device()
    variants = {"no monitor": None, "csv, between events": 10**6, "csv, at an event": 1}
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: build(folder, interval) for name, interval in variants.items()}
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
        for step in range(WARMUP + args.steps):
            tokens = torch.randint(0, SHAPE["vocab_size"], (8, SEQ_LENGTH), device=device)
            for name, engine in engines.items():
                found = timed_step(engine, tokens)
                if step >= WARMUP:
                    times[name].append(found)
        if deepspeed.comm.get_rank() == 0:
            print(f"{device_name(device)}, {deepspeed.comm.get_world_size()} processes")
            print(f"{'milliseconds':22}{'training step':>15}{'engine.step':>13}{'its CPU time':>14}{'more of it':>12}")
            for name, rows in times.items():
                whole, wall, cpu = (1e3 * statistics.median(column) for column in zip(*rows, strict=True))
                more = 1e3 * statistics.median(
                    mine[2] - base[2] for mine, base in zip(rows, times["no monitor"], strict=True)
                )
                print(f"{name:22}{whole:>15.1f}{wall:>13.1f}{cpu:>14.2f}{more:>12.2f}", flush=True)
        for engine in engines.values():
            engine.destroy()
    engines.clear()
    ds_fira.shutdown()


if __name__ == "__main__":
    main()
