"""Fira with the other ways to save memory: ZeRO-2, bf16 or fp16, activation checkpointing, compressed states.

`python -m examples.reproduction.beyond_combined` trains and prints the section. Every run is
`examples/pretrain_llama.py` under the DeepSpeed launcher on two processes, with the quickstart's model and text.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed.training import CONFIG, train
from examples.reproduction.lib.alone import run_alone
from examples.reproduction.lib.provenance import stamp, stamp_line
from examples.reproduction.lib.tables import table

NAME, TITLE = "beyond_combined", "Fira under ZeRO-2 with every saving at once"
STEPS = 100
SEED = 0
CONFIGS = CONFIG.parent
CHECKPOINTED = ["--activation-checkpointing", "transformers"]
# Of the quickstart's config; the other files are for larger models and batches.
SMALL = {"rank": 32, "update_proj_gap": 50, "lr": 0.005}
BATCH = ["--batch-size", "8", "--total-batch-size", "16"]
# Name, DeepSpeed config, settings on top of its own (None: AdamW), arguments of the script.
RUNS: list[tuple[str, str, dict[str, Any] | None, list[str]]] = [
    ("AdamW, bf16, ZeRO-2", "zero2_bf16.json", None, ["--lr", "0.001"]),
    ("GaLoreAdam, bf16, ZeRO-2", "zero2_bf16.json", {}, ["--optimizer", "GaLoreAdam"]),
    ("FiraAdam, bf16, ZeRO-2", "zero2_bf16.json", {}, []),
    ("FiraAdam, fp16, ZeRO-2", "zero2_fp16.json", SMALL, BATCH),
    ("FiraAdam, int8 states", "zero2_bf16.json", {"state_dtype": "int8"}, []),
    ("FiraAdam, bf16 states, checkpointing", "zero2_bf16.json", {"state_dtype": "bfloat16"}, CHECKPOINTED),
]
KEPT = ("val_loss", "val_perplexity", "zero_stage", "parameters", "seconds", "tokens_per_second", "deepspeed_config")


def compute() -> dict[str, Any]:
    """Train every combination.

    Returns:
        `runs`: name, settings, figures of the script's summary and its loss curve; `stamp`; `steps`; `seed`.
    """
    runs = []
    for name, config, settings, arguments in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            own = ["--steps", str(STEPS), "--seed", str(SEED), "--eval-every", str(STEPS // 3), *arguments]
            summary = train(settings, own, Path(folder), CONFIGS / config)
            curve = (Path(folder) / "history.csv").read_text().splitlines()
        states = sum(summary.get("optimizer_state_bytes", [])) or None
        figures = {key: summary.get(key) for key in KEPT}
        named = {"name": name, "config": config, "settings": settings, "arguments": arguments}
        runs.append({**named, "states": states, **figures, "history": curve})
    return {"runs": runs, "steps": STEPS, "seed": SEED, "stamp": stamp()}


def section(results: dict[str, Any], figures: Path) -> str:
    """Markdown of the table."""
    plain = next(run for run in results["runs"] if run["name"] == "FiraAdam, bf16, ZeRO-2")
    rows = []
    for run in results["runs"]:
        distance = math.expm1(run["val_loss"] - plain["val_loss"])
        states = f"{run['states'] / 1e6:.2f}" if run["states"] else "-"
        rows.append((run["name"], f"{math.exp(run['val_loss']):.1f}", f"{distance:+.1%}", states, f"`{run['config']}`"))
    worst = max(
        abs(math.expm1(run["val_loss"] - plain["val_loss"]))
        for run in results["runs"]
        if run["name"].startswith("FiraAdam")
    )
    return "\n".join(
        [
            f"## {TITLE}\n",
            f"{plain['parameters'] / 1e6:.1f} M parameters, {results['steps']} steps, two processes, one seed; "
            "rates are the configs'.\n",
            table(["run", "perplexity", "to bf16", "states of both ranks, MB", "config"], rows),
            f"No combination is further than {worst:.1%} from FiraAdam in bf16.\n",
            stamp_line(results["stamp"]) + "\n",
        ]
    )


if __name__ == "__main__":
    run_alone(NAME, compute, section)
