"""Appendix A.5: the correlations of the three rankings that the paper prints, computed again from these rankings.

No training: `python -m examples.reproduction.table_7` takes a second.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from scipy.stats import kendalltau, spearmanr

from examples.reproduction.lib.alone import run_alone
from examples.reproduction.lib.provenance import stamp, stamp_line

NAME = "table_7"
TITLE = "Table 7: the three rankings of Appendix A.5"
# Equations 32 to 34: order of the average scaling factor of ten weight matrices at three ranks (Figure 3).
RANKINGS = {
    "R1": (7, 6, 1, 2, 4, 8, 5, 10, 9, 3),
    "R2": (7, 8, 2, 1, 5, 4, 6, 10, 9, 3),
    "R3": (6, 8, 2, 1, 5, 4, 7, 10, 9, 3),
}
COLUMNS = ("spearman", "spearman_p", "kendall", "kendall_p")
# Table 7, as printed.
PRINTED = {
    "R1, R2": ("0.8545", "0.0016", "0.7333", "0.0022"),
    "R1, R3": ("0.8303", "0.0029", "0.6889", "0.0047"),
    "R2, R3": ("0.9879", "9.31e-08", "0.9556", "5.51e-06"),
}


def compute() -> dict[str, Any]:
    """Coefficients and two-sided p-values of every pair of rankings; JSON-able.

    Returns:
        `pairs`: by pair, the figures of `COLUMNS`; `stamp`.
    """
    pairs = {}
    for (first, a), (second, b) in itertools.combinations(RANKINGS.items(), 2):
        spearman, kendall = spearmanr(a, b), kendalltau(a, b)
        found = (spearman.statistic, spearman.pvalue, kendall.statistic, kendall.pvalue)
        pairs[f"{first}, {second}"] = dict(zip(COLUMNS, map(float, found), strict=True))
    return {"pairs": pairs, "stamp": stamp()}


def as_printed(value: float, printed: str) -> str:
    """A number with as many digits, in the same notation, as a printed one."""
    mantissa = printed.partition("e")[0]
    return f"{value:.{len(mantissa.partition('.')[2])}{'e' if 'e' in printed else 'f'}}"


def differing(results: dict[str, Any]) -> list[str]:
    """The figures of Table 7 that do not come out to the printed digits, such as "R1, R2 kendall: 0.7 for 0.8"."""
    return [
        f"{pair} {column}: {as_printed(found[column], printed)} for {printed}"
        for pair, found in results["pairs"].items()
        for column, printed in zip(COLUMNS, PRINTED[pair], strict=True)
        if as_printed(found[column], printed) != printed
    ]


def section(results: dict[str, Any], figures: Path) -> str:
    """Markdown; there is no plot.

    Args:
        results: of `compute`.
        figures: where plots would go.
    """
    del figures
    rows = []
    for pair, found in results["pairs"].items():
        cells = [as_printed(found[c], printed) for c, printed in zip(COLUMNS, PRINTED[pair], strict=True)]
        same = sum(cell == printed for cell, printed in zip(cells, PRINTED[pair], strict=True))
        verdict = "equal" if same == len(cells) else f"{same} of {len(cells)} equal"
        rows.append(f"| {pair} | {' | '.join(cells)} | {' / '.join(PRINTED[pair])} | {verdict} |")
    wrong = differing(results)
    count = len(results["pairs"]) * len(COLUMNS)
    return "\n".join(
        [
            f"## {TITLE}",
            "",
            "The rankings are the paper's (equations 32 to 34), the coefficients and two-sided p-values SciPy's "
            "`spearmanr` and `kendalltau` (exact distribution). "
            f"Of the table's {count} figures {count - len(wrong)} come out to the printed digits.",
            "",
            "| rankings | Spearman | p | Kendall | p | the paper's four | verdict |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "This says that the table follows from the rankings. Whether a training gives such rankings is a matter of "
            "recorded scaling factors.",
            "",
            "Reproduce: `python -m examples.reproduction.table_7`.",
            "",
            stamp_line(results["stamp"]),
            "",
        ]
    )


if __name__ == "__main__":
    run_alone(NAME, compute, section)
