"""Where the kernels can be used, and what the compiler makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_fira.core import kernels
from tests.unit.core.kernel_cases import (
    DEVICE,
    random,
)

pytest.importorskip("triton", reason="Triton is not installed, and without it there are no kernels")
# What the interpreter's NumPy says of the NaN and infinity that it is given here.
pytestmark = [
    pytest.mark.usefixtures("kernels_allowed"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


def test_where_the_kernels_are_usable() -> None:
    assert kernels.supports(random(2, 2))
    assert kernels.supports(random(2, 2, dtype=torch.bfloat16))
    assert kernels.supports(random(2, 2, dtype=torch.float16)[:0])
    assert not kernels.supports(random(2, 2).double())
    assert not kernels.supports(torch.empty(2, 2, device="meta"))
    assert not kernels.supports(torch.empty(1, device=DEVICE).as_strided((1, 1), (2**23, 1)))
    kernels.interpret_on_cpu(False)
    assert not kernels.supports(torch.zeros(2, 2))


def test_the_interpreter_has_to_be_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET = '0' lets no kernel run on the CPU; set it to 1"):
        kernels.interpret_on_cpu(True)


def _python(*arguments: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**kept, **environment},
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.full
def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, ds_fira.core.kernels; print('triton' in sys.modules)"
    assert _python("-c", code).split()[-1] == "False"


# A machine without a GPU, on which Triton starts its driver for CUDA all the same: it compiles C before anything else.
WITHOUT_A_COMPILER = """
import os, warnings, torch
from torch.nn import Parameter
from ds_fira import FiraAdam
from ds_fira.core import kernels
kernels.adamw_, kernels.project, kernels.residual_square, kernels.apply_update_  # for a device, not the interpreter
os.environ["TRITON_INTERPRET"] = "1"
kernels.interpret_on_cpu(True)
params = [Parameter(torch.ones(4, 6)), Parameter(torch.ones(4, 6))]
optimizers = [FiraAdam(params[:1], rank=2), FiraAdam(params[1:], rank=2, kernels="off")]
torch.cuda.is_available = lambda: True
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(3):
        for param, optimizer in zip(params, optimizers):
            param.grad = torch.eye(4, 6) + step
            optimizer.step()
print(*(warning.message for warning in caught), sep="\\n")
assert torch.equal(*params), params
assert not torch.equal(params[0], torch.ones(4, 6))
"""


@pytest.mark.full
def test_torch_functions_take_over_where_triton_cannot_compile(tmp_path: Path) -> None:
    """As in a slim container: Triton imports, and the compiler that CC names is not there. One warning says so."""
    stub = tmp_path / "libcuda.so.1"
    stub.touch()  # looked for before the compiler
    found = {"CC": str(tmp_path / "gcc"), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    said = _python("-c", WITHOUT_A_COMPILER, **found).splitlines()
    (warning,) = [line for line in said if "kernels" in line]
    assert f"No such file or directory: '{tmp_path / 'gcc'}'" in warning
    assert warning.startswith("the Triton kernels do not run on cpu (FileNotFoundError: ")
    assert "give Triton what it lacks (a C compiler such as gcc, " in warning
    assert warning.endswith("or set kernels = 'off'.")


@pytest.mark.full
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles_ahead_of_time(capability: int, tmp_path: Path) -> None:
    """Within the shared memory, registers not spilled, products on the tensor cores; A100, H100, B200."""
    backend = pytest.importorskip("triton.backends.nvidia.compiler", reason="this Triton has no compiler for CUDA")
    try:
        backend.get_ptxas_version(capability)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as missing:
        pytest.skip(f"this Triton has no assembler for CUDA: {missing}")
    target = f"sm_{capability}"
    lines = _python("-m", "tests.gpu.kernel_builds", "quick", target, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    builds = [json.loads(line) for line in lines if line.startswith("{")]
    assert {build["kernel"] for build in builds} == {
        "_cast",
        "_project",
        "_adam_blocks",
        "_adam_direction",
        "_measure",
        "_residual_square",
        "_combine",
        "_apply_update",
        "_tally",
        "_adamw",
        "_adamw_sizes",
        # Of matrices that ZeRO splits.
        "_square_fragments",
        "_sum_fragments",
        "_move",
        "_add_arrived",
        "_project_left_edges",
        "_project_right_edges",
        "_update_edges",
        "_measure_entries",
        "_take_sums",
    }
    for build in builds:
        assert build["shared"] <= {80: 163, 90: 227, 100: 227}[capability] * 1024, build
        # A quotient in float64 may be a call that puts registers aside.
        spills = build["kernel"] in ("_measure", "_combine", "_measure_entries")
        assert build["spilled"] <= (32 if spills else 0), build
        assert bool(build["tensor_cores"]) == (build.get("PRECISION", "float32") != "float32"), build
