"""The share that one rank of 8 has of a model: the optimizer of its flat partitions, for stages 4 and 9."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.communication.partition import meta_llama, rank_partition
from benchmarks.gpu_check.record import Check
from ds_fira import FiraAdam
from ds_fira.tools.dry_run import PlannedRun, plan_run

RANKS = 8
# Steps from one refresh to the next: more than are made.
GAP = 10**6
# For rehearsals: of its eight layers no rank of 8 has a part of a matrix.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}


def small_model(**changes: Any) -> torch.nn.Module:
    """A LLaMA of some ten thousand weights, on torch's default device."""
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, **changes}), attn_implementation="eager")


def planned(check: Check, **params: Any) -> PlannedRun:
    """The model under ZeRO-2 on 8 ranks, with settings as in a DeepSpeed file."""
    settings = {"alpha": 0.25, "update_proj_gap": GAP, "subspace": "randomized", "lr": 1e-6, **params}
    if check.sizes.model is not None:
        return plan_run(meta_llama(check.sizes.model), RANKS, zero_stage=2, **settings)
    with torch.device("meta"):
        return plan_run(small_model(), RANKS, zero_stage=2, **settings)


def partition(check: Check, **params: Any) -> tuple[FiraAdam, list[Parameter]]:
    """Optimizer and flat partitions of the first rank, with random weights and gradients."""
    return rank_partition(planned(check, **params), 0, check.device)
