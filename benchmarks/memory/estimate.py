"""The estimate of `python -m ds_fira estimate` beside the bytes that live DeepSpeed engines hold.

    python -m benchmarks.memory.estimate [--json FILE]                             # one rank
    torchrun --nproc-per-node 2 -m benchmarks.memory.estimate [--json FILE]        # two

Trains a LLaMA of 3.1 million weights for two steps with each of `CASES` and prints, for the rank that differs most,
estimated and measured megabytes by category; measured is every tensor that the engine holds in the second backward
pass, each storage once.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM

import ds_fira
from benchmarks.common import default_device, save
from ds_fira.core.selection import projected_weights
from ds_fira.engine.deepspeed.engine_memory import engine_bytes
from ds_fira.tools.estimate import RankMemory, Setup, estimate

STEPS, PATIENCE = 2, 20.0  # the second in seconds
RANK = 64
BUCKET = 200_000
CATEGORIES = ("parameters", "gradients", "master_weights", "optimizer_states")
# Three layers: on two ranks one of the three down projections is cut.
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1500,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
Case = tuple[str, dict[str, Any], dict[str, Any]]
STAGES: list[Case] = [
    (method, {"zero_stage": stage, "dtype": "bf16"}, {}) for method in ("AdamW", "Fira") for stage in (0, 1, 2)
]
MORE: list[Case] = [
    ("Fira", {"zero_stage": 2, "dtype": "fp32"}, {}),
    ("Fira", {"zero_stage": 1, "dtype": "fp16"}, {}),
    ("AdamW", {"zero_stage": 1, "dtype": "fp32"}, {}),
    ("Fira", {"zero_stage": 2, "dtype": "bf16", "master_weights": "bf16"}, {}),
    ("AdamW", {"zero_stage": 1, "dtype": "bf16", "master_weights": "bf16"}, {}),
    ("Fira", {"zero_stage": 1, "dtype": "bf16", "accumulation_dtype": "fp32"}, {}),
    ("AdamW", {"zero_stage": 2, "dtype": "bf16", "accumulation_dtype": "fp32"}, {}),
    ("Fira", {"zero_stage": 2, "dtype": "bf16"}, {"state_dtype": "int8"}),
    ("Fira", {"zero_stage": 0, "dtype": "bf16"}, {"state_dtype": "bfloat16"}),
    ("Fira", {"zero_stage": 2, "dtype": "bf16", "offload": True}, {}),
    ("AdamW", {"zero_stage": 1, "dtype": "bf16", "offload": True}, {}),
    ("LoRA", {"zero_stage": 2, "dtype": "bf16"}, {}),
]
CASES = STAGES + MORE


def engine_case(case: Case) -> tuple[dict[str, Any], int | None]:
    """What `measure` takes for a case."""
    return ds_config(*case), RANK if case[0] == "LoRA" else None


def ds_config(method: str, setup: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed config of a case."""
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    if method == "Fira":
        optimizer = {"type": "FiraAdam", "params": {"lr": 1e-3, "rank": RANK, "subspace": "randomized", **params}}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "optimizer": optimizer,
        "zero_optimization": {"stage": setup["zero_stage"], "reduce_bucket_size": BUCKET},
    }
    if setup["dtype"] != "fp32":
        config[setup["dtype"]] = {"enabled": True}
    if setup["dtype"] == "fp16":
        config["fp16"]["initial_scale_power"] = 8  # so that no step is skipped
    if setup.get("master_weights") == "bf16":
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    if "accumulation_dtype" in setup:
        config["data_types"] = {"grad_accum_dtype": setup["accumulation_dtype"]}
    if setup.get("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter: W x + B A x, with A (r, n) and B (m, r)."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.lora_a = nn.Parameter(torch.randn(rank, frozen.in_features) * 0.02)
        self.lora_b = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + nn.functional.linear(nn.functional.linear(x, self.lora_a), self.lora_b)


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze a model and give an adapter to every weight that FiraAdam would project."""
    names = [name.removesuffix(".weight") for name in projected_weights(model).values()]
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), rank))


def live_storages() -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors that this process holds, by address."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        # By type: lazy proxies answer isinstance by importing what they stand for. What torch.compile traces with, and
        # leaves behind in a process, has no storage.
        kind = type(item)
        if (
            issubclass(kind, Tensor)
            and not issubclass(kind, FakeTensor)
            and item.device.type == "cpu"
            and item.layout == torch.strided
        ):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage
    return storages


def make_tables(ds_config: dict[str, Any]) -> None:
    """Make what a process keeps for all optimizers of a kind, as the tables of 8-bit codes: no engine's own."""
    if ds_config["optimizer"]["type"] == "FiraAdam":
        param = nn.Parameter(torch.zeros(RANK, RANK))
        param.grad = torch.ones_like(param)
        ds_fira.FiraAdam([{"params": [param]}], **ds_config["optimizer"]["params"]).step()


def added_bytes(before: dict[int, torch.UntypedStorage], most: float) -> int:
    """Bytes of the tensors that this process has beyond those it had before.

    A thread of gloo keeps what it has sent until it runs again, on a busy machine for a while after the collective is
    over. What the engine holds stays: more than `most` is counted again, for up to `PATIENCE`.
    """
    end = time.monotonic() + PATIENCE
    while True:
        now = live_storages()
        added = sum(now[address].nbytes() for address in now.keys() - before.keys())
        del now
        if added <= most or time.monotonic() > end:
            return added
        time.sleep(0.1)


def measure(
    cases: list[tuple[dict[str, Any], int | None]], config_file: str, most: list[list[float]] | None = None
) -> list[dict[str, int]]:
    """Train for two steps with every DeepSpeed config.

    Args:
        cases: configs, each with the rank of LoRA adapters, or None to train all weights.
        config_file: of the model.
        most: for each case by rank, the bytes that "all" is to stay within; see `added_bytes`.

    Returns:
        For each, the bytes of `engine_memory.CATEGORIES` in the last backward pass, and of "all" tensors
        that the process has after that pass beyond those it had before.
    """
    results = []
    for index, (ds_config, lora_rank) in enumerate(cases):
        make_tables(ds_config)
        # Kept for as long as it is compared with, so that nothing of it is freed meanwhile and no address comes again.
        before = live_storages()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_file))
        if lora_rank is not None:
            add_lora(model, lora_rank)
        trained = [param for param in model.parameters() if param.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=ds_config)
        tokens = torch.randint(0, model.config.vocab_size, (1, 8))
        measured: dict[str, int] = {}

        def backward(engine: Any = engine, tokens: Tensor = tokens) -> None:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)

        for step in range(STEPS):
            measured = backward_bytes(engine, backward)
            if step == STEPS - 1:
                measured["all"] = added_bytes(before, most[index][dist.get_rank()] if most else math.inf)
            engine.step()
        results.append(measured)
        engine.destroy()
        del engine, model, trained, backward
        gc.collect()
    return results


