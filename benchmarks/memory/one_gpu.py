"""Bytes of a training on one device whose parameters step in the backward pass: measured, beside the estimate.

    python -m benchmarks.memory.one_gpu [--models llama_60m llama_130m] [--rank 128] [--state-dtype int8]
    [--seq-length 256] [--json FILE]

A LLaMA with bf16 weights and `ds_fira.step_in_backward` makes two steps, a refresh in the first alone. torch's
MemTracker counts every tensor of the second from outside: the most at once, and what stays behind the step. "plain"
makes the same steps by `optimizer.step()` after the backward pass. `ds-fira estimate` says the same before a tensor
exists; the activations among it are a formula's.
"""

from __future__ import annotations

import argparse

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM

import ds_fira
from benchmarks.common import default_device, save
from ds_fira.tools.estimate import Setup, estimate
from ds_fira.tools.models import NAMES, config_file

MIB = 2**20


def measured(name: str, args: argparse.Namespace, releases: bool) -> dict[str, int]:
    """Bytes of one training: weights, states, and the most at once in the second step."""
    device = default_device()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(config_file(name), use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").to(device)
    settings = {"state_dtype": args.state_dtype, "weight_rounding": "stochastic", "subspace": "randomized"}
    optimizer = ds_fira.FiraAdam(model, rank=args.rank, lr=0.001, **settings)
    if releases:
        ds_fira.step_in_backward(model, optimizer)
    ids = torch.randint(config.vocab_size, (1, args.seq_length), device=device)
    peak = 0
    for _ in range(2):
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        peak = tracker.get_tracker_snapshot("peak")[device]["Total"]
    return {
        "parameters": sum(param.nbytes for param in model.parameters()),
        "optimizer_states": states_of(optimizer),
        "total": peak,
    }


def states_of(optimizer: ds_fira.FiraAdam) -> int:
    """Bytes of all tensors in an optimizer's states."""
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def estimated(name: str, args: argparse.Namespace) -> dict[str, int]:
    """The same by `ds-fira estimate`."""
    setup = Setup(zero_stage=0, master_weights="none", step_in_backward=True, seq_length=args.seq_length)
    found = estimate(name, setup, ["Fira"], rank=args.rank, state_dtype=args.state_dtype)
    memory = found.methods["Fira"].largest.device
    return {"parameters": memory.parameters, "optimizer_states": memory.optimizer_states, "total": memory.total}


def main() -> None:
    """A line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["llama_60m", "llama_130m"])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--state-dtype", default="int8", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--json", help="also write the bytes to this file")
    args = parser.parse_args()
    results = {}
    print("MiB             " + "".join(f"{kind:>30}" for kind in ("parameters", "optimizer states", "total")))
    for name in args.models:
        found = {"estimate": estimated(name, args), "measured": measured(name, args, releases=True)}
        found["plain"] = measured(name, args, releases=False)
        results[name] = found
        both = [f"{found['estimate'][key] / MIB:.1f} / {value / MIB:.1f}" for key, value in found["measured"].items()]
        print(f"{name:16}" + "".join(f"{text:>30}" for text in both), end="")
        print(f"; by step() behind the backward pass {found['plain']['total'] / MIB:.1f}", flush=True)
    save(args.json, default_device(), options=vars(args) | {"json": None}, bytes=results)


if __name__ == "__main__":
    main()
