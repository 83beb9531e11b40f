"""What the ranks of a test pool run to measure memory: engines around a LLaMA of a few million parameters."""

from __future__ import annotations

import gc
from typing import Any

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ds_fira  # noqa: F401  (the import registers)
from ds_fira.zero_memory import backward_bytes

STEPS = 2


def live_bytes() -> int:
    """Bytes of all tensors that this process holds, each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        # By type: lazy proxies answer isinstance by importing what they stand for.
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu" and item.layout == torch.strided:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(cases: list[dict[str, Any]], config_file: str) -> list[dict[str, int]]:
    """Train every DeepSpeed config for two steps.

    Returns:
        For each, the bytes of `ds_fira.zero_memory.CATEGORIES` in the last backward pass, and "all" tensors that the
        process has beyond those it had before, after that pass.
    """
    results = []
    for ds_config in cases:
        before = live_bytes()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_file))
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=ds_config
        )
        tokens = torch.randint(0, model.config.vocab_size, (1, 16))
        measured: dict[str, int] = {}

        def backward(engine: Any = engine, tokens: torch.Tensor = tokens) -> None:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)

        for _ in range(STEPS):
            measured = backward_bytes(engine, backward)
            measured["all"] = live_bytes() - before
            engine.step()
        results.append(measured)
        engine.destroy()
        del engine, model, backward
        gc.collect()
    return results
