"""Memory: Table 1 and Appendix A.8's formulas, the memory columns of Tables 2 and 3, and what is really held.

Models and optimizers are made in bfloat16 and take a step, the smaller ones with real tensors (`STEPPED`), the others
on the meta device. Every tensor of weights and states is counted.

    python -m examples.reproduction.table_1
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ds_fira.tools.dry_run import PlannedRun, plan_run
from ds_fira.tools.estimate.paper import (
    MODELS,
    NOMINAL,
    PUBLISHED,
    UNITS,
    conventions,
    implied_saving,
    method_bytes,
    reproduced,
    state_saving,
)
from ds_fira.tools.models import PAPER_RANKS, config_file
from examples.reproduction.lib import table_1_report
from examples.reproduction.lib.alone import run_alone
from examples.reproduction.lib.memory_finetune import table_3
from examples.reproduction.lib.memory_measure import FLOAT32, bookkeeping_bytes, build, measure
from examples.reproduction.lib.provenance import stamp

NAME = "table_1"
TITLE = "Tables 1 to 3: memory"
TWINS = {"ReLoRA": "LoRA"}
# Stepped with real tensors; galore-torch computes exact SVDs, minutes for the larger ones.
STEPPED = {
    "Full-Rank": ("llama_60m", "llama_130m"),
    "Fira": ("llama_60m", "llama_130m", "llama_350m"),
    "LoRA": ("llama_60m", "llama_130m"),
    "GaLore": ("llama_60m",),
}
# Stepped on the meta device: torch's AdamW does that.
ON_META = ("Full-Rank", "LoRA")
# Section 1, LLaMA 7B in bfloat16: bytes for each weight, and the paper's GB.
INTRODUCTION = {"parameters": (2, 14.0), "gradients": (2, 14.0), "Adam's states": (4, 28.0)}
# Of Figure 5.
RANKS_7B = {"Fira": 64, "GaLore": 512}


def compute() -> dict[str, Any]:
    """Formulas, measured bytes and readings.

    Returns:
        `cells`, every cell of Table 2; `readings`, what other ways to count give; `saving`, of optimizer states of
        LLaMA 1B; `llama_7b`; `table_3`; `stamp`.
    """
    runs = {model: _plan(model, PAPER_RANKS[model]) for model in MODELS}
    cells = {method: [_cell(method, model, runs[model]) for model in MODELS] for method in STEPPED}
    return {
        "cells": [
            {**cell, "method": method, "published": published}
            for method, figures in PUBLISHED.items()
            for cell, published in zip(cells[TWINS.get(method, method)], figures, strict=True)
        ],
        "readings": {method: _readings(method) for method in ("Full-Rank", "Fira", "LoRA")},
        "table_5": _table_5(),
        "saving": _saving(cells),
        "llama_7b": _llama_7b(),
        "table_3": table_3(),
        "stamp": stamp(),
    }


def _plan(model: str, rank: int, state_dtype: str = "bfloat16") -> PlannedRun:
    return plan_run(build(config_file(model), "meta"), 1, 0, rank=rank, state_dtype=state_dtype)


def _cell(method: str, model: str, run: PlannedRun) -> dict[str, Any]:
    """The formula's bytes of one model and method, those held, and how these are known."""
    rank = PAPER_RANKS[model]
    weights, states = method_bytes(method, run)
    cell: dict[str, Any] = {"model": model, "rank": rank, "formula": {"weights": weights, "states": states}}
    if model in STEPPED[method]:
        cell |= {"how": "a step", "held": measure(method, build(config_file(model)), rank)}
    elif method in ON_META:
        cell |= {"how": "a step on meta", "held": measure(method, build(config_file(model), "meta"), rank)}
    elif method == "Fira":
        cell |= {"how": "allocated on meta", "held": {"weights": weights, "states": run.state_bytes(0, torch.bfloat16)}}
    else:
        return {**cell, "how": None, "held": None}
    cell["bookkeeping"] = bookkeeping_bytes(method, run)
    if method == "Fira":
        cell["float32"] = _float32(model, rank)
    return cell


def _float32(model: str, rank: int) -> dict[str, int]:
    """Fira's states in float32, the default of `FiraAdam`, by the formula and held."""
    run = _plan(model, rank, "float32")
    if model == MODELS[0]:
        held = measure("Fira", build(config_file(model)), rank, "float32")["states"]
    else:
        held = run.state_bytes(0, torch.bfloat16)
    formula = 2 * method_bytes("Fira", run)[1]
    return {"formula": formula, "held": held, "bookkeeping": bookkeeping_bytes("Fira", run, FLOAT32)}


def _readings(method: str) -> dict[str, Any]:
    """Of all ways to count that `ds_fira.tools.estimate.paper` tries: how many give a cell, and which comes nearest."""
    fitting = reproduced(method)
    found = {}
    for model, published in zip(MODELS, PUBLISHED[method], strict=True):
        tried = list(conventions(method, model))
        nearest, value = min(tried, key=lambda way: abs(way[1] - published))
        fit = sum(model in models for models in fitting.values())
        found[model] = {"tried": len(tried), "fit": fit, "nearest": list(nearest), "value": round(value, 4)}
    return {"models": found, "most_cells_of_one": max((len(models) for models in fitting.values()), default=0)}


def _table_5() -> dict[str, float]:
    """The 1B column with the 32 layers that Table 5 prints, its states in GiB beside 1.3e9 weights in GB.

    Adapters m r + n r with two moments for LoRA, three halves of m r + n r for GaLore (its formula where m = n), and no
    states for embeddings, head and norms.
    """
    run = _plan("llama_1b", PAPER_RANKS["llama_1b"])
    weights, _ = method_bytes("Full-Rank", run)
    adapters = (method_bytes("LoRA", run)[0] - weights) * 32 / 24 / UNITS["GiB"]
    nominal = 2 * NOMINAL["llama_1b"] / UNITS["GB"]
    return {"LoRA": nominal + 3 * adapters, "Fira": nominal + 1.5 * adapters}


def _saving(cells: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """1 - Fira's states over AdamW's for LLaMA 1B at rank 512: by the formula, as held, and as Table 2 implies."""
    fira, full = cells["Fira"][-1]["held"]["states"], cells["Full-Rank"][-1]["held"]["states"]
    nominal, real = implied_saving()
    return {
        "published": 0.611,
        "formula": state_saving(),
        "held": 1 - fira / full,
        "table_nominal_weights": nominal,
        "table_real_weights": real,
    }


def _llama_7b() -> dict[str, Any]:
    """Section 1's figures, and the states at the ranks of Figure 5."""
    runs = {method: _plan("llama_7b", rank) for method, rank in RANKS_7B.items()}
    count = method_bytes("Full-Rank", runs["Fira"])[0] // 2
    return {
        "weights": count,
        "introduction": {
            name: {"published": published, "bytes": each * count, "nominal_bytes": each * 7_000_000_000}
            for name, (each, published) in INTRODUCTION.items()
        },
        "states": {
            method: {"rank": RANKS_7B[method], "bytes": method_bytes(method, run)[1]} for method, run in runs.items()
        },
        "projected_states": {
            method: method_bytes(method, run)[1]
            - 2 * sum(record.state_elements for record in run.records if record.rank is None)
            for method, run in runs.items()
        },
        "adamw_states": 4 * count,
    }


def section(results: dict[str, Any], figures: Path) -> str:
    """The section of the page, and its plot `memory.png`."""
    return table_1_report.section(TITLE, results, figures)


if __name__ == "__main__":
    run_alone(NAME, compute, section)
