"""Table 2: perplexity and optimizer memory of full-rank Adam, Fira, GaLore, LoRA and ReLoRA.

python -m examples.reproduction.report --only table_2
"""

from __future__ import annotations

from pathlib import Path

from examples.reproduction.lib.pool import Results
from examples.reproduction.lib.spec import LEARNING_RATES, SEEDS, Run, seeds
from examples.reproduction.lib.tables import Claim, claims_table, grid, lower, perplexity, score, table, tuned

NAME, TITLE = "table_2", "Table 2: pre-training with five methods"
PAPER_LR = 0.01  # of Fira and GaLore, untuned (Appendix A.2)
FIRA, GALORE = Run(method="Fira", lr=PAPER_LR), Run(method="GaLore", lr=PAPER_LR)
ADAM, LORA, RELORA = (Run(method=method, lr=PAPER_LR) for method in ("Adam", "LoRA", "ReLoRA"))
BASELINES = (ADAM, LORA, RELORA)
# The paper's grid is coarse where Adam's best rate lies, and ends where Fira's and GaLore's does.
FINER_RATES = (0.02, *LEARNING_RATES[:2], 0.003, 0.002, *LEARNING_RATES[2:])
FINER = (ADAM, FIRA, GALORE)
# LLaMA 60M, 130M, 350M, 1B.
PAPER = {
    "Adam": (34.06, 25.08, 18.80, 15.56),
    "Fira": (31.06, 22.73, 16.85, 14.31),
    "GaLore": (34.88, 25.36, 18.95, 15.64),
    "LoRA": (34.99, 33.92, 25.58, 19.21),
    "ReLoRA": (37.04, 29.37, 29.08, 18.33),
}


def stages(results: Results) -> list[list[Run]]:
    """The runs, a stage after the other: the second needs the results of the first."""
    first = [run for method in (LORA, RELORA) for run in grid(method)]
    first += [run for method in FINER for run in grid(method, FINER_RATES)]
    if any(run not in results for run in first):
        return [first]
    chosen = [tuned(results, method) for method in (*BASELINES, FIRA, GALORE)]
    chosen += [tuned(results, method, FINER_RATES) for method in FINER]
    return [first, seeds(FIRA, GALORE, *chosen)]


def section(results: Results, figures: Path) -> str:
    """Markdown of the tuning, the table and the claims."""
    rates = [
        (run.method, *(f"{perplexity(results, one):.2f}" for one in grid(run)), f"{tuned(results, run).lr:g}")
        for run in (*BASELINES, FIRA, GALORE)
    ]
    finer = [
        (
            run.method,
            *(f"{perplexity(results, one):.2f}" for one in grid(run, FINER_RATES)),
            f"{tuned(results, run, FINER_RATES).lr:g}: **{score(results, tuned(results, run, FINER_RATES))}**",
        )
        for run in FINER
    ]
    rows = []
    chosen = [tuned(results, run) for run in (FIRA, GALORE) if tuned(results, run) != run]
    for run in (tuned(results, ADAM), FIRA, GALORE, *chosen, tuned(results, LORA), tuned(results, RELORA)):
        found = results[run]
        own = "the paper's rate" if run in (FIRA, GALORE) else "tuned"
        published = "-" if run in chosen else " / ".join(f"{value:.2f}" for value in PAPER[run.method])
        rows.append(
            (
                f"{run.method}, {own}, lr {run.lr:g}",
                f"**{score(results, run)}**",
                f"{found['state_bytes'] / 1e6:.2f}",
                f"{found['trainable_parameters'] / 1e6:.2f}",
                published,
            )
        )
    return "\n".join(
        [
            "Learning rates from the paper's grid, by validation perplexity at seed 0:\n",
            table(["method", *(f"{rate:g}" for rate in LEARNING_RATES), "chosen"], rates),
            "On a finer and wider grid:\n",
            table(["method", *(f"{rate:g}" for rate in FINER_RATES), "chosen"], finer),
            f"Validation perplexity over {len(SEEDS)} seeds, rank {results.size.rank} of {results.size.hidden}; "
            "optimizer state as it lies in memory, in "
            f"{'float32' if results.size.dtype == 'float32' else results.size.dtype} and MB:\n",
            table(["method", "perplexity", "state MB", "trained M", "paper: 60M / 130M / 350M / 1B"], rows),
            claims_table(claims(results)),
        ]
    )


def claims(results: Results) -> list[Claim]:
    """What Table 2 says of the order of the methods."""
    fira, galore = ("Fira", score(results, FIRA)), ("GaLore", score(results, GALORE))
    adam, lora, relora = ((run.method, score(results, tuned(results, run))) for run in BASELINES)
    best = [("Fira", score(results, tuned(results, FIRA))), ("GaLore", score(results, tuned(results, GALORE)))]
    fine = [(run.method, score(results, tuned(results, run, FINER_RATES))) for run in (FIRA, ADAM)]
    return [
        lower("Fira is below GaLore", "31.06 against 34.88 (60M)", fira, galore),
        lower("Fira is below GaLore, both tuned", "not tuned there", *best),
        lower("Fira is below full-rank Adam", "31.06 against 34.06", fira, adam),
        lower("Fira tuned as Adam is, is below full-rank Adam", "not tuned there", best[0], adam),
        lower("Fira is below full-rank Adam, both tuned on the finer grid", "not tuned there", *fine),
        lower("Fira is below LoRA", "31.06 against 34.99", fira, lora),
        lower("Fira is below ReLoRA", "31.06 against 37.04", fira, relora),
        lower("full-rank Adam is below GaLore", "34.06 against 34.88", adam, galore),
    ]
