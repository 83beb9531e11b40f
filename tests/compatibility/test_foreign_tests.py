"""Runs of another project's tests: what is counted, what the control runs, and what a hanging test leaves."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.compatibility.foreign_tests import Suite, node, table

TESTS = """
import os, subprocess, time
from swap import SWAPPED


class TestSteps:
    def test_passes(self):
        pass

    def test_fails(self):
        assert not SWAPPED, "0.5 is wrong"

    def test_is_refused(self):
        if SWAPPED:
            raise ValueError("FiraAdam: rank = 0 is not legal; give a whole number.")

    def test_fails_with_adam_too(self):
        assert False

    def test_hangs(self):
        if os.environ.get("HANG"):
            child = subprocess.Popen(["sleep", "60"])
            open(os.environ["HANG"], "w").write(str(child.pid))
            time.sleep(60)
"""


def prepare(copy: Path, swap: bool) -> None:
    """A module that says which run it is."""
    (copy / "swap.py").write_text(f"SWAPPED = {swap}\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five tests."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_steps.py").write_text(TESTS)
    return tmp_path / "tests"


def test_the_control_runs_what_failed(folder: Path) -> None:
    """Each kind is counted once, with its reason where it is not Adam's."""
    swapped = Suite(prepare).run(folder, ["test_steps.py"], True, 60.0)
    failed = [node(*key) for key, outcome in swapped.items() if outcome.kind == "failed"]
    assert [name.rpartition("::")[2] for name in failed] == [
        "test_fails",
        "test_is_refused",
        "test_fails_with_adam_too",
    ]
    control = Suite(prepare).run(folder, failed, False, 60.0)
    assert len(control) == len(failed)
    _, _, row, _, *told = table(swapped, control).splitlines()
    assert row == "| test_steps.py | 2 | 1 | 1 | 1 | 0 |"
    assert "0.5 is wrong" in told[0]
    assert told[1].startswith("- FiraAdam: rank = 0 is not legal; give a whole number.: 1, as test_steps.py::TestSteps")


@pytest.mark.full
def test_a_hanging_test_is_ended_with_its_processes(folder: Path, tmp_path: Path) -> None:
    """The report has the tests that ended before the limit."""
    found = Suite(prepare, {"HANG": str(tmp_path / "pid")}).run(folder, ["test_steps.py"], True, 5.0)
    assert {name for _, name in found} >= {"TestSteps.test_passes", "TestSteps.test_fails"}
    stat, until = Path("/proc", (tmp_path / "pid").read_text(), "stat"), time.monotonic() + 30.0
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":  # or it waits to be counted
        assert time.monotonic() < until
        time.sleep(0.1)
