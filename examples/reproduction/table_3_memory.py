"""The memory column of the paper's Table 3, beside ways to count that give it.

Two bytes an element, as in the paper's A.8, in GB of 10^9 bytes. What the paper's text says (Q, K, V, up and down
projections at rank 32, optimizer states by Table 1) and what gives the published figure are not always the same.

    python -m examples.reproduction.table_3_memory [--gpus 8 --gpu-memory rtx4090]

prints both, and with `--gpus` the memory of fine-tuning LLaMA-7B under DeepSpeed, by `ds_fira estimate`'s formulas.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from ds_fira.core.selection import find_projected_weights
from ds_fira.sharding.geometry import matrices_of
from ds_fira.tools.estimate.cards import Available, card_memory
from ds_fira.tools.estimate.compute import estimate
from ds_fira.tools.estimate.from_config import setup_of
from ds_fira.tools.estimate.methods import lora_numel
from ds_fira.tools.estimate.model import load_model
from ds_fira.tools.estimate.table import estimate_lines
from examples.finetuning.tuning import Recipe, prepare

BYTES, GB = 2, 1e9
CONFIG = Path(__file__).resolve().parents[2] / "ds_configs" / "finetune_commonsense.json"
# Table 3: memory in its unit "G" and average accuracy of the eight tasks in per cent.
PUBLISHED = {
    "Fira": (0.26, 76.9),
    "GaLore": (0.26, 62.7),
    "LoRA": (0.35, 74.7),
    "Prefix": (0.05, 64.6),
    "Series": (0.42, 70.8),
    "Parallel": (1.49, 72.2),
}
# Trained parameters in per cent of the model, as Table 1 of DoRA (arXiv 2402.09353) has them, and the model as "7B".
ADAPTER_PERCENT = {"Prefix": 0.11, "Series": 0.99, "LoRA": 0.83, "Parallel": 3.54}
NOMINAL = 7e9


def low_rank_states(shapes: list[tuple[int, int]], rank: int) -> int:
    """Elements of Fira's states by the paper's Table 1, m r + 2 n r + 1 for each matrix."""
    return sum(min(shape) * rank + 2 * max(shape) * rank + 1 for shape in shapes)


def _shapes(targets: tuple[str, ...] | None) -> list[tuple[int, int]]:
    model = load_model("llama_7b")
    names = find_projected_weights(model, targets).values()
    parameters = dict(model.named_parameters())
    return [matrix.shape for name in names for matrix in matrices_of(name, tuple(parameters[name].shape))]


def memory_rows() -> list[dict[str, object]]:
    """Rows `method`, `counted`, `gb` (what it comes to), `published` and `agrees` (to the paper's last digit)."""
    recipe = Recipe()
    five, seven = _shapes(recipe.target_modules), _shapes(None)
    adapters = sum(lora_numel(shape, recipe.rank) for shape in five)
    factors = [side for m, n in five for side in ((recipe.rank, n), (m, recipe.rank))]
    ways: list[tuple[str, str, Callable[[], float]]] = [
        ("Fira", "states, Q, K, V, up and down", lambda: low_rank_states(five, recipe.rank)),
        ("Fira", "states, all seven projections of a layer", lambda: low_rank_states(seven, recipe.rank)),
        (
            "Fira",
            "released script: LoRA's factors, and their states at rank 16",
            lambda: adapters + low_rank_states(factors, recipe.adapter_rank),
        ),
        ("LoRA", "states, Q, K, V, up and down", lambda: 2 * adapters),
        ("LoRA", "states and factors", lambda: 3 * adapters),
    ]
    for method, percent in ADAPTER_PERCENT.items():
        text = f"states and adapters, {percent}% of 7e9 parameters"
        ways.append((method, text, lambda percent=percent: 3 * percent / 100 * NOMINAL))
    rows = []
    for method, counted, count in ways:
        gb, published = count() * BYTES / GB, PUBLISHED[method][0]
        # Half a unit of the last digit, and a little for the division.
        agrees = abs(gb - published) <= 0.00501
        rows.append({"method": method, "counted": counted, "gb": gb, "published": published, "agrees": agrees})
    return rows


def memory_table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    lines = ["| method | counted, at two bytes | GB | Table 3 | |", "|---|---|---|---|---|"]
    for row in rows:
        mark = "agrees" if row["agrees"] else ""
        lines.append(f"| {row['method']} | {row['counted']} | {row['gb']:.3f} | {row['published']:.2f} | {mark} |")
    return "\n".join(lines)


def gpu_memory(gpus: int, card: str) -> list[str]:
    """The table of `python -m ds_fira estimate` for the commonsense recipe: weights outside the projections are frozen.

    Raises:
        ValueError: the card or the number of GPUs is not legal.
    """
    recipe, config = Recipe(), json.loads(CONFIG.read_text())
    setup = setup_of(config, gpus=gpus, seq_length=recipe.max_length, activation_checkpointing=False)
    model = prepare(load_model("llama_7b"), "fira", recipe)
    params = {name: config["optimizer"]["params"][name] for name in ("rank", "update_proj_gap", "alpha")}
    return estimate_lines(estimate(model, setup, **params), Available(card_memory(card)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="The memory column of Table 3, and of fine-tuning LLaMA-7B.")
    parser.add_argument("--gpus", type=int, help="also the memory on each of so many GPUs")
    parser.add_argument("--gpu-memory", default="rtx4090", help="a card or GiB")
    options = parser.parse_args()
    print(memory_table(memory_rows()))
    if options.gpus is not None:
        print("", *gpu_memory(options.gpus, options.gpu_memory), sep="\n")


if __name__ == "__main__":
    main()
