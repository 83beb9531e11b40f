"""The HTML of the page of plots: one file, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root { color: #1f2933; background: #f3f4f6; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
body { max-width: 1280px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 16px; margin: 0 0 6px; }
.lead { color: #616e7c; margin: 0 0 20px; }
.card { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 16px 18px; margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 18px; }
.plots img { display: block; width: 100%; }
figcaption { color: #52606d; font-size: 14px; margin-top: 6px; }
.table { overflow-x: auto; margin-bottom: 18px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 12px; white-space: nowrap; border-bottom: 1px solid #e4e7eb; }
th { color: #616e7c; font-weight: 500; font-size: 13px; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.key { display: inline-block; width: 22px; height: 4px; border-radius: 2px; margin-right: 9px; vertical-align: middle; }
@media print { .card { break-inside: avoid; } }
"""


def render(runs: Sequence[tuple[str, str, Mapping[str, str]]], plots: Sequence[tuple[str, str, str]]) -> str:
    """The page.

    Args:
        runs: label, colour and figures of each.
        plots: title, SVG and text of each.
    """
    columns = list(dict.fromkeys(title for _, _, figures in runs for title in figures))
    head = "".join(f"<th>{escape(title)}</th>" for title in ("run", *columns))
    rows = "".join(
        f'<tr><td><span class="key" style="background:{color}"></span>{escape(label)}</td>'
        + "".join(f"<td>{escape(figures.get(title, ''))}</td>" for title in columns)
        + "</tr>"
        for label, color, figures in runs
    )
    # As images, so that the identifiers inside one plot do not meet those of another.
    cards = "".join(
        f'<figure class="card"><h2>{escape(title)}</h2><img alt="Plot: {escape(title)}" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for title, svg, text in plots
    )
    name = escape(", ".join(label for label, _, _ in runs))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Fira: {name}</title><style>{STYLE}</style></head><body>"
        '<h1>Fira at work</h1><p class="lead">From the csv files of the run. Each plot has what it shows, and what is '
        "healthy, written under it.</p>"
        f'<div class="card table"><table><tr>{head}</tr>{rows}</table></div>'
        f'<div class="plots">{cards}</div></body></html>\n'
    )
