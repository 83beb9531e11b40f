"""Run the tests that touch DeepSpeed's internals with each supported version of DeepSpeed.

    python -m benchmarks.versions [--versions 0.17.6 0.18.4 0.19.8] [--folder FOLDER] [--results FILE] [--page FILE]

Installs each version without its dependencies into a folder of its own, which goes before this environment's on the
path, so torch stays the one that is installed. Writes the counts to the results of `python -m benchmarks.compatibility`
and the page from them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compatibility import PAGE, RESULTS, save_results
from benchmarks.compatibility_page import write_page
from ds_fira.versions import TESTED

# The engine, parity with one process, cut matrices, the matrix's pairs, export, resuming.
TESTS = (
    "tests/test_zero_engine.py",
    "tests/test_zero_parity.py",
    "tests/test_lean_cuts.py",
    "tests/test_export.py",
    "tests/test_compatibility.py",
)


def install(version: str, folder: Path) -> Path:
    """Install a version into a folder of its own, unless it is there; returns the folder."""
    target = folder / version
    if not (target / "deepspeed").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--target", str(target), f"deepspeed=={version}"], check=True)
    return target


def run_tests(version: str, target: Path, tests: Sequence[str]) -> dict[str, Any]:
    """Run tests with the version in a folder; returns the counts, and the names of what failed."""
    environment = {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{Path.cwd()}", "OMP_NUM_THREADS": "1"}
    asked = [sys.executable, "-c", "import deepspeed; print(deepspeed.__version__)"]
    found = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1]
    if found != version:
        raise RuntimeError(f"deepspeed {found} was imported in place of {version}; remove {target} and run again")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={report}", *tests], env=environment, check=False)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = [case.get("name", "") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "deepspeed": version,
        "torch": importlib.metadata.version("torch"),
        "passed": len(cases) - len(bad) - skipped,
        "failed": len(bad),
        "skipped": skipped,
        "failures": bad,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tests with every version asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(TESTED))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ds_fira_versions")
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    results = json.loads(args.results.read_text())
    counts = {entry["deepspeed"]: entry for entry in results.get("tested_versions", [])}
    for version in args.versions:
        counts[version] = run_tests(version, install(version, args.folder), args.tests)
        print(json.dumps(counts[version]), flush=True)
        results["tested_versions"] = [counts[name] for name in sorted(counts)]
        save_results(args.results, results)
    write_page(args.page, results)
    sys.exit(any(counts[version]["failed"] for version in args.versions))


if __name__ == "__main__":
    main()
