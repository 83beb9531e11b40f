"""Figure 5: LLaMA 7B with Fira at rank 64 and GaLore at rank 512: the commands, and the memory they take.

`python -m examples.reproduction.figure_5` plans the memory and prints the section.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_fira.tools.estimate import estimate
from ds_fira.tools.estimate.from_config import setup_of
from examples.reproduction.lib.alone import run_alone
from examples.reproduction.lib.provenance import ROOT, stamp, stamp_line
from examples.reproduction.lib.tables import table

NAME, TITLE = "figure_5", "Figure 5: LLaMA 7B"
CONFIG = "llama_7b_rank64.json"
GPUS, SEQ_LENGTH = 8, 256
RANKS = {"Fira": 64, "GaLore": 512}
COMMANDS = """```bash
bash launch/llama_7b_rank64.sh --output-dir runs/7b_fira                     # each on all GPUs of a machine with 8
bash launch/llama_7b_rank64.sh --optimizer GaLoreAdam --rank 512 --lr 0.01 --output-dir runs/7b_galore
python -m ds_fira report runs/7b_fira runs/7b_galore                         # their curves in one page
```
"""


def compute() -> dict[str, Any]:
    """Plan both trainings.

    Returns:
        `memory`: bytes on the GPU that needs most, by method and category; `largest`: in total; `stamp`.
    """
    config = json.loads((ROOT / "ds_configs" / CONFIG).read_text())
    setup = setup_of(config, gpus=GPUS, seq_length=SEQ_LENGTH, activation_checkpointing=True)
    params = {name: value for name, value in config["optimizer"]["params"].items() if name != "rank"}
    memory, totals = {}, {}
    for method, rank in RANKS.items():
        found = estimate("llama_7b", setup, [method], rank=rank, **params).methods[method].largest
        memory[f"{method}, rank {rank}"] = {
            "weights and masters": found.device.parameters + found.device.master_weights,
            "gradients": found.device.gradients,
            "optimizer states": found.device.optimizer_states,
        }
        totals[f"{method}, rank {rank}"] = found.device.total
    return {"memory": memory, "totals": totals, "gpus": GPUS, "config": CONFIG, "stamp": stamp()}


def section(results: dict[str, Any], figures: Path) -> str:
    """Markdown of the commands and the plan."""
    names = list(next(iter(results["memory"].values())))
    rows = [
        (method, *(f"{parts[name] / 1e9:.2f}" for name in names), f"{results['totals'][method] / 1e9:.1f}")
        for method, parts in results["memory"].items()
    ]
    return "\n".join(
        [
            f"## {TITLE}\n",
            "**Not run: it takes GPUs for days.** On a machine that has them; Fira as in the released code's script, "
            "GaLore at the figure's rank and its own paper's rate:\n",
            COMMANDS,
            f"GB on each of {results['gpus']} GPUs by `python -m ds_fira estimate`, ZeRO-2, bf16, activation "
            f"checkpointing (`ds_configs/{results['config']}`):\n",
            table(["", *names, "in all"], rows),
            stamp_line(results["stamp"]) + "\n",
        ]
    )


if __name__ == "__main__":
    run_alone(NAME, compute, section)
