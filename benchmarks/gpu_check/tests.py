"""Stage 1: the tests of the kernels, of the step on a device and of the GPU, on this device."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from xml.etree import ElementTree

from benchmarks.gpu_check.record import JUNIT, REPOSITORY, Check

TESTS = (
    "tests/gpu/test_gpu.py",
    "tests/unit/core/test_device_step.py",
    "tests/unit/core/test_device_sums.py",
    "tests/unit/core/test_kernel_moments.py",
    "tests/unit/core/test_kernel_products.py",
    "tests/unit/optim/test_capture.py",
    "tests/gpu/test_kernel_builds.py",
)
REHEARSED = ("tests/gpu/test_gpu.py", "tests/unit/core/test_kernel_moments.py")
WORKERS = 8
# Seconds in which pytest writes its report when it is interrupted.
REPORTING = 8.0
# Failures that are written down one by one.
MOST = 20


def measure(check: Check) -> None:
    """Run pytest, and count from its report, which is complete also where it had to be interrupted."""
    report = check.out / JUNIT
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short"]
    command += REHEARSED if check.rehearsal else TESTS
    if importlib.util.find_spec("xdist") is not None and not check.rehearsal:
        command += ["-n", str(WORKERS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    try:
        process.wait(max(1.0, check.left() - REPORTING))
    except subprocess.TimeoutExpired:
        check.fact("tests were over in time", False)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(REPORTING)
    root = ElementTree.parse(report).getroot()
    (suite, *_) = root.iter("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    check.record("tests passed", counts["tests"] - failed - counts["skipped"], "tests", wall=suite.get("time"))
    check.record("tests skipped", counts["skipped"], "tests")
    check.holds("tests failed", failed, 0, "tests")
    cases = [
        case for case in root.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    for case in cases[:MOST]:
        fault = next(iter([*case.iter("failure"), *case.iter("error")]))
        reason = " ".join(fault.get("message", "").split())[:300]
        check.record("failed test", None, "", test=f"{case.get('classname')}::{case.get('name')}", reason=reason)
