"""Measure on a GPU, in one command, what was measured on a CPU alone.

    bash launch/gpu_check.sh [OUTPUT] [--stages 0 4 7] [--limit 560]
    bash launch/gpu_check.sh --rehearse                                  # on a CPU, at small sizes

Every stage runs in a process of its own with a limit of its own; one that fails or hangs is recorded, and the next goes
on. OUTPUT (default: the variable OUT, else runs/gpu_check) gets results.jsonl, one line a measurement, log.txt,
junit.xml, trace.json.gz and summary.txt. docs/gpu.md says what each stage tells, and how to prepare a machine without a
network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu_check import wheels
from benchmarks.gpu_check.processes import last_lines, run, shortened
from benchmarks.gpu_check.stage import ABOUT, FAULTS, NO_DEVICE
from benchmarks.gpu_check.stages import STAGES, Stage
from benchmarks.gpu_check.summary import write_summary

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS, LOG = "results.jsonl", "log.txt"
# By this name dill, with which `datasets` makes its fingerprints, knows that a package is installed, and leaves it out.
SITE = "site-packages"
LIMIT = 560.0
# A stage that would have fewer seconds than this is not begun; what one leaves, a later one may use up to so many times
# its own.
LEAST, MOST_EXTENDED = 8.0, 2.0
# A rehearsal's stages take as long as slow cores need, and a hang still ends.
REHEARSAL_LIMIT, REHEARSAL_FACTOR = 3600.0, 15.0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a contradiction ends the process with one sentence and status 2."""
    parser = argparse.ArgumentParser(
        prog="launch/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = [stage.number for stage in STAGES]
    default = Path(os.environ.get("OUT") or REPOSITORY / "runs" / "gpu_check")
    parser.add_argument("output", nargs="?", type=Path, default=default, help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at small sizes, kernels interpreted")
    parser.add_argument("--stages", type=int, nargs="+", choices=numbers, default=numbers, metavar="N")
    parser.add_argument("--limit", type=float, help=f"seconds for all of it (default {LIMIT:.0f})")
    parser.add_argument(
        "--wheels", type=Path, default=wheels.FOLDER, help="packages that this machine lacks (launch/gpu_wheels.sh)"
    )
    args = parser.parse_args(arguments)
    if args.limit is None:
        args.limit = REHEARSAL_LIMIT if args.rehearse else LIMIT
    if args.limit <= 0:
        parser.error(f"--limit {args.limit} leaves no time; give seconds above 0")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"{args.output} is a file; name a folder")
    return args


class Driver:
    """Runs stages one after the other and writes down how each ended.

    Attributes:
        out: folder of the results.
        work: folder for what is not kept.
        rehearsal: whether stages run on the CPU at small sizes.
        environment: of the stages.
    """

    def __init__(self, out: Path, work: Path, limit: float, rehearsal: bool, environment: dict[str, str]) -> None:
        self.out, self.work, self.rehearsal, self.environment = out, work, rehearsal, environment
        self._ends = time.monotonic() + limit

    def record(self, number: int | None, name: str, what: str, value: float | None, unit: str, **facts: Any) -> None:
        """Write a line of the driver's own, with the device as soon as a stage has said it."""
        about = self.work / ABOUT
        line = {"stage": number, "name": name, "what": what, "value": value, "unit": unit, **facts}
        known = json.loads(about.read_text()) if about.exists() else {}
        with (self.out / RESULTS).open("a") as file:
            file.write(json.dumps({**line, "rehearsal": self.rehearsal, "time": round(time.time(), 3), **known}) + "\n")

    def log(self, title: str, text: bytes) -> None:
        """Add to log.txt."""
        with (self.out / LOG).open("ab") as file:
            file.write(f"\n===== {title}\n".encode() + text)

    def command(self, stage: Stage, limit: float) -> list[str]:
        """What starts the process of a stage."""
        command = [sys.executable, "-m", "benchmarks.gpu_check.stage", "--number", str(stage.number)]
        command += ["--name", stage.name, "--entry", stage.entry, "--limit", str(limit)]
        command += ["--out", str(self.out), "--work", str(self.work)]
        return [*command, "--rehearse"] if self.rehearsal else command

    def limit_of(self, stage: Stage, later: Sequence[Stage]) -> float:
        """Seconds for a stage: its own, and up to as many again of what those before it have left to all."""
        factor = REHEARSAL_FACTOR if self.rehearsal else 1.0
        own, due = factor * stage.limit, factor * sum(each.limit for each in later)
        left = self._ends - time.monotonic()
        return min(left, max(own, min(MOST_EXTENDED * own, left - due)))

    def run(self, stage: Stage, later: Sequence[Stage] = ()) -> str:
        """Run one stage; how it ended: "done", "failed", "stopped" at its limit, or "skipped".

        Args:
            stage: to run.
            later: those that follow, whose time is theirs.
        """
        limit = self.limit_of(stage, later)
        missing = [name for name in stage.needs if not self._has(name)]
        if missing:
            return self._ended(stage, "skipped", 0.0, f"{', '.join(missing)} cannot be imported")
        if limit < LEAST:
            return self._ended(stage, "skipped", 0.0, f"{max(0.0, limit):.0f} s are left of the time for all stages")
        print(f"stage {stage.number}, {stage.name}: {stage.says} (at most {limit:.0f} s)", flush=True)
        output = self.work / "output.txt"
        ended = run(self.command(stage, limit), limit, output, self.environment, REPOSITORY)
        self.log(f"stage {stage.number}, {stage.name}", shortened(output))
        if ended.status == NO_DEVICE:
            _stop("there is no CUDA device here; --rehearse runs every stage on the CPU at small sizes")
        if ended.status is None:
            return self._ended(stage, "stopped", ended.seconds, f"not over after {limit:.0f} s: {last_lines(output)}")
        if ended.status == FAULTS:
            return self._ended(
                stage, "failed", ended.seconds, "some of it is not as it should be, the rest is measured"
            )
        if ended.status:
            return self._ended(stage, "failed", ended.seconds, f"status {ended.status}: {last_lines(output)}")
        return self._ended(stage, "done", ended.seconds, "")

    def _has(self, module: str) -> bool:
        """Whether stages could import a module, which this process does not do."""
        paths = self.environment.get("PYTHONPATH", "").split(os.pathsep)
        return any(
            (Path(path) / module).is_dir() or (Path(path) / f"{module}.py").is_file() for path in paths if path
        ) or (importlib.util.find_spec(module) is not None)

    def _ended(self, stage: Stage, how: str, seconds: float, reason: str) -> str:
        facts = {"ended": how, **({"reason": reason} if reason else {})}
        self.record(stage.number, stage.name, "stage", round(seconds, 2), "s", **facts)
        print(f"stage {stage.number}, {stage.name}: {how} after {seconds:.0f} s {reason}", flush=True)
        write_summary(self.out)
        return how


def environment_of(args: argparse.Namespace, site: Path) -> dict[str, str]:
    """The variables of the stages."""
    paths = [str(REPOSITORY), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    # No hub answers on a machine without a network; products of one shape take one workspace, the same on every run.
    found |= {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TOKENIZERS_PARALLELISM": "true"}
    found.pop("OUT", None)
    if args.rehearse:
        found |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}
        found.setdefault("OMP_NUM_THREADS", "1")
    else:
        found |= {"DS_ACCELERATOR": "cuda"}
    return found


def _stop(sentence: str) -> NoReturn:
    print(f"launch/gpu_check.sh: error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Install what is missing, run the stages, write the summary."""
    args = parse()
    signal.signal(signal.SIGTERM, _interrupt)
    out = args.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, LOG, "junit.xml", "trace.json.gz", "summary.txt"):
        (out / name).unlink(missing_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    try:
        driver = Driver(out, work, args.limit, args.rehearse, environment_of(args, work / SITE))
        for name, fault in wheels.install(args.wheels, work / SITE).items():
            facts = {"reason": fault} if fault else {}
            driver.record(None, "packages", name, float(not fault), "complete or not", **facts)
        chosen = [stage for stage in STAGES if stage.number in args.stages]
        ends = [driver.run(stage, chosen[place + 1 :]) for place, stage in enumerate(chosen)]
    except KeyboardInterrupt:
        print("launch/gpu_check.sh: interrupted; what is measured is kept", file=sys.stderr)
        sys.exit(130)
    finally:
        print(write_summary(out), flush=True)
        shutil.rmtree(work, ignore_errors=True)
    print(f"results: {out}")
    sys.exit(0 if set(ends) == {"done"} else 1)


if __name__ == "__main__":
    main()
