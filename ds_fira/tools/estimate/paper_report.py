"""Prints the paper's Table 2 beside the formula's, and names the differences."""

from __future__ import annotations

from pathlib import Path

from ds_fira.tools.estimate import paper
from ds_fira.tools.models import PAPER_RANKS

# The differences, a line each, then what the 61.1% is.
TEXT = Path(__file__).with_name("paper.txt")


def paper_lines() -> list[str]:
    """The table, cell by cell, and the list of differences."""
    lines = [
        "Table 2 of arXiv 2410.01623: weights and optimizer states in bfloat16, the paper's figure and its formula's",
        f"{'method':10}{'model':>12}{'rank':>6}{'paper':>9}{'formula':>12}{'difference':>12}{'':>14}{'difference':>12}",
    ]
    for cell in paper.table_2():
        mark = "  follows" if cell.follows("GB") or cell.follows("GiB") else ""
        lines.append(
            f"{cell.method:10}{cell.model:>12}{PAPER_RANKS[cell.model]:>6}{cell.published:>8.2f}G"
            f"{cell.own / 1e9:>9.3f} GB{cell.difference('GB'):>12.1%}{cell.own / 2**30:>10.3f} GiB"
            f"{cell.difference('GiB'):>12.1%}{mark}"
        )
    differences, saving = notes()
    return [*lines, "", "Differences:", *(f"- {line}" for line in differences), "", *saving]


def notes() -> tuple[list[str], list[str]]:
    """What differs and the likely cause, from the conventions that were tried; and what the 61.1% is."""
    full = paper.reproduced("Full-Rank")
    by_name = [model for convention, models in full.items() if "weights by name" in convention for model in models]
    real = [model for convention, models in full.items() if "weights all" in convention for model in models]
    nominal, implied = paper.implied_saving()
    text = TEXT.read_text().format(
        real=_names(real),
        by_name=_names(by_name),
        never=_names([model for model in paper.MODELS if model not in by_name + real]),
        **{method: _distance(method) for method in ("Fira", "LoRA")},
        saving=f"{paper.state_saving():.1%}",
        nominal=f"{nominal:.1%}",
        implied=f"{implied:.1%}",
    )
    differences, saving = text.strip().split("\n\n")
    return differences.split("\n"), saving.split("\n")


def _distance(method: str) -> tuple[str, int, str]:
    """How far a method's formula is from the paper's row, how many conventions were tried, and what they give."""
    cells = max(map(len, paper.reproduced(method).values()), default=0)
    result = f"none gives more than {cells} of the 4 cells" if cells else "none gives any cell"
    tried = sum(1 for _ in paper.conventions(method, paper.MODELS[-1]))
    apart = [cell.difference("GiB") for cell in paper.table_2() if cell.method == method]
    return f"{min(apart):+.1%} to {max(apart):+.1%}", tried, result


def paper_json() -> dict[str, object]:
    """The same for a machine."""
    return {
        "table_2": [
            {
                "method": cell.method,
                "model": cell.model,
                "rank": PAPER_RANKS[cell.model],
                "paper": cell.published,
                "formula_bytes": cell.own,
                "difference_gb": cell.difference("GB"),
                "difference_gib": cell.difference("GiB"),
                "follows": [unit for unit in ("GB", "GiB") if cell.follows(unit)],
            }
            for cell in paper.table_2()
        ],
        "conventions": {
            method: [{"convention": list(key), "models": models} for key, models in paper.reproduced(method).items()]
            for method in ("Full-Rank", "Fira", "LoRA")
        },
        "differences": notes()[0],
        "state_saving_1b": paper.state_saving(),
    }


def _names(models: list[str]) -> str:
    return " and ".join(model.removeprefix("llama_").upper() for model in paper.MODELS if model in models)
