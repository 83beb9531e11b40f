"""The cells of the memory experiment, the models it knows, and the DeepSpeed config of a cell."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretraining.configs import read_json

from ds_fira.tools.models import NAMES, config_file

# Shapes whose activations, states and weights are of one order at the default sequence length.
OWN_MODELS = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
}
OWN_VOCABULARY = {"tiny": 256, "small": 2048}


@dataclass(frozen=True)
class Cell:
    """One combination of the grid.

    Attributes:
        optimizer: `AdamW` or `FiraAdam`.
        stage: of ZeRO.
        checkpointing: of activations.
        offload: of the optimizer to the CPU.
        master: dtype of master weights, gradients and states, `fp32` or `bf16`; the model is in bf16.
    """

    optimizer: str
    stage: int
    checkpointing: bool
    offload: bool
    master: str

    @property
    def name(self) -> str:
        """For file names and progress."""
        parts = [self.optimizer, f"zero{self.stage}", self.master]
        return "-".join([*parts, *["checkpointing"] * self.checkpointing, *["offload"] * self.offload])


@dataclass(frozen=True)
class Run:
    """What all cells share.

    Attributes:
        model: a transformers config as a dict.
        seq_length: tokens of a sequence.
        micro_batch: sequences of a rank in a step.
        steps: that are timed.
        rank: of FiraAdam's subspaces.
        state_dtype: of FiraAdam's states with fp32 master weights.
        method: of activation checkpointing, as in `ds_fira.checkpoint_activations`.
        cpu_adam: AdamW under offload is DeepSpeed's own, which compiles an extension.
        processes: of data parallelism.
        seed: of weights and tokens.
    """

    model: dict[str, Any]
    seq_length: int
    micro_batch: int
    steps: int
    rank: int
    state_dtype: str
    method: str
    cpu_adam: bool
    processes: int
    seed: int

    @property
    def refresh_gap(self) -> int:
        """Steps between refreshes that make the measured step one of them: it is number 3 + `steps`."""
        return self.steps + 2


def cells(
    optimizers: list[str], stages: list[int], checkpointing: list[bool], offload: list[bool], masters: list[str]
) -> list[Cell]:
    """All combinations, in the order of the table."""
    return [
        Cell(optimizer, stage, checkpoint, offloaded, master)
        for master, offloaded, stage, checkpoint, optimizer in itertools.product(
            masters, offload, stages, checkpointing, optimizers
        )
    ]


def model_config(name: str, seq_length: int) -> dict[str, Any]:
    """The transformers config of a model.

    Args:
        name: one of `OWN_MODELS` or of `ds_fira.tools.models.NAMES`, or a JSON file of a LLaMA's config.
        seq_length: has to fit its positions.

    Raises:
        ValueError: there is no such model or file, or the sequence is too long for it.
    """
    if name in OWN_MODELS:
        config = {**OWN_MODELS[name], "vocab_size": OWN_VOCABULARY[name], "max_position_embeddings": seq_length}
    else:
        path = config_file(name) if name in NAMES else Path(name)
        if not path.is_file():
            known = ", ".join((*OWN_MODELS, *NAMES))
            raise ValueError(f"--model {name} is neither a file nor one of {known}")
        config = read_json(path, "--model")
    positions = config.get("max_position_embeddings", seq_length)
    if seq_length > positions:
        raise ValueError(f"--seq-length {seq_length} exceeds the {positions} positions of --model {name}")
    return {**config, "use_cache": False}


def deepspeed_config(cell: Cell, run: Run, largest_parameter: int) -> dict[str, Any]:
    """The DeepSpeed config of a cell.

    Args:
        cell: what is measured.
        run: what is the same for all.
        largest_parameter: elements; a bucket of gradients has room for as many, since DeepSpeed's default of 5e8 would
            be most of the memory of a small model.
    """
    zero: dict[str, Any] = {"stage": cell.stage, "reduce_bucket_size": largest_parameter}
    if cell.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    bf16 = {"enabled": True}
    if cell.master == "bf16":
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    config = {
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_clipping": 1.0,
        "bf16": bf16,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": cell.optimizer, "params": _optimizer_params(cell, run)},
    }
    if cell.checkpointing and run.method == "deepspeed":
        config["activation_checkpointing"] = {"partition_activations": False, "cpu_checkpointing": False}
    return config


def _optimizer_params(cell: Cell, run: Run) -> dict[str, Any]:
    if cell.optimizer == "AdamW":
        # DeepSpeed's own Adam compiles an extension first, and its states have the same size.
        return {"lr": 1e-3, "torch_adam": not (cell.offload and run.cpu_adam)}
    return {
        "lr": 1e-3,
        "rank": run.rank,
        "update_proj_gap": run.refresh_gap,
        "subspace": "randomized",
        "refresh_moments": "rotate",
        "state_dtype": "bfloat16" if cell.master == "bf16" else run.state_dtype,
    }
