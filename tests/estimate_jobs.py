"""What the ranks of a test pool run to measure memory: engines around a LLaMA of a few million parameters."""

from __future__ import annotations

import gc
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import ds_fira  # noqa: F401  (the import registers)
from ds_fira.selection import projected_weights
from ds_fira.zero_memory import backward_bytes

STEPS = 2


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


def live_bytes() -> int:
    """Bytes of all tensors that this process holds, each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        # By type: lazy proxies answer isinstance by importing what they stand for.
        if issubclass(type(item), Tensor) and item.device.type == "cpu" and item.layout == torch.strided:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(cases: list[tuple[dict[str, Any], int | None]], config_file: str) -> list[dict[str, int]]:
    """Train for two steps with every DeepSpeed config.

    Args:
        cases: configs, each with the rank of LoRA adapters, or None to train all weights.
        config_file: of the model.

    Returns:
        For each, the bytes of `ds_fira.zero_memory.CATEGORIES` in the last backward pass, and of "all" tensors that
        the process has after that pass beyond those it had before.
    """
    results = []
    for ds_config, lora_rank in cases:
        before = live_bytes()
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

        for _ in range(STEPS):
            measured = backward_bytes(engine, backward)
            measured["all"] = live_bytes() - before
            engine.step()
        results.append(measured)
        engine.destroy()
        del engine, model, trained, backward
        gc.collect()
    return results
