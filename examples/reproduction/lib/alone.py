"""An experiment run by itself: compute, save, print the section."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.reproduction.lib.provenance import ROOT

RESULTS = ROOT / "examples" / "reproduction" / "results"
FIGURES = ROOT / "docs" / "reproduction"


def run_alone(name: str, compute: Callable[[], dict[str, Any]], section: Callable[[dict[str, Any], Path], str]) -> None:
    """Compute an experiment, save its results as JSON and its plots, and print its section.

    Args:
        name: of the file, `examples/reproduction/results/<name>.json`.
        compute: gives JSON-able results.
        section: makes Markdown of them and saves plots into a folder.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    FIGURES.mkdir(parents=True, exist_ok=True)
    text = json.dumps(compute(), indent=1, allow_nan=False)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(section(json.loads(text), FIGURES))
