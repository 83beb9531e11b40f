"""The check of a GPU: its command line, its stages, what it does with one that fails or hangs, its summary."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.gpu_check import __main__ as driver
from benchmarks.gpu_check import processes, wheels
from benchmarks.gpu_check.stages import STAGES, Stage
from benchmarks.gpu_check.summary import QUESTIONS, read_lines, summarize

ROOT = Path(__file__).resolve().parents[3]
# Does not end when it is interrupted, and has a child.
HANGING = "trap '' INT; sleep 600 & echo child $!; wait"
# Writes down what it knows when it is interrupted.
SLOW = "trap 'echo known so far; exit' INT; sleep 600 & wait"


class Bare(driver.Driver):
    """Runs a stage's `entry` as a shell's command, which begins at once, also on a machine that is busy."""

    def command(self, stage: Stage, limit: float) -> list[str]:
        return ["sh", "-c", stage.entry]


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(out: Path) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in read_lines(out) if line["what"] == "stage"}


@pytest.fixture(params=["in front", "in the background"])
def started(request: pytest.FixtureRequest) -> Iterator[None]:
    """As a shell starts a program: behind an `&` it is to ignore interrupts."""
    handler = signal.SIG_IGN if request.param == "in the background" else signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("started")
def test_a_stage_that_fails_or_hangs_is_recorded_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.3)
    monkeypatch.setattr(driver, "LEAST", 0.1)
    table = [
        Stage(0, "failing", "", 20.0, "echo at work; echo ValueError: the reason; exit 1"),
        Stage(1, "hanging", "", 1.0, HANGING),
        Stage(2, "slow", "", 1.0, SLOW),
        Stage(3, "lacking", "", 20.0, "", ("a_module_that_is_nowhere",)),
        Stage(4, "fine", "", 20.0, "echo all well"),
    ]
    check = Bare(tmp_path, tmp_path, 60.0, False, {"PATH": os.environ["PATH"]})
    assert [check.run(stage) for stage in table] == ["failed", "stopped", "stopped", "skipped", "done"]
    found, log = ends(tmp_path), (tmp_path / driver.LOG).read_text()
    assert found["failing"]["reason"].endswith("ValueError: the reason")
    assert found["hanging"]["reason"].startswith("not over after 2 s: child ")
    assert 2.0 <= found["hanging"]["value"] < 10.0
    assert found["slow"]["reason"] == "not over after 2 s: known so far"
    assert found["lacking"]["reason"] == "a_module_that_is_nowhere cannot be imported"
    assert "reason" not in found["fine"]
    assert all(text in log for text in ("all well", "at work"))
    (child,) = re.findall(r"child (\d+)", log)
    until = time.monotonic() + 5.0
    while alive(int(child)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(int(child))


def test_no_stage_begins_when_the_time_is_up(tmp_path: Path) -> None:
    check = Bare(tmp_path, tmp_path, driver.LEAST / 2, False, {})
    assert check.run(Stage(0, "late", "", 20.0, "echo begun")) == "skipped"
    assert ends(tmp_path)["late"]["reason"] == "4 s are left of the time for all stages"
    assert not (tmp_path / driver.LOG).exists()


def test_what_a_stage_leaves_a_later_one_may_use(tmp_path: Path) -> None:
    """And no stage takes the time of those behind it."""
    first, second, third = (Stage(number, "", "", limit, "") for number, limit in enumerate((30.0, 40.0, 50.0)))
    check = Bare(tmp_path, tmp_path, 130.0, False, {})
    limits = [check.limit_of(first, (second, third)), check.limit_of(second, (third,)), check.limit_of(third, ())]
    assert limits == pytest.approx([40.0, 80.0, 100.0], abs=1.0)
    check = Bare(tmp_path, tmp_path, 45.0, False, {})
    assert [check.limit_of(first, (second,)), check.limit_of(third, ())] == pytest.approx([30.0, 45.0], abs=1.0)


def test_a_long_output_loses_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "output.txt"
    output.write_bytes(b"a" * 100 + b"b" * 100 + b"c" * 100)
    monkeypatch.setattr(processes, "KEPT_FIRST", 10)
    monkeypatch.setattr(processes, "KEPT_LAST", 20)
    assert processes.shortened(output) == b"a" * 10 + b"\n... 270 bytes left out ...\n" + b"c" * 20


def test_the_table_of_stages() -> None:
    """Numbered as they run, inside the time of all, each with a function that is there and takes a `Check`."""
    assert [stage.number for stage in STAGES] == list(range(len(STAGES)))
    assert sum(stage.limit for stage in STAGES) + 15 <= driver.LIMIT <= 560
    for stage in STAGES:
        module, _, function = stage.entry.partition(":")
        tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
        (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
        assert [argument.arg for argument in found.args.args] == ["check"]
    assert {question.stage for question in QUESTIONS} == {None, *range(len(STAGES))}


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OUT", raising=False)
    args = driver.parse([])
    assert (args.output, args.limit, args.rehearse) == (ROOT / "runs" / "gpu_check", driver.LIMIT, False)
    assert args.stages == [stage.number for stage in STAGES]
    monkeypatch.setenv("OUT", str(tmp_path))
    args = driver.parse(["--rehearse", "--stages", "3", "0"])
    assert (args.output, args.limit, args.stages) == (tmp_path, driver.REHEARSAL_LIMIT, [3, 0])
    file = tmp_path / "file"
    file.touch()
    for wrong, sentence in (
        (["--stages", "11"], "invalid choice: 11"),
        (["--limit", "0"], "--limit 0.0 leaves no time; give seconds above 0"),
        ([str(file)], f"{file} is a file; name a folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            driver.parse(wrong)
        assert sentence in capsys.readouterr().err


def test_a_rehearsal_sees_no_gpu(tmp_path: Path) -> None:
    found = driver.environment_of(driver.parse(["--rehearse"]), tmp_path)
    assert (found["CUDA_VISIBLE_DEVICES"], found["TRITON_INTERPRET"], found["DS_ACCELERATOR"]) == ("", "1", "cpu")
    assert found["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(tmp_path)]
    assert driver.environment_of(driver.parse([]), tmp_path)["DS_ACCELERATOR"] == "cuda"


def test_dill_takes_what_is_installed_for_installed(tmp_path: Path) -> None:
    """It would pickle all of a module that it takes for the user's own, where `datasets` makes a fingerprint."""
    dill = pytest.importorskip("dill", reason="dill comes with `datasets`")
    module = ModuleType("carried")
    module.__file__ = str(tmp_path / driver.SITE / "carried.py")
    assert b"kept by reference" not in dill.dumps(module_with(module, "kept by reference"))
    module.__file__ = str(tmp_path / "site" / "carried.py")
    assert b"kept by reference" in dill.dumps(module_with(module, "kept by reference"))


