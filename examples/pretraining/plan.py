"""What a run will be, and whether its memory suffices, before anything large is made."""

import socket
from typing import Any

import deepspeed.comm as dist
import torch
import transformers

from ds_fira.optim.registry import TYPES
from ds_fira.tools.estimate import Available, Estimate, available_memory, estimate, require_fit
from ds_fira.tools.estimate.from_config import setup_of
from ds_fira.tools.estimate.methods import RELATIVES
from ds_fira.tools.estimate.table import estimate_lines

from .data import agreed
from .documents import DataError


def estimate_run(
    model_config: transformers.LlamaConfig, config: dict[str, Any], seq_length: int, checkpointing: bool
) -> Estimate:
    """The memory of a run, before it is made.

    Args:
        model_config: of the model.
        config: DeepSpeed's, with settled batch sizes.
        seq_length: tokens in a sequence.
        checkpointing: whether activations are computed again in the backward pass.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config)
    setup = setup_of(config, gpus=dist.get_world_size(), seq_length=seq_length, activation_checkpointing=checkpointing)
    kind, params = config["optimizer"]["type"], config["optimizer"]["params"]
    if kind not in TYPES or params.get("rank") is None:
        # No subspace; the other methods' figures, which need a rank, are not made.
        return estimate(model, setup, ["AdamW"], rank=1)
    for name, algorithm in RELATIVES.items():
        if kind == algorithm.name:
            return estimate(model, setup, [name], **params)
    return estimate(model, setup, ["Fira"], optimizer=kind, **params)


def own_memory() -> Available:
    """What this process may use, the processes of one machine sharing its memory; a collective call."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return available_memory(hosts.count(socket.gethostname()))


def check_memory(found: Estimate) -> None:
    """Compare an estimate with what every process may use; a collective call.

    Raises:
        DataError: it does not suffice on some process, on every process with the same sentence.
    """
    available = own_memory()

    def require() -> None:
        try:
            for method in found.methods.values():
                require_fit(method, available)
        except ValueError as error:
            raise DataError(str(error)) from None

    agreed(require)


def describe(
    found: Estimate, available: Available, model_name: str, config: dict[str, Any], steps: int, seq_length: int
) -> str:
    """The plan as text: model, optimizer, batch, steps, the memory of a process, and whether it fits here."""
    total = config["train_batch_size"]
    batch = (
        f"{total} sequences of {seq_length} tokens = {found.setup.gpus} processes x "
        f"{config['train_micro_batch_size_per_gpu']} x {config['gradient_accumulation_steps']} accumulation steps"
    )
    params = ", ".join(f"{name} {value}" for name, value in config["optimizer"]["params"].items())
    lines = [
        f"model       {model_name}, {found.parameters:,} parameters, {found.projected_matrices} projected matrices",
        f"optimizer   {config['optimizer']['type']}: {params}",
        f"batch       {batch}",
        f"steps       {steps:,}, {steps * total * seq_length:,} tokens",
        "",
        *estimate_lines(found, available),
    ]
    return "\n".join(lines)
