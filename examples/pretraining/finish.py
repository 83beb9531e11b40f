"""After the last step: the figures of the summary that need the engine, and the model in the Hugging Face form."""

import argparse
from pathlib import Path

import deepspeed
import deepspeed.comm as dist

import ds_fira
from ds_fira.optim.registry import TYPES

from .data import TrainingData
from .loop import evaluate
from .report import History, perplexity


def final_figures(
    engine: deepspeed.DeepSpeedEngine, data: TrainingData, options: argparse.Namespace, history: History
) -> dict[str, object]:
    """The figures of the summary that need the engine; a collective call."""
    val_loss = evaluate(engine, data)
    history.validation.append((options.steps, val_loss))
    figures = {
        "optimizer": options.optimizer,
        "zero_stage": engine.zero_optimization_stage(),
        "val_loss": val_loss,
        "val_perplexity": perplexity(val_loss),
        "unigram_entropy": data.facts["unigram_entropy"],
        "text": data.facts,
    }
    if options.optimizer in TYPES:
        memory = ds_fira.memory_report(engine)
        figures |= ds_fira.metrics(engine)
        figures |= {
            "optimizer_state_bytes": memory["optimizer_state_bytes"],
            "optimizer_state_bytes_paper_formula": memory["paper_formula_bytes"],
            "optimizer_state_bytes_adamw": memory["adamw_bytes"],
        }
    return figures


def save_model(engine: deepspeed.DeepSpeedEngine, data: TrainingData, folder: Path) -> None:
    """Write model and tokenizer in the Hugging Face form; the first process writes, all take part."""
    model = engine.module
    # Under ZeRO-3 every process holds a part of each parameter, and none the whole.
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=engine.zero_optimization_stage() == 3):
        if dist.get_rank() == 0:
            model.config.use_cache = True
            model.save_pretrained(folder)
            data.tokenizer.save_pretrained(folder)