def module_with(module: ModuleType, text: str) -> ModuleType:
    module.text = text
    return module


def line(stage: int, what: str, value: float | None, unit: str = "ms", **facts: Any) -> dict[str, Any]:
    return {"stage": stage, "name": "x", "what": what, "value": value, "unit": unit, **facts}


def test_the_summary_has_the_figure_or_the_reason() -> None:
    done = {"ended": "done"}
    said = summarize(
        [
            {**line(4, "step / fused AdamW", 1.25, "ratio", rank=256, precision="tf32"), "device": "a card"},
            line(4, "step / fused AdamW", None, "", rank=1024, ok=False, reason="OutOfMemoryError: 9 GiB"),
            line(4, "stage", 70.0, "s", ended="failed", reason="status 1"),
            *(line(2, "same bits twice", float(same), "true or not", ok=same, of="step") for same in (True, False)),
            *(line(2, "error of R", value, "relative", precision="tf32") for value in (1e-4, -3e-4)),
            line(2, "stage", 40.0, "s", **done),
            line(7, "stage", 0.0, "s", ended="skipped", reason="deepspeed cannot be imported"),
            line(8, "tokens per second", 1e5, "tokens/s", optimizer="FiraAdam"),
            line(8, "stage", 45.0, "s", ended="stopped", reason="not over after 45 s"),
        ]
    )
    paragraphs = dict(text.split("\n", 1) for text in said.split("\n\n")[1:])
    assert said.startswith("device    a card\n")
    assert paragraphs["THE STEP BESIDE FUSED ADAMW"].splitlines() == [
        "  step / fused AdamW: 1.25 ratio, rank 256, precision tf32",
        "  step / fused AdamW: no figure, rank 1024  <-- NOT AS IT SHOULD BE (OutOfMemoryError: 9 GiB)",
    ]
    assert paragraphs["DOES A STEP GIVE THE SAME BITS TWICE"] == "  same bits twice, step: 1 of 2"
    rounding = paragraphs["ROUNDING OF THE PRODUCTS AT FULL SIZE, AGAINST FLOAT64"]
    assert rounding == "  worst of 2: error of R: -0.0003 relative, precision tf32"
    assert paragraphs["DOES AN ENGINE TRAIN ON A GPU"] == (
        "  not measured: stage 7 was skipped, deepspeed cannot be imported"
    )
    assert paragraphs["THE QUICKSTART ON A GPU"].splitlines() == [
        "  tokens per second: 1e+05 tokens/s, optimizer FiraAdam",
        "  not measured further: stage 8 was stopped, not over after 45 s",
    ]
    assert paragraphs["TIME OF A REFRESH"] == "  not measured: stage 6 was not run"
    assert "NOT AS IT SHOULD BE: 2" in paragraphs