def backward_bytes(engine: deepspeed.DeepSpeedEngine, backward: Callable[[], object]) -> dict[str, int]:
    """Run a backward pass and give the most that the engine held of every category.

    That is at its end, or as ZeRO-1 begins to reduce, in `reduce_gradients` of its wrapper, which is called at the end
    of the last backward pass while it still has the gradients of the whole model.

    Args:
        engine: a DeepSpeed engine.
        backward: makes the backward pass, `engine.backward` included, and no step.
    """
    wrapper, looks = engine.optimizer, []
    reduce_gradients = getattr(wrapper, "reduce_gradients", None)

    def look_first(*args: object, **kwargs: object) -> object:
        looks.append(engine_bytes(engine))
        return reduce_gradients(*args, **kwargs)

    if reduce_gradients is not None:
        wrapper.reduce_gradients = look_first
    try:
        backward()
    finally:
        vars(wrapper).pop("reduce_gradients", None)
    looks.append(engine_bytes(engine))
    return {category: max(look[category] for look in looks) for category in looks[0]}


def estimated(case: Case, world_size: int, config_file: str) -> list[RankMemory]:
    """The estimate of a case, by rank."""
    method, setup, params = case
    full = Setup(gpus=world_size, reduce_bucket_size=BUCKET, **setup)
    by_rank = estimate(config_file, full, [method], rank=RANK, **params).methods[method].by_rank
    return list(by_rank) if full.sharded else [*by_rank] * world_size


def both_places(memory: RankMemory) -> dict[str, int]:
    """Estimated bytes by category, GPU and host together, as a live engine is measured."""
    return {name: getattr(memory.device, name) + getattr(memory.host, name) for name in CATEGORIES}


def compare(case: Case, own: list[dict[str, int]], live: list[dict[str, int]]) -> dict[str, Any]:
    """The rank and figures of a case where estimate and measurement differ most."""

    def off(rank: int) -> float:
        pairs = [(own[rank][name], live[rank][name]) for name in CATEGORIES]
        return max(abs(a / b - 1) if b else math.inf if a else 0.0 for a, b in pairs)

    worst = max(range(len(own)), key=off)
    return {
        "case": case,
        "rank": worst,
        "estimate": own[worst],
        "measured": {name: live[worst][name] for name in CATEGORIES},
        "largest_difference": off(worst),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    ds_fira.init_distributed()
    world_size = dist.get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "config.json"
        model.write_text(json.dumps(MODEL))
        mine = measure([engine_case(case) for case in CASES], str(model))
        measured: list[list[dict[str, int]]] = [[] for _ in range(world_size)]
        dist.all_gather_object(measured, mine)
        rows = []
        for index, case in enumerate(CASES):
            own = [both_places(memory) for memory in estimated(case, world_size, str(model))]
            rows.append(compare(case, own, [by_case[index] for by_case in measured]))
    if dist.get_rank() == 0:
        print(f"{world_size} ranks; MB estimated / measured")
        print(f"{'':62}" + "".join(f"{name:>19}" for name in CATEGORIES) + f"{'largest difference':>20}")
        for row in rows:
            method, setup, params = row["case"]
            settings = ", ".join(f"{key}={value}" for key, value in {**setup, **params}.items())
            figures = "".join(
                f"{row['estimate'][name] / 1e6:>10.3f} /{row['measured'][name] / 1e6:>7.3f}" for name in CATEGORIES
            )
            print(f"{method:6}{settings:56}{figures}{row['largest_difference']:>20.2%}")
        save(args.json, default_device(), world_size=world_size, rows=rows)
    ds_fira.shutdown()


if __name__ == "__main__":
    main()
