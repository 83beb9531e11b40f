"""What the ranks run to fine-tune under DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.integration.config_jobs import whole_parameters
from tests.integration.hf_jobs import example

COLOURS = ("red", "green", "blue")


def record(number: int) -> dict[str, str]:
    """A question in LLM-Adapters' form whose answer stands in it."""
    colour = COLOURS[number % 3]
    instruction = f"Item {number} is {colour}. Which colour is it?\n\nAnswer format: red/green/blue"
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {colour}", "answer": colour}


def fine_tune(arguments: list[str]) -> dict[str, Any]:
    """Run examples/finetuning/commonsense.py; returns its summary and the weights, of peft's models by peft's names."""
    with example("finetuning.commonsense") as module:
        options = module.build_parser().parse_args(arguments)
        transformers.set_seed(options.seed)
        engine, summary = module.work(options)
        found = summary | {"weights": whole_parameters(engine), "lr": engine.get_lr()[0]}
        engine.destroy()
    return found


def complaints(command_lines: list[list[str]]) -> list[str]:
    """What examples/finetuning/commonsense.py says to wrong options, before it trains."""
    found = []
    with example("finetuning.commonsense") as module:
        for arguments in command_lines:
            torch.manual_seed(0)
            try:
                module.work(module.build_parser().parse_args(arguments))
            except (OSError, ValueError) as error:
                found.append(str(error))
    return found