def test_wheels_are_of_the_versions_that_the_tests_run_with(tmp_path: Path) -> None:
    """And one loses the libraries that nothing calls, in its record too."""
    found = wheels.versions()
    assert (found["deepspeed"], found["fira"]) == ("0.19.8", "1.0.2")
    wheel = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    kept = ["bitsandbytes/__init__.py", "bitsandbytes/libbitsandbytes_cuda130.so"]
    gone = ["bitsandbytes/libbitsandbytes_cuda118.so", "bitsandbytes/libbitsandbytes_rocm70.so"]
    record = "bitsandbytes-1.0.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in (*kept, *gone):
            file.writestr(name, name)
        file.writestr(record, "".join(f"{name},sha256=x,1\n" for name in (*kept, *gone)))
    wheels.without(wheel, wheels.UNUSED)
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == [*kept, record]
        assert file.read(record).decode().splitlines() == [f"{name},sha256=x,1" for name in kept]


def pure_wheel(folder: Path, name: str, tag: str, requires: str = "packaging>=1") -> None:
    """A wheel of one empty module."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nowhere\n"
        )
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.mark.full
def test_a_wheel_that_does_not_fit_keeps_no_other_out(tmp_path: Path) -> None:
    folder, site = tmp_path / "wheels", tmp_path / driver.SITE
    folder.mkdir()
    pure_wheel(folder, "ds_fira_fits", "py3-none-any")
    pure_wheel(folder, "ds_fira_foreign", "cp26-cp26-macosx_10_9_arm64")
    pure_wheel(folder, "ds_fira_lacks", "py3-none-any", "packaging>=1000")
    pure_wheel(folder, "torch", "py3-none-any")  # is there in a newer version
    faults = wheels.install(folder, site)
    assert faults["ds_fira_fits-1.0-py3-none-any.whl"] == ""
    assert "is not a supported wheel" in faults["ds_fira_foreign-1.0-cp26-cp26-macosx_10_9_arm64.whl"]
    assert faults["ds_fira_lacks-1.0-py3-none-any.whl"].startswith("needs packaging>=1000, not ")
    assert len(faults) == 3
    assert (site / "ds_fira_fits.py").exists()
    assert not (site / "torch.py").exists()


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_stage_is_rehearsed(tmp_path: Path) -> None:
    """On the CPU, kernels interpreted, over gloo: nothing of a stage runs for the first time on a rented machine."""
    pytest.importorskip("triton", reason="Triton is not installed, and without it there are no kernels")
    environment = {key: value for key, value in os.environ.items() if key != "OUT"} | {"PYTHON": sys.executable}
    command = ["bash", "launch/gpu_check.sh", str(tmp_path), "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    how = {name: (end["ended"], end.get("reason")) for name, end in ends(tmp_path).items()}
    assert done.returncode == 0, how
    assert list(how) == [stage.name for stage in STAGES]
    assert {ended for ended, _ in how.values()} == {"done"}, how
    lines = read_lines(tmp_path)
    answered = {(found["stage"], found["what"]) for found in lines if found["value"] is not None}
    assert {stage for stage, _ in answered} >= set(range(len(STAGES)))
    assert not [found for found in lines if found["what"] == "compilation" and found["failed"]]
    of_the_device = {"launch of a kernel", "peak beyond", "peak memory", "replay of a step", "host time of a replay"}
    for question in QUESTIONS:
        missing = {what for what in question.what if (question.stage, what) not in answered} - of_the_device
        assert not missing, question.text
    for found in (each for each in lines if each["stage"] is not None):
        assert {"device", "versions", "commit", "source", "seed", "unit", "rehearsal"} <= found.keys(), found
    assert {path.name for path in tmp_path.iterdir()} == {
        driver.RESULTS,
        driver.LOG,
        "junit.xml",
        "trace.json.gz",
        "summary.txt",
    }
    assert "A REHEARSAL" in (tmp_path / "summary.txt").read_text()
