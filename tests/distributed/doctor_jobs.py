"""What the ranks of a test pool run: an engine that trains, and tells how its optimizer is laid out."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ds_fira
from ds_fira.optim.registry import fira_of


def laid_out(ds_config: dict[str, Any], config_file: str) -> dict[str, Any]:
    """Make a step; returns the groups, the split matrices and the bytes of state by rank, as the engine has them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_file))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)
    tokens = torch.randint(0, model.config.vocab_size, (1, 8))
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    attachment = fira_of(engine).attachment
    found = {
        "groups": attachment.members,
        "split": [
            (matrix.name, matrix.shape, matrix.way, matrix.owner, tuple(matrix.sharers), matrix.draws_basis)
            for layout in attachment.layouts
            for matrix in layout.split
        ],
        "state_bytes": ds_fira.memory_report(engine)["optimizer_state_bytes"],
    }
    engine.destroy()
    return found
