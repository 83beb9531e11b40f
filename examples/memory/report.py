"""The table and the plot of the memory experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: a training machine has no screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

# Category -> its colour; what is left over is one segment.
COLOURS = {
    "parameters": "#4c78a8",
    "gradients": "#f58518",
    "master weights": "#72b7b2",
    "optimizer states": "#e45756",
    "activations": "#b9a3d0",
    "temporary": "#9d9d9d",
}
COLUMNS = ("optimizer", "ZeRO", "checkpointing", "offload", "master")


def unit(rows: list[dict[str, Any]]) -> tuple[float, str]:
    """MB or GB, whichever suits the largest peak."""
    largest = max((row["device"]["peak_bytes"] for row in rows if row["status"] == "ok"), default=0)
    return (1e9, "GB") if largest >= 1e10 else (1e6, "MB")


def segments(peak: dict[str, Any]) -> dict[str, int]:
    """Bytes of a peak by the categories of the plot; unlabelled blocks that were there before count as temporary."""
    found = {name: peak["categories"].get(name, 0) for name in COLOURS}
    found["temporary"] += peak["categories"].get("other", 0)
    return found


def settings(row: dict[str, Any]) -> list[str]:
    """The first columns of a row."""
    yes = {True: "on", False: "off"}
    return [row["optimizer"], str(row["stage"]), yes[row["checkpointing"]], yes[row["offload"]], row["master"]]


def reason(row: dict[str, Any]) -> str:
    """Why a cell has no figures, with the peak that it reached if that is known."""
    reached = f" (after {row['peak_bytes'] / 1e9:.1f} GB)" if "peak_bytes" in row else ""
    return f"{row['status']}{reached}: {row['reason']}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table: a row for every cell, peaks by category, speed beside the first cell that ran."""
    scale, name = unit(rows)
    header = [*COLUMNS, *COLOURS, f"peak, {name}", f"host, {name}", "tokens/s, ratio"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    base = next((row["tokens_per_second"] for row in rows if row["status"] == "ok"), None)
    for row in rows:
        cells = settings(row)
        if row["status"] == "ok":
            sizes = [*segments(row["device"]).values(), row["device"]["peak_bytes"], row["host"]["peak_bytes"]]
            cells += [f"{size / scale:.1f}" for size in sizes] + [f"{row['tokens_per_second'] / base:.2f}"]
        else:
            cells += [reason(row)] + [""] * (len(header) - len(cells) - 1)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def terminal(rows: list[dict[str, Any]]) -> str:
    """The same table, aligned; a reason may run on."""
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in markdown(rows).splitlines()]
    head, body = table[0], table[2:]
    full = [head, *(line for line in body if len(line) == len(head))]
    widths = [max(len(line[i]) for line in full) for i in range(len(head))]
    lines = []
    for line in [head, *body]:
        known = line if len(line) == len(head) and line[-1] else [*line[: len(COLUMNS)], line[len(COLUMNS)]]
        lines.append("  ".join(f"{cell:>{width}}" for cell, width in zip(known, widths, strict=False)))
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Stacked bars, a panel for every dtype of master weights and setting of offload; host bytes are hatched."""
    masters = list(dict.fromkeys(row["master"] for row in rows))
    offloads = list(dict.fromkeys(row["offload"] for row in rows))
    scale, name = unit(rows)
    in_panel = max(
        sum(row["master"] == master and row["offload"] == offload for row in rows)
        for master in masters
        for offload in offloads
    )
    size = (7.2 * len(offloads), (0.36 * in_panel + 0.9) * len(masters) + 1.3)
    figure, panels = plt.subplots(
        len(masters), len(offloads), figsize=size, dpi=90, sharex=True, sharey=False, squeeze=False
    )
    for i, master in enumerate(masters):
        for j, offload in enumerate(offloads):
            chosen = [row for row in rows if row["master"] == master and row["offload"] == offload]
            where = "optimizer offloaded to the host" if offload else "no offload"
            draw_panel(panels[i][j], chosen, scale, name)
            panels[i][j].set_title(f"{master} master weights, {where}", fontsize=10, loc="left")
    for panel in panels[-1]:
        panel.set_xlabel(f"peak {name} of one rank")
    handles = [Patch(facecolor=colour, label=label) for label, colour in COLOURS.items()]
    if any(offloads):
        handles.append(Patch(facecolor="white", edgecolor="#555555", hatch="////", label="on the host"))
    figure.suptitle(title, fontsize=11)
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.3 / size[1], 1, 1))
    figure.savefig(path)
    plt.close(figure)


def draw_panel(panel: Axes, rows: list[dict[str, Any]], scale: float, name: str) -> None:
    """One panel: pairs of optimizers, a gap between stages."""
    positions, labels, at, previous = [], [], 0.0, None
    for row in rows:
        key = (row["stage"], row["checkpointing"])
        if previous is not None and key != previous:
            at += 0.35 if key[0] == previous[0] else 0.9
        previous = key
        positions.append(at)
        checkpoint = ", checkpointing" if row["checkpointing"] else ""
        labels.append(f"{row['optimizer']}  ZeRO-{row['stage']}{checkpoint}")
        draw_bar(panel, at, row, scale, name)
        at += 1
    panel.set_yticks(positions, labels, fontsize=8)
    panel.set_ylim(at - 0.3, -0.7)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.margins(x=0.12)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def draw_bar(panel: Axes, at: float, row: dict[str, Any], scale: float, name: str) -> None:
    """Device categories, then those on the host, hatched; or why there are none."""
    if row["status"] != "ok":
        panel.text(0, at, f" {row['status']}", va="center", fontsize=8, color="#666666", style="italic")
        return
    left = 0.0
    for peak, hatch in ((row["device"], None), (row["host"], "////")):
        for label, size in segments(peak).items():
            style = {"edgecolor": "white", "linewidth": 0.0} if hatch is None else {"hatch": hatch, "alpha": 0.55}
            panel.barh(at, size / scale, left=left, height=0.85, color=COLOURS[label], **style)
            left += size / scale
    total = f"{row['device']['peak_bytes'] / scale:.1f}"
    if row["host"]["peak_bytes"]:
        total += f" + {row['host']['peak_bytes'] / scale:.1f} host"
    panel.text(left, at, f" {total}", va="center", fontsize=8)
