"""How alike scaling factors are in two trainings: the correlations of Table 8, and a plot like Figure 3.

Works on recordings as `ds_fira.scaling_factors` gives them, or `ds_fira.read_scaling_factors` from a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: a training machine has no screen
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import kendalltau, rankdata, spearmanr

Factors = Mapping[str, Mapping[str, Any]]
# Appendix A.6 samples as many columns of each matrix.
SAMPLED_COLUMNS = 100
# Rows of a plot that are labelled one by one; of more, every so many are.
MOST_LABELS = 30


def correlations(low: Factors, full: Factors, seed: int) -> dict[str, Any]:
    """Spearman's and Kendall's coefficients between the scaling factors of two trainings, as in Appendix A.6.

    At matrix level every weight matrix is one item: its factor, averaged over the recorded steps. At column level an
    item is a column (a row where `side` is "right"), averaged likewise; `SAMPLED_COLUMNS` are drawn of each matrix,
    all of a smaller one, the same in both trainings, and all matrices' are pooled. Columns without a factor, whose
    gradient was zero throughout, are not drawn.

    Pooled columns differ between matrices before they differ within one, so a coefficient over all of them contains the
    matrix level. `within` is the mean over matrices of Spearman's coefficient inside each, which does not.

    Args:
        low: of low-rank training.
        full: of full-rank training, of the same model.
        seed: of the draw.

    Returns:
        JSON-able: `matrix` and `column`, each with `items`, `spearman`, `spearman_p`, `kendall`, `kendall_p` (two-sided
        p-values, 0.0 where they are below the least float); `column` also with `within`; `steps`, the most recorded
        steps of a matrix, of both.

    Raises:
        ValueError: the recordings are of different matrices, or fewer than three.
    """
    _require_comparable(low, full)
    generator = np.random.default_rng(seed)
    ours, theirs, within = [], [], []
    for name in low:
        a, b = (np.asarray(recorded[name]["column"], dtype=np.float64) for recorded in (low, full))
        defined = np.flatnonzero(np.isfinite(a) & np.isfinite(b))
        drawn = generator.choice(defined, min(SAMPLED_COLUMNS, len(defined)), replace=False)
        ours.append(a[drawn])
        theirs.append(b[drawn])
        if len(drawn) > 1:
            within.append(float(spearmanr(a[drawn], b[drawn]).statistic))
    columns = _coefficients(np.concatenate(ours), np.concatenate(theirs))
    return {
        "matrix": _coefficients(averages(low), averages(full, list(low))),
        "column": {**columns, "within": float(np.mean(within))},
        "steps": [max(len(one["steps"]) for one in recorded.values()) for recorded in (low, full)],
    }


def averages(factors: Factors, names: Sequence[str] | None = None) -> np.ndarray:
    """The matrix-level factor of each matrix, averaged over its recorded steps, (matrices,).

    Args:
        factors: a recording.
        names: of the matrices in the order wanted; None for the recording's.
    """
    return np.array([float(np.mean(np.asarray(factors[name]["matrix"]))) for name in names or factors])


def _require_comparable(low: Factors, full: Factors) -> None:
    different = sorted(low.keys() ^ full.keys())
    if different:
        raise ValueError(
            f"the recordings do not hold the same matrices: {different[0]} is in one only; record one model."
        )
    if len(low) < 3:
        raise ValueError(f"the recordings hold {len(low)} matrices, and a p-value needs at least 3.")
    for name in low:
        for key in ("side", "shape"):
            if low[name][key] != full[name][key]:
                raise ValueError(
                    f"{key} of {name} is {low[name][key]!r} in one recording and {full[name][key]!r} in the other; "
                    "train both with the same model, proj_type and formulation."
                )


def _coefficients(a: np.ndarray, b: np.ndarray) -> dict[str, float | int]:
    spearman, kendall = spearmanr(a, b), kendalltau(a, b)
    return {
        "items": len(a),
        "spearman": float(spearman.statistic),
        "spearman_p": float(spearman.pvalue),
        "kendall": float(kendall.statistic),
        "kendall_p": float(kendall.pvalue),
    }


def grid(factors: Factors, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The factors by matrix and step as one array.

    Args:
        factors: a recording.
        names: of the matrices, one for each row.

    Returns:
        The steps that any matrix has, ascending, (steps,); log10 of the matrix-level factors, (matrices, steps), NaN
        where a matrix has none.
    """
    steps = np.array(sorted({step for name in names for step in factors[name]["steps"]}))
    values = np.full((len(names), len(steps)), np.nan)
    for row, name in enumerate(names):
        places = np.searchsorted(steps, factors[name]["steps"])
        values[row, places] = np.log10(np.asarray(factors[name]["matrix"], dtype=np.float64))
    return steps, values


def plot(recordings: Mapping[str, Factors], path: Path) -> None:
    """Heat maps side by side, as Figure 3: x a recorded step, y a weight matrix, colour log10 of the factor.

    Rows are in the order of the average factor in the last recording, in all panels. Beside a row stands its place in
    its own panel's order, 1 the smallest: as in the paper, similar panels have similar columns of numbers.

    Args:
        recordings: by title, of the same model, such as {"rank 16": ..., "full rank": ...}.
        path: of the PNG.
    """
    reference = recordings[list(recordings)[-1]]
    order = np.argsort(averages(reference), kind="stable")
    names = [list(reference)[place] for place in order]
    grids = {title: grid(factors, names) for title, factors in recordings.items()}
    finite = np.concatenate([values[np.isfinite(values)] for _, values in grids.values()])
    low, high = np.percentile(finite, [1, 99])
    figure, axes = plt.subplots(
        1, len(grids), figsize=(3.2 * len(grids) + 0.8, 4.2), squeeze=False, layout="constrained"
    )
    stride = -(-len(names) // MOST_LABELS)
    rows = range(0, len(names), stride)
    for axis, (title, (steps, values)) in zip(axes[0], grids.items(), strict=True):
        places = rankdata(averages(recordings[title], names), method="ordinal")
        mesh = axis.pcolormesh(steps, range(len(names)), values, shading="nearest", vmin=low, vmax=high, cmap="viridis")
        axis.set_yticks(list(rows), [str(places[row]) for row in rows], fontsize=6)
        axis.set(title=title, xlabel="step")
    axes[0][0].set_ylabel("weight matrix: place in the order of its panel")
    figure.colorbar(mesh, ax=list(axes[0]), label="log10 of the scaling factor", extend="both")
    figure.savefig(path, dpi=150)
    plt.close(figure)
