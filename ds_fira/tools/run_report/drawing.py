"""The plots of the page, as SVG: one of a few series of all runs."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence

import numpy as np

from ds_fira.tools.run_report.run_csv import Run

# More refreshes than this are not marked: the matrices refresh at every step or nearly (`stagger`).
MAX_MARKS = 60
# Of so many values and more of these series, a running mean is drawn over them; what jumps at a refresh has none.
SMOOTHED_FROM, NOISY = 100, ("train_loss", "grad_norm")
# Jumps at a refresh, and is noisy in between: its mean is over a whole gap between two, or it would jump too.
OVER_A_GAP = "limiter_share"


def window(run: Run, name: str) -> int | None:
    """Values that the running mean of a series is over, odd; None where it has none."""
    values = len(run.series[name].x) if name in run.series else 0
    if name in NOISY:
        return 2 * (values // 100) + 1 if values >= SMOOTHED_FROM else None
    if name == OVER_A_GAP and run.starts:
        gaps = [gap for start in run.starts for gap in start["settings"].get("update_proj_gap", [])]
        half = max(gaps, default=0) // run.starts[-1]["event_steps"] // 2
        # Three gaps at least, for a mean of more than its two ends.
        return 2 * half + 1 if 1 <= half <= values // 6 else None
    return None


def smoothed(y: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` values around each, at both ends over those that there are; shape as `y`, (n,)."""
    ones = np.ones(width)
    # Values that are not finite count for nothing, or they would spread.
    finite = np.isfinite(y)
    sums, counts = (np.convolve(each, ones, "full") for each in (np.where(finite, y, 0.0), finite.astype(float)))
    inner = slice(width // 2, width // 2 + len(y))
    return np.divide(sums[inner], counts[inner], out=np.full(len(y), np.nan), where=counts[inner] > 0.5)


def draw(
    runs: Sequence[Run], title: str, unit: str, events: Sequence[str], scale: str = "linear", exp: bool = False
) -> str | None:
    """One plot as SVG in base64; None where no run has data.

    Args:
        runs: with their colours, all over samples or all over steps.
        title: of the plot, which tells its SVG from others.
        unit: of the values.
        events: names of series.
        scale: of the values: "linear", "log", or "from 0", linear with 0 at the bottom.
        exp: whether exp of the values is drawn.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not any(name in run.series for run in runs for name in events):
        return None
    with rc_context({"svg.hashsalt": title, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.6, 3.5), layout="constrained")
        axes = figure.add_subplot(xlabel="samples" if runs[0].in_samples else "optimizer steps", ylabel=unit)
        for run, name in [(run, name) for run in runs for name in events if name in run.series]:
            x, y = np.array(run.series[name].x), np.array(run.series[name].y)
            y = np.exp(np.minimum(y, 700.0)) if exp else y
            line = functools.partial(axes.plot, color=run.color)
            if name == "validation_loss" or (name == "refresh_seconds" and np.count_nonzero(y) <= MAX_MARKS):
                line(x[y > 0], y[y > 0], "o", markeredgecolor="white", zorder=3)
            elif name == "refreshes" and np.count_nonzero(y) <= MAX_MARKS:
                line(x[y > 0], 0.0 * y[y > 0], "^", clip_on=False)
            elif name != "refreshes":
                width = window(run, name)
                line(x, y, alpha=1.0 if width is None else 0.3)
                if width is not None:
                    line(x, smoothed(y, width))
        axes.grid(axis="y", alpha=0.3)
        axes.set_yscale("log" if scale == "log" else "linear")
        axes.set_ylim(bottom=0.0 if scale == "from 0" else None)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return base64.b64encode(file.getvalue()).decode()
