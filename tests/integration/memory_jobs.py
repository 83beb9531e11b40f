"""What the ranks of a test pool run for the memory experiment: one cell of its grid."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")
if EXAMPLES not in sys.path:
    sys.path.append(EXAMPLES)

from memory.grid import Cell, Run, model_config  # noqa: E402
from memory.measure import RefusedError, measure  # noqa: E402


def tiny_run(processes: int = 2, seq_length: int = 64, **changes: Any) -> Run:
    """The smallest model, subspaces of rank 16."""
    settings = {
        "model": model_config("tiny", seq_length),
        "seq_length": seq_length,
        "micro_batch": 2,
        "steps": 1,
        "rank": 16,
        "state_dtype": "float32",
        "method": "transformers",
        "cpu_adam": False,
        "processes": processes,
        "seed": 0,
    }
    return Run(**settings | changes)


def measured(cells: list[tuple[Any, ...]], **changes: Any) -> list[dict[str, Any] | str]:
    """The figures of some cells, or the sentence with which one was refused."""
    run = tiny_run(**changes)
    results: list[dict[str, Any] | str] = []
    for cell in cells:
        try:
            results.append(measure(Cell(*cell), run))
        except RefusedError as error:
            results.append(str(error))
    return results
