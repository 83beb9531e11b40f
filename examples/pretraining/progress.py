"""Progress bars of the pre-training example: on the first process, and sparing in a log file."""

from __future__ import annotations

import sys
from typing import Any

import torch
from tqdm import tqdm


def progress_bar(**settings: Any) -> tqdm:
    """A tqdm bar on the first process; in a log file, where it cannot redraw itself, one update in ten seconds.

    Args:
        **settings: of tqdm, such as `total`, `desc` and `unit`.
    """
    terminal = sys.stderr.isatty()
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    defaults = {"disable": not first, "mininterval": 0.2 if terminal else 10.0, "dynamic_ncols": terminal}
    return tqdm(**(defaults | settings))


def preparation_bar(description: str, total: int | None = None, unit: str = " documents") -> tqdm:
    """A bar of one long step of the preparation, gone when it ends; `total` is None where it is not known."""
    return progress_bar(desc=description, total=total, unit=unit, unit_scale=True, leave=False)
