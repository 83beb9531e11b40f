"""What the page says of runs beside the plots: settings, configuration, environment, and where runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ds_fira.observe.run_record import Start
from ds_fira.tools.run_report.run_csv import Run

UNKNOWN = "not recorded"


class Row(NamedTuple):
    """A row of a table: what it is of, a text for each run, and whether they differ."""

    title: str
    cells: list[str]
    differs: bool


def setting(runs: Sequence[Run], name: str) -> str:
    """A setting of the optimizer for a sentence: `1.01`, or by run where runs differ; empty where none has it."""
    values = [text(run.starts[-1]["settings"].get(name)) if run.starts else UNKNOWN for run in runs]
    known = [value for value in values if value]
    if not known or set(known) == {UNKNOWN}:
        return ""
    if len(set(values)) == 1:
        return values[0]
    pairs = zip(values, runs, strict=True)
    return ", ".join(f"{value} in {run.label}" for value, run in pairs if value)


def growth(runs: Sequence[Run]) -> str:
    """How much the limiter lets a residual norm grow in a step, for a sentence: `1 %`; empty where runs differ."""
    found = {gamma for run in runs if run.starts for gamma in run.starts[-1]["settings"].get("gamma", [])}
    return f"{100 * (float(str(found.pop())) - 1):.3g} %" if len(found) == 1 else ""


def rows(runs: Sequence[Run]) -> list[Row]:
    """The table of what the runs recorded of their last start; empty where none did."""
    recorded = [_facts(run.starts) if run.starts else {} for run in runs]
    titles = dict.fromkeys(title for facts in recorded for title in facts)
    found = []
    for title in titles:
        cells = [facts.get(title, "") if facts else UNKNOWN for facts in recorded]
        found.append(Row(title, cells, differs=len(set(cells)) > 1))
    return found


def text(value: object) -> str:
    """A value for a table; several that occur beside each other with a stroke between them."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " / ".join(", ".join(map(str, item)) if isinstance(item, list) else str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _facts(starts: Sequence[Start]) -> dict[str, str]:
    start, config = starts[-1], starts[-1]["config"]
    found: dict[str, object] = {
        "optimizer": start["optimizer"],
        **start["settings"],
        "learning rate in the JSON": _below(config, "optimizer", "params", "lr"),
        "parameters that are trained": start["parameters"],
        "projected matrices": start["projected_matrices"],
        "samples in a step": start["samples_per_step"],
        "ranks": start["ranks"],
        "ZeRO stage": _below(config, "zero_optimization", "stage"),
        "precision": next((kind for kind in ("bf16", "fp16") if _below(config, kind, "enabled")), "fp32"),
        "gradient clipping": config.get("gradient_clipping"),
        "steps between events": start["event_steps"],
        "started at step": [each["step"] for each in starts],
        "started (UTC)": start["at"],
        **start["environment"],
    }
    return {title: str(value) if title == "ZeRO stage" else text(value) for title, value in found.items()}


def _below(config: object, *names: str) -> object:
    """A value in nested blocks; None where one of them is missing."""
    for name in names:
        config = config.get(name) if isinstance(config, Mapping) else None
    return config
