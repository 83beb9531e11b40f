"""What FiraAdam adds to a whole training step of the quickstart, beside AdamW: processor time, engines in turn.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.speed.whole_step [--steps 12] [--dtype bf16 fp32]

The quickstart's model and batch; two engines in one process of each rank take turns, so that a busy machine slows both
alike, and processor time leaves out what else it does. A step is forward, backward and `engine.step`. FiraAdam
refreshes in every `MEASURED_GAP`-th step here; what that takes counts by the quickstart's own gap. In bf16, as the
quickstart trains, a CPU without units for it spends nearly all of a step on the model's products; in fp32 it does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ds_fira
from benchmarks.common import default_device, device_name, save
from benchmarks.speed.monitoring import CONFIG, SEQ_LENGTH, SHAPE

MEASURED_GAP = 4
# The first steps allocate, and make the first bases.
WARMUP = 2
BATCH = 8  # sequences of each process


def build(optimizer: str, dtype: str) -> Any:
    """An engine around the quickstart's model, as `examples/pretrain_llama.py` makes it with either optimizer."""
    config = json.loads(CONFIG.read_text())
    if dtype == "fp32":
        del config["bf16"]
    params = config["optimizer"]["params"]
    if optimizer == "AdamW":
        kept = {name: params[name] for name in ("betas", "eps", "weight_decay")}
        config["optimizer"] = {"type": "AdamW", "params": {**kept, "lr": 3e-3, "torch_adam": True}}
    else:
        params["update_proj_gap"] = MEASURED_GAP
    torch.manual_seed(0)
    shape = LlamaConfig(**SHAPE, num_attention_heads=4, max_position_embeddings=SEQ_LENGTH, use_cache=False)
    # As the example has it on a CPU.
    model = LlamaForCausalLM._from_config(shape, attn_implementation="sdpa" if torch.cuda.is_available() else "eager")
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def timed_step(engine: Any, tokens: torch.Tensor) -> tuple[float, float]:
    """Seconds of processor time of forward and backward, and of `engine.step`."""
    begin = time.process_time()
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    middle = time.process_time()
    engine.step()
    return middle - begin, time.process_time() - middle


def measure(dtype: str, steps: int, gap: int) -> dict[str, float]:
    """Milliseconds of a step's parts, medians over the steps and means over the ranks, and FiraAdam's whole step over
    AdamW's.

    Args:
        dtype: of the model's training, "bf16" or "fp32".
        steps: timed, of each engine.
        gap: steps from one refresh to the next, by which it counts.
    """
    engines = {name: build(name, dtype) for name in ("AdamW", "FiraAdam")}
    model: list[float] = []
    adamw: list[float] = []
    plain: list[float] = []
    refreshed: list[float] = []
    for step in range(WARMUP + steps):
        tokens = torch.randint(0, SHAPE["vocab_size"], (BATCH, SEQ_LENGTH))
        for name, engine in engines.items():
            passes, update = timed_step(engine, tokens)
            if step >= WARMUP:
                model.append(passes)
                (adamw if name == "AdamW" else plain if step % MEASURED_GAP else refreshed).append(update)
    for engine in engines.values():
        engine.destroy()
    found = torch.tensor([1e3 * statistics.median(times) for times in (model, adamw, plain, refreshed)])
    deepspeed.comm.all_reduce(found)
    passes, of_adamw, of_fira, with_refresh = (found / deepspeed.comm.get_world_size()).tolist()
    refresh = max(0.0, with_refresh - of_fira)
    return {
        "forward_and_backward": passes,
        "adamw_step": of_adamw,
        "fira_step": of_fira,
        "refresh": refresh,
        "whole_step_over_adamw": (passes + of_fira + refresh / gap) / (passes + of_adamw),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each engine")
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    ds_fira.init_distributed()
    device, first = default_device(), deepspeed.comm.get_rank() == 0
    gap = json.loads(CONFIG.read_text())["optimizer"]["params"]["update_proj_gap"]
    rows = []
    if first:
        print(f"{device_name(device)}, {deepspeed.comm.get_world_size()} processes, a refresh in {gap} steps")
        print(f"{'ms':6}{'model':>9}{'AdamW':>9}{'FiraAdam':>10}{'a refresh':>11}{'whole step / AdamW':>20}")
    for dtype in args.dtype:
        row = measure(dtype, args.steps, gap)
        rows.append({"dtype": dtype, **row})
        if first:
            model, adamw, fira, refresh, ratio = row.values()
            print(f"{dtype:6}{model:>9.1f}{adamw:>9.1f}{fira:>10.1f}{refresh:>11.1f}{ratio:>20.3f}", flush=True)
    if first:
        save(args.json, device, gap=gap, processes=deepspeed.comm.get_world_size(), rows=rows)
    ds_fira.shutdown()


if __name__ == "__main__":
    main()
