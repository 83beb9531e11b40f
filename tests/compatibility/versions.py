"""Run combinations in which all settings of the compatibility matrix meet with each supported version of DeepSpeed.

    python -m tests.compatibility.versions [--versions 0.17.6 0.18.4 0.19.8] [--folder FOLDER] [--results FILE] [--page
    FILE]

Installs each version without its dependencies into a folder of its own, which goes before this environment's on the
path, so torch stays the one that is installed. Writes the counts to the results of `python -m
tests.compatibility.matrix` and the page from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from packaging.version import Version

from ds_fira.engine.deepspeed.unsupported import TESTED
from tests.compatibility.matrix import PAGE, RESULTS, Case, covering_pairs, rows_of, run, save_results, trained_cases
from tests.compatibility.page import write_page
from tests.ranks import Pools


def install(version: str, folder: Path) -> Path:
    """Install a version into a folder of its own, unless it is there; returns the folder."""
    target = folder / version
    if not (target / "deepspeed").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--target", str(target), f"deepspeed=={version}"], check=True)
    return target


def count_pairs() -> dict[str, Any]:
    """Run the covering combinations with the DeepSpeed that is imported.

    Returns:
        `deepspeed` and `torch`; how many were `right`, `wrong`, `refused`; `details` of the last two.
    """
    results = json.loads(RESULTS.read_text())
    pools = Pools()
    chosen = covering_pairs([case for case in trained_cases(results["rows"]) if _is_accepted(case)])
    rows = rows_of(chosen, run(pools, chosen))
    pools.close()
    refused = [(message, values) for row in rows for message, cases in row["refused"].items() for values in cases]
    wrong = [(what, values) for row in rows for what, cases in row["wrong"].items() for values in cases]
    return {
        "deepspeed": deepspeed.__version__,
        "torch": torch.__version__,
        "right": sum(len(row["trained"]) for row in rows),
        "refused": len(refused),
        "wrong": len(wrong),
        "details": wrong + refused,
    }


def _is_accepted(case: Case) -> bool:
    """Whether the imported version has no setting of the case among those that `unsupported` refuses in it."""
    if Version(deepspeed.__version__) >= Version("0.19"):
        return True
    options = dict(case.options)
    on = options.get("contiguous_gradients", True) and options.get("reduce_scatter", True)
    on = on and case.stage < 3
    return on and "accumulation" not in case.dtype and not (case.stage == 0 and case.dtype == "bf16")


def count_with(version: str, target: Path) -> dict[str, Any]:
    """`count_pairs` in a process that imports the version in a folder."""
    environment = {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{Path.cwd()}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "tests.compatibility.versions", "--report", str(report)]
        subprocess.run(command, env=environment, check=True)
        counts = json.loads(report.read_text())
    if counts["deepspeed"] != version:
        raise RuntimeError(f"deepspeed {counts['deepspeed']} was imported, not {version}; remove {target}")
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with every version asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(TESTED))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ds_fira_versions")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--report", type=Path, help="only count with the DeepSpeed that is imported, into this file")
    args = parser.parse_args(arguments)
    if args.report is not None:
        args.report.write_text(json.dumps(count_pairs()))
        return
    results = json.loads(args.results.read_text())
    counts = {entry["deepspeed"]: entry for entry in results.get("tested_versions", [])}
    for version in args.versions:
        counts[version] = count_with(version, install(version, args.folder))
        print(json.dumps(counts[version]), flush=True)
        results["tested_versions"] = [counts[name] for name in sorted(counts)]
        save_results(args.results, results)
    write_page(args.page, results)
    sys.exit(any(counts[version]["wrong"] for version in args.versions))


if __name__ == "__main__":
    main()
