"""Measure what every way to save memory saves: FiraAdam beside AdamW, with all of DeepSpeed's that combine with it.

    python examples/memory_savings.py                          # 48 combinations of a small LLaMA, on CPU or GPUs
    python examples/memory_savings.py --quick                  # a tiny one
    python examples/memory_savings.py --model llama_7b --seq-length 2048 --micro-batch 1 --ranks 1 \
        --stages 2 --checkpointing on --offload off --masters bf16        # one GPU of 80 GB

The grid is {AdamW, FiraAdam} x {ZeRO-0, 1, 2} x {activation checkpointing off, on} x {offload off, on} x {fp32, bf16
master weights}, the model in bf16. Every combination trains in fresh processes; what DeepSpeed or FiraAdam refuses, and
what runs out of memory, stands in the table with the reason. It leaves `memory.md`, `memory.png` and `memory.json`.

Peak bytes are those of one whole training step, the one of a refresh, as torch's allocators count them, on the rank
that has most. On a CPU, where all memory is the host's, "host" is what offload moves there.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

# The benchmarks lie beside the examples.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from memory.grid import Run, cells
from memory.options import build_parser, build_run
from memory.processes import run_cell
from memory.report import markdown, plot, terminal
from tqdm import tqdm

from benchmarks.common import default_device, device_name, save

REPOSITORY = Path(__file__).resolve().parent.parent
SWITCH = {"on": True, "off": False}


def main() -> None:
    """Measure the grid, and write table, plot and JSON."""
    parser = build_parser(__doc__)
    options = parser.parse_args()
    run = build_run(parser, options)
    # The processes of a cell find the parts of this script, whatever the working folder.
    paths = (str(REPOSITORY), str(REPOSITORY / "examples"), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    grid = cells(
        options.optimizers,
        [int(stage) for stage in options.stages],
        [SWITCH[word] for word in options.checkpointing],
        [SWITCH[word] for word in options.offload],
        options.masters,
    )
    logs = options.output_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    with tqdm(grid, unit="cell", mininterval=0.2 if sys.stderr.isatty() else 10.0) as bar:
        for cell in bar:
            bar.set_postfix_str(cell.name)
            log = logs / f"{cell.name}.log"
            log.unlink(missing_ok=True)
            row = dataclasses.asdict(cell) | flatten(run_cell(cell, run, log, options.timeout))
            rows.append(row)
            if row["status"] in ("failed", "out of memory"):
                bar.write(f"{cell.name}: {row['status']}: {row['reason']} (log: {log})", file=sys.stderr)
            # After every cell, so that a run that is stopped leaves what it has.
            write(options.output_dir, rows, run, seconds=time.perf_counter() - began)
    print(terminal(rows))
    print(f"\n{device_name(default_device())}; table, plot and figures: {options.output_dir}")
    if not any(row["status"] == "ok" for row in rows):
        sys.exit(f"{parser.prog}: error: none of the {len(rows)} combinations ran; the table has the reasons")


def flatten(outcome: dict[str, Any]) -> dict[str, Any]:
    """Of all ranks the one with the highest peak on its device."""
    if outcome["status"] != "ok":
        return outcome
    return {"status": "ok", **max(outcome["ranks"], key=lambda rank: rank["device"]["peak_bytes"])}


def write(folder: Path, rows: list[dict[str, Any]], run: Run, seconds: float) -> None:
    """Leave what has been measured so far."""
    settings = dataclasses.asdict(run)
    shape = f"{run.processes} ranks, {run.micro_batch} x {run.seq_length} tokens each, rank {run.rank}"
    (folder / "memory.md").write_text(markdown(rows))
    plot(rows, f"Peak memory of a training step: {shape}\n{device_name(default_device())}", folder / "memory.png")
    # The path of the interpreter and of the script belong to a machine.
    command = shlex.join(["python", "examples/memory_savings.py", *sys.argv[1:]])
    save(str(folder / "memory.json"), default_device(), command=command, seconds=seconds, settings=settings, rows=rows)


if __name__ == "__main__":
    main()
