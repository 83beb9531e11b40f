"""Whole training runs, ZeRO-2, a process for each GPU or two: throughput, final loss, bytes of state.

    python -m benchmarks.speed.training [--variants AdamW FiraAdam int8 ...] [--steps 450] [--json FILE]

Every run is `examples/pretrain_llama.py` with the quickstart's model, text and seed; the variants differ in the
optimizer's settings alone. Throughput is that of the whole script's training loop, refreshes included, as a ratio to
the first variant's; machines are noisy, and the runs follow one another, so small differences say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import default_device, device_name, save

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "ds_configs" / "zero2_bf16.json"
# Settings of FiraAdam on top of the quickstart's config; None is AdamW.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    "FiraAdam": {},
    "bfloat16": {"state_dtype": "bfloat16"},
    "int8": {"state_dtype": "int8"},
    "svd, keep": {"subspace": "svd", "refresh_moments": "keep"},
    "stagger": {"stagger": True},
}


def launcher(processes: int) -> list[str]:
    """What starts a script in so many processes of this Python, wherever its programs are; none for a single one."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def train(
    settings: dict[str, Any] | None, arguments: list[str], folder: Path, config_file: Path = CONFIG
) -> dict[str, Any]:
    """Run the script and return its summary.

    Args:
        settings: of FiraAdam, on top of the config's; None for AdamW.
        arguments: further ones of the script.
        folder: of the run.
        config_file: a DeepSpeed config.

    Raises:
        RuntimeError: the run failed; its last lines.
    """
    config = json.loads(config_file.read_text())
    if settings is not None:
        config["optimizer"]["params"] |= settings
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment |= {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"), "DS_ACCELERATOR": "cpu"}
    command = [
        *launcher(torch.cuda.device_count() or 2),
        "examples/pretrain_llama.py",
        "--deepspeed-config",
        str(path),
        "--output-dir",
        str(folder),
    ]
    command += ["--optimizer", "AdamW"] if settings is None else []
    done = subprocess.run([*command, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        # A launcher that has lost a process adds a page of its own.
        raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-60:]))
    return json.loads((folder / "summary.json").read_text())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("arguments", nargs="*", help="further options of the script, after --")
    args = parser.parse_args()
    device = default_device()
    print(device_name(device))
    print(f"{'variant':12}{'tokens/s':>10}{'ratio':>8}{'val loss':>10}{'state MB':>10}")
    rows = []
    arguments = ["--steps", str(args.steps), "--seed", str(args.seed), *args.arguments]
    for name in args.variants:
        with tempfile.TemporaryDirectory() as folder:
            summary = train(VARIANTS[name], arguments, Path(folder))
        row = {
            "variant": name,
            "tokens_per_second": summary["tokens_per_second"],
            "val_loss": summary["val_loss"],
            "state_bytes": sum(summary.get("optimizer_state_bytes", [])),
            "seconds": summary["seconds"],
        }
        rows.append(row)
        ratio = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        state = f"{row['state_bytes'] / 1e6:>10.2f}" if row["state_bytes"] else f"{'':>10}"
        print(f"{name:12}{row['tokens_per_second']:>10.0f}{ratio:>8.2f}{row['val_loss']:>10.4f}{state}", flush=True)
    save(args.json, device, steps=args.steps, seed=args.seed, rows=rows)


if __name__ == "__main__":
    main()
