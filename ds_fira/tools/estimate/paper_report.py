"""Prints the paper's Table 2 beside the formula's, and names the differences."""

from __future__ import annotations

from ds_fira.tools.estimate import paper
from ds_fira.tools.models import PAPER_RANKS

SOURCES = {
    "Fira": "The paper says that its estimates follow the GaLore paper, and Fira's row repeats GaLore's.",
    "LoRA": "The table's caption says that the figures of all baselines are taken from the GaLore paper.",
}


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
    return [*lines, "", "Differences:", *(f"- {line}" for line in differences()), "", *saving_lines()]


def differences() -> list[str]:
    """What differs and the likely cause, from the conventions that were tried."""
    full = paper.reproduced("Full-Rank")
    by_name = [model for convention, models in full.items() if "weights by name" in convention for model in models]
    real = [model for convention, models in full.items() if "weights all" in convention for model in models]
    never = [model for model in paper.MODELS if model not in by_name + real]
    lines = [
        f"Full-Rank {_names(real)}: follows from the formula with the real number of weights, in GiB.",
        f"Full-Rank {_names(by_name)}: follows only with the number in the model's name (60M, 1.3B) times 6 bytes, in "
        "GB; the models of the paper's Table 5 have 58.1M and 1339M weights. So the row mixes GB and GiB.",
        f"Full-Rank {_names(never)}: follows from no convention tried; the nearest is the formula in GiB, 0.749.",
    ]
    for method, twin in (("Fira", "GaLore"), ("LoRA", "ReLoRA")):
        cells = max(map(len, paper.reproduced(method).values()), default=0)
        result = f"none gives more than {cells} of the 4 cells" if cells else "none gives any cell"
        tried = sum(1 for _ in paper.conventions(method, paper.MODELS[-1]))
        spread = [cell.difference("GiB") for cell in paper.table_2() if cell.method == method]
        lines.append(
            f"{method} and {twin}: no cell follows from the formula, which lies {min(spread):+.1%} to "
            f"{max(spread):+.1%} from the paper's figures in GiB. Of {tried} conventions tried, {result}. "
            + SOURCES[method]
        )
    lines += [
        "Tried: GB and GiB; vocabularies of 32000, 32100 and 32128; tied and untied heads; weights as they are, by the "
        "model's name, and without embeddings; AdamW's states for all, one, or none of embeddings and norms; the "
        "formula's terms with the sides exchanged, without the basis, for attention alone, and for embeddings too; "
        "LoRA on all, attention's or the MLP's weights.",
        "GaLore and Fira have the same figures: Fira's one number more for each matrix is 2 bytes, below the rounding.",
        "Table 5 gives the 1B model 24 heads and 32 layers; 24 heads do not divide its width of 2048. The released "
        "code has 32 heads and 24 layers, which gives the 61.1% below.",
        "Table 2 gives the 60M model a width of 256 (128 / 256), Table 5 one of 512; with 512 the weights are 58.1M.",
    ]
    return lines


def saving_lines() -> list[str]:
    """The 61.1%, and what the table itself would imply."""
    nominal, real = paper.implied_saving()
    return [
        f"Saving of optimizer states for LLaMA 1B at rank 512: {paper.state_saving():.1%} (the paper: 61.1%).",
        "Defined as 1 - S / (2 W): S sums m r + 2 n r + 1 over the 168 projected matrices and 2 for every element of "
        "embeddings, head and norms; W is all 1339M weights; vocabulary 32000, head not tied. The bytes cancel.",
        f"The 61.1% of the paper's text so follows from its formula and not from its Table 2, whose 1B column implies "
        f"{nominal:.1%} for 2.60 GB of weights ({real:.1%} for 2.68 GB).",
    ]


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
        "differences": differences(),
        "state_saving_1b": paper.state_saving(),
    }


def _names(models: list[str]) -> str:
    return " and ".join(model.removeprefix("llama_").upper() for model in paper.MODELS if model in models)
