"""Run another project's tests with FiraAdam in Adam's place, and say what passed, what is refused and what failed.

The tests are those of a checkout; nothing of them is part of this repository. They are copied, and the copy is changed
so that it trains with FiraAdam. A second run with Adam, of the tests that failed, is the control: what fails there too
is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("passed", "refused", "failed", "fails with Adam too", "skipped")
ERROR = re.compile(r"^(E +)?[\w.]*(Error|Exception|Exit): ?\S.*")


@dataclass(frozen=True)
class Outcome:
    """Of one test.

    Attributes:
        kind: "passed", "skipped" or "failed".
        text: what it said, where it failed.
    """

    kind: str
    text: str = ""

    @property
    def refusal(self) -> str | None:
        """The sentence with which FiraAdam refused what the test asks for."""
        lines = [line.partition("ValueError: ")[2] for line in self.text.splitlines()]
        return next((line for line in lines if line.startswith(("FiraAdam: ", "FiraAdam in ", "ds_fira: "))), None)

    @property
    def reason(self) -> str:
        """What is to be read of a failure: the refusal, or the error that came last."""
        lines = self.text.strip().splitlines()
        return self.refusal or next((line for line in reversed(lines) if ERROR.match(line)), *lines[:1])


@dataclass(frozen=True)
class Suite:
    """Tests of another project.

    Attributes:
        prepare: changes a copy of them, for FiraAdam or for the control.
        environment: variables that they need.
    """

    prepare: Callable[[Path, bool], None]
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, folder: Path, paths: list[str], swap: bool, timeout: float) -> dict[tuple[str, str], Outcome]:
        """The outcome of every test by its file and its name.

        Args:
            folder: of the tests.
            paths: below it.
            swap: whether to train with FiraAdam.
            timeout: seconds for all of them; what has not ended by then is not among the answers.
        """
        with tempfile.TemporaryDirectory() as scratch:
            copy, report = Path(scratch, "tests"), Path(scratch, "report.xml")
            shutil.copytree(folder, copy)
            self.prepare(copy, swap)
            places = [str(ROOT), str(copy), os.environ.get("PYTHONPATH", "")]
            env = {**os.environ, **self.environment, "PYTHONPATH": os.pathsep.join(places)}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *paths]
            # Of its own session, to end with all its processes; a shell's background job would not hear SIGINT.
            own = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
            with subprocess.Popen(command, cwd=copy, env=env, **own) as tests:
                try:
                    tests.wait(timeout)
                except subprocess.TimeoutExpired:
                    print(f"not all tests ended within {timeout:.0f} s", file=sys.stderr)
                    tests.send_signal(signal.SIGINT)  # by which pytest ends, and still writes its report
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        tests.wait(60.0)
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(tests.pid, signal.SIGKILL)  # with ranks and servers that a hanging test has left
            return read_report(report)

    def main(self, description: str, what: str) -> None:
        """Print the table of the tests that the command line names."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--folder", type=Path, required=True, help=what)
        parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for each of the two runs")
        parser.add_argument("paths", nargs="+", help="files or folders below it")
        given = parser.parse_args()
        swapped = self.run(given.folder, given.paths, True, given.timeout)
        failed = [node(*key) for key, outcome in swapped.items() if outcome.kind == "failed"]
        control = self.run(given.folder, failed, False, given.timeout) if failed else {}
        print(table(swapped, control))


def node(file: str, name: str) -> str:
    """The name by which pytest selects a test."""
    return f"{file}::{name.replace('.', '::', 1) if name.startswith('Test') else name}"


def read_report(report: Path) -> dict[tuple[str, str], Outcome]:
    """The outcomes in a JUnit file; none where pytest has not come to write it."""
    found: dict[tuple[str, str], Outcome] = {}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        if not case.get("classname"):
            continue  # what pytest was at when it was stopped
        file, _, rest = case.get("classname", "").partition(".Test")
        name = f"{rest and 'Test' + rest + '.'}{case.get('name')}"
        kinds = {child.tag: f"{child.get('message')}\n{child.text}" for child in case}
        if "skipped" in kinds:
            outcome = Outcome("skipped")
        elif "failure" in kinds or "error" in kinds:
            outcome = Outcome("failed", kinds.get("failure") or kinds["error"])
        else:
            outcome = Outcome("passed")
        found[file.replace(".", "/") + ".py", name] = outcome
    return found


def table(swapped: dict[tuple[str, str], Outcome], control: dict[tuple[str, str], Outcome]) -> str:
    """A table of the counts of each file, in Markdown, and under it the reason of each refusal and failure."""
    counts: dict[str, Counter[str]] = {}
    reasons: dict[str, list[str]] = {}
    for (file, name), outcome in swapped.items():
        kind = outcome.kind
        if kind == "failed" and control.get((file, name), Outcome("failed")).kind == "failed":
            kind = "fails with Adam too"
        elif kind == "failed":
            kind = "refused" if outcome.refusal else "failed"
            reasons.setdefault(outcome.reason[:200], []).append(f"{file}::{name}")
        counts.setdefault(file, Counter())[kind] += 1
    rows = [f"| {file} | {' | '.join(str(found[kind]) for kind in COLUMNS)} |" for file, found in counts.items()]
    head = [f"| file | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    told = [f"- {reason}: {len(names)}, as {names[0]}" for reason, names in reasons.items()]
    return "\n".join([*head, *rows, "", *told])
