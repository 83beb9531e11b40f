"""Bytes of a training on one device whose parameters step in the backward pass: measured, beside the estimate.

    python -m benchmarks.memory.one_gpu [--models llama_60m llama_130m llama_350m llama_1b] [--rank 128]
    [--state-dtype int8] [--seq-length 256] [--no-checkpointing] [--json FILE]

A LLaMA with bf16 weights and `ds_fira.step_in_backward` makes two steps, with a refresh in the first, in a process of
its own. Measured is the most that the process held at once beyond what it held before there was a model: on a CPU its
resident memory, as the kernel counts it, on a GPU what torch's allocator handed out. Before, a model of one layer of
the same width has been trained and freed, so that what libraries load and keep for themselves is there. "plain" makes
the same steps by `optimizer.step()` after the backward pass. `ds-fira estimate` says the same before a tensor exists;
the activations among it are a formula's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import ds_fira
from benchmarks.common import default_device, save
from ds_fira.tools.estimate import Setup, estimate
from ds_fira.tools.models import NAMES, config_file

MIB = 2**20
# Given back when they are freed, not kept for the next: glibc's malloc counts otherwise what is free.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def train(config: PretrainedConfig, args: argparse.Namespace, device: torch.device) -> dict[str, int]:
    """Two steps of a model: bytes of its weights and of the optimizer's states."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    settings = {"state_dtype": args.state_dtype, "weight_rounding": "stochastic", "subspace": "randomized"}
    optimizer = ds_fira.FiraAdam(model, rank=args.rank, lr=0.001, **settings)
    if args.releases:
        ds_fira.step_in_backward(model, optimizer)
    ids = torch.randint(config.vocab_size, (1, args.seq_length), device=device)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"parameters": sum(param.nbytes for param in model.parameters()), "optimizer_states": states_of(optimizer)}


def measure(args: argparse.Namespace) -> dict[str, int]:
    """The bytes of a training, and the most at once beyond what one of a single layer leaves."""
    device = default_device()
    config = AutoConfig.from_pretrained(config_file(args.name), use_cache=False)
    train(type(config)(**{**config.to_dict(), "num_hidden_layers": 1}), args, device)
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        return {**train(config, args, device), "total": torch.cuda.max_memory_allocated(device) - before}
    ctypes.CDLL(None).malloc_trim(0)
    before = psutil.Process().memory_info().rss
    found = train(config, args, device)
    return {**found, "total": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


def measured(name: str, args: argparse.Namespace, releases: bool) -> dict[str, int]:
    """`measure` in a new process."""
    options = json.dumps({**vars(args), "name": name, "releases": releases})
    command = [sys.executable, "-m", "benchmarks.memory.one_gpu", "--measure", options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **MALLOC})
    return json.loads(done.stdout.splitlines()[-1])


def states_of(optimizer: ds_fira.FiraAdam) -> int:
    """Bytes of all tensors in an optimizer's states."""
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def estimated(name: str, args: argparse.Namespace) -> dict[str, int]:
    """The same by `ds-fira estimate`."""
    setup = Setup(
        zero_stage=0,
        master_weights="none",
        step_in_backward=True,
        seq_length=args.seq_length,
        activation_checkpointing=args.checkpointing,
    )
    found = estimate(name, setup, ["Fira"], rank=args.rank, state_dtype=args.state_dtype)
    memory = found.methods["Fira"].largest.device
    return {"parameters": memory.parameters, "optimizer_states": memory.optimizer_states, "total": memory.total}


def main() -> None:
    """A line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["llama_60m", "llama_130m", "llama_350m"])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--state-dtype", default="int8", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", help="also write the bytes to this file")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(argparse.Namespace(**args.measure))))
        return
    results = {}
    options = vars(args) | {"json": None}
    print("MiB             " + "".join(f"{kind:>30}" for kind in ("parameters", "optimizer states", "total")))
    for name in args.models:
        found = {"estimate": estimated(name, args), "measured": measured(name, args, releases=True)}
        both = [f"{found['estimate'][key] / MIB:.1f} / {value / MIB:.1f}" for key, value in found["measured"].items()]
        print(f"{name:16}" + "".join(f"{text:>30}" for text in both), end="", flush=True)
        found["plain"] = measured(name, args, releases=False)
        print(f"; by step() behind the backward pass {found['plain']['total'] / MIB:.1f}", flush=True)
        results[name] = found
        save(args.json, default_device(), options=options, bytes=results)


if __name__ == "__main__":
    main()
