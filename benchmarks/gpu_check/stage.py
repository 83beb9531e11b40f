"""The process of one stage: `python -m benchmarks.gpu_check.stage`, started by `benchmarks.gpu_check`."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
import warnings
from pathlib import Path

# From the driver's clock: importing torch is a part of the stage's time.
STARTED = time.time()
# Exit statuses: there is no GPU, and this is no rehearsal; some measurements were not made, or not as they should be.
NO_DEVICE, FAULTS = 3, 4
# What the driver puts beside its own lines.
ABOUT = "about.json"


def parser() -> argparse.ArgumentParser:
    """Options of the process."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--number", type=int, required=True)
    made.add_argument("--name", required=True)
    made.add_argument("--entry", required=True, help="module:function")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--limit", type=float, required=True)
    made.add_argument("--rehearse", action="store_true")
    return made


def main() -> int:
    """Call the stage's function."""
    args = parser().parse_args()
    # A shell's background ignores it, and the driver asks so for an end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from benchmarks.gpu_check.record import Check, about

    if not args.rehearse and not torch.cuda.is_available():
        return NO_DEVICE
    # Seen once in the log, not once for every call.
    warnings.filterwarnings("once")
    torch.manual_seed(0)
    check = Check(args.number, args.name, args.out, args.work, args.limit, args.rehearse, STARTED)
    kept = args.work / ABOUT
    if not kept.exists():
        kept.write_text(json.dumps(about()))
    module, _, function = args.entry.partition(":")
    getattr(importlib.import_module(module), function)(check)
    return FAULTS if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())
