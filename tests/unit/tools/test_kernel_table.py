"""What is counted in a kernel's PTX, and the page that the table of builds is written into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, and without it there are no kernels")

from benchmarks.common import default_device
from benchmarks.gpu_check import kernel_table
from benchmarks.speed import builds, ptx
from ds_fira.core import kernels

ROOT = Path(__file__).resolve().parents[3]
PTX = """
    ld.global.b8 {%rs1}, [ %rd1 + 0 ];
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd2 + 0 ];
    @%p1 bra $L__BB0_4;
    cp.async.cg.shared.global [ %r10 + 0 ], [ %rd5 + 0 ], 0x10, %r11;
$L__BB0_2:                              // %outer
    ld.global.L1::evict_last.v2.f32 {%f1, %f2}, [%rd2];
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
$L__BB0_3:                              // =>This Inner Loop Header: Depth=2
    cp.async.cg.shared.global [ %r10 + 0 ], [ %rd5 + 0 ], 0x10, %r11;
    cp.async.ca.shared.global [ %r10 + 0 ], [ %rd5 + 0 ], 4;
    cp.async.commit_group;
    @%p2 bra $L__BB0_3;
    @%p2 bra.uni $L__BB0_2;
$L__BB0_4:
    @%p3 st.global.b64 [ %rd6 + 0 ], { %rd7 };
    @%p3 st.global.b32 [ %rd6 + 0 ], { %r7 };
    bra $L__BB0_2;
"""


def test_bytes_of_a_thread() -> None:
    assert ptx.traffic(PTX) == ptx.Traffic(loaded=16 + 8, stored=4, copied=16 + 4, wide=16 / 28)


def test_only_loops_of_one_block_are_innermost() -> None:
    (loop,) = ptx.innermost(PTX)
    assert loop.splitlines()[0].startswith("$L__BB0_3")
    assert loop.splitlines()[-1].endswith("bra $L__BB0_3;")


def test_a_page_keeps_what_is_around_the_marks() -> None:
    page = f"before\n{builds.BEGIN}\nold\n{builds.END}\nafter"
    once = builds.written(page, "| new |")
    assert once == f"before\n{builds.BEGIN}\n\n| new |\n\n{builds.END}\nafter"
    assert builds.written(once, "| new |") == once
    with pytest.raises(ValueError, match="names a page without the marks"):
        builds.written("before\nafter", "| new |")
    builds.written((ROOT / "docs" / "performance.md").read_text(), "")


def test_the_table_is_of_kernels_that_there_are() -> None:
    """Also what it does not know is told."""
    assert set(kernel_table.others(set())) <= set(kernels.__all__)
    assert {"project", "apply_update_"} <= set(kernel_table.others(set()))
    assert not {"supports", "fault"} & set(kernel_table.others(set()))


def test_the_table_knows_every_kernel() -> None:
    """On both sides; what a whole step has beside the other cases is compiled with them, once for a side."""
    operands = kernel_table.Operands.random(2, (48, 32), 8, torch.device("meta"))
    named = {case.name for case in (*kernel_table.cases(operands, "tf32"), *kernel_table.elementwise(operands))}
    assert kernel_table.others(named) == []
    found = [(launch.kernel.__name__, variant) for launch, variant in builds.chosen(precisions=("tf32",))]
    assert len(found) == len(set(found))
    for side in ("left", "right"):
        variants = {name: variant for name, variant in found if variant.startswith(side)}
        assert variants["_project"] == f"{side}, tf32"
        assert variants["_adam_direction"] == variants["_combine"] == side
        assert variants["_measure"] == f"{side}, scaled"
        assert set(variants) == {
            "_project",
            "_adam_direction",
            "_measure",
            "_residual_square",
            "_combine",
            "_apply_update",
        }
    assert [variant for name, variant in found if name == "_adamw"] == ["", "blocks"]


@pytest.mark.usefixtures("kernels_allowed")
@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_a_case_may_be_called_again_and_again(shape: tuple[int, int]) -> None:
    """Finite numbers, and weights, 0.02 in size, that hardly move: a time is measured over many calls."""
    operands = kernel_table.Operands.random(2, shape, 4, default_device())
    before = operands.weight.clone()
    for case in (*kernel_table.cases(operands, "float32"), *kernel_table.elementwise(operands)):
        for _ in range(2):
            case.call()
        assert case.moved > 0
    assert torch.allclose(operands.weight, before, rtol=0.0, atol=2e-5)


def build(kernel: str, arch: int, registers: int) -> builds.Build:
    return builds.Build(kernel, "left", "8 x 8", arch, registers, 0, 2048, 2, 8.0, 4.25, (8, 4), None, 0.5, "wgmma")


def test_one_value_where_architectures_agree() -> None:
    text = builds.table([build("_update", 80, 128), build("_update", 90, 222), build("_moments", 80, 40)])
    assert text.splitlines()[2:] == [
        "| `update`, left | 8 x 8 | 128 / 222 | 0 | 2 | 2 | 8.0, 4.2 (8, 4) | 50% | - | wgmma |",
        "| `moments`, left | 8 x 8 | 40 | 0 | 2 | 2 | 8.0, 4.2 (8, 4) | 50% | - | wgmma |",
    ]


def test_no_kernel_of_the_page_spills_a_register() -> None:
    """What was compiled last for it, on every architecture; both products among them, on both sides."""
    _, _, rest = (ROOT / "docs" / "performance.md").read_text().partition(builds.BEGIN)
    rows = [line.split("|") for line in rest.partition(builds.END)[0].splitlines() if line.startswith("| `")]
    named = {row[1].strip().partition(",")[0] for row in rows}
    assert {"`cast`", "`project`", "`apply_update`", "`residual_square`", "`combine`"} <= named
    assert [row[1] for row in rows if row[4].strip() != "0"] == []


# Compiles two kernels for the oldest architecture.
TWO = """
import json, dataclasses
from benchmarks.speed.builds import chosen, compiled
launches = list(chosen(((4096, 11008),), ("tf32",)))
for name in ("_apply_update", "_adamw"):
    launch, variant = next(each for each in launches if each[0].kernel.__name__ == name)
    print(json.dumps(dataclasses.asdict(compiled(launch, variant, 80))))
"""


@pytest.mark.full
def test_the_update_moves_what_it_has_to(tmp_path: Path) -> None:
    """G and W read and W written once, and each element of an operand copied once for a tile; AdamW by 16 bytes."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment = {**kept, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", TWO], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found, adamw = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert (found["arch"], found["spilled"], found["variant"]) == (80, 0, "left, tf32")
    # A thread has 16 elements of a quarter of the tile, and the factors of their four columns.
    assert found["loaded"] == 8.0 + 4 * 4 / 16
    assert (found["stored"], found["copied"]) == (4.0, 4.0)
    assert found["wide"] > 0.9
    assert (adamw["loaded"], adamw["stored"], adamw["wide"], adamw["spilled"]) == (16.0, 12.0, 1.0, 0)
