"""What the compiler makes of every kernel, ahead of time and without a GPU: registers, spills, shared memory, bytes.

    python -m benchmarks.speed.builds [--arch 80 90 100] [--write docs/performance.md] [--json FILE]

The kernels of `benchmarks/gpu_check/kernel_table.py` are called on tensors without memory, of the sizes of LLaMA 7B,
and what they would launch is compiled with the tiles, strides and dtypes of that launch: minutes on two cores. Bytes
are counted in the PTX: those of all loads and stores that a program's threads make, over the elements of what it reads
and writes. `--write` puts the table between two marks of a page. Not with TRITON_INTERPRET set.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from benchmarks.gpu_check.kernel_table import Operands, cases, elementwise, others
from benchmarks.speed.ptx import traffic
from ds_fira.core import kernels

ARCHITECTURES = (80, 90, 100)
# Shared memory of a multiprocessor that programs may have, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS, THREADS = 65536, 2048
SHAPES = ((4096, 11008), (11008, 4096))
RANK = 512
PRECISIONS = ("tf32", "bfloat16")
BEGIN, END = "<!-- what the compiler makes of the kernels: begin -->", "<!-- end -->"
Sizes = dict[str, Any]
# Of what a program loads and stores by itself, not through shared memory: the elements, and the bytes of each that it
# cannot do without.
ELEMENTS: dict[str, tuple[Callable[[Sizes], int], int, Callable[[Sizes], int], int]] = {
    "_cast": (lambda o: o["ROWS"] * o["COLUMNS"], 4, lambda o: o["ROWS"] * o["COLUMNS"], 2),
    # G goes through shared memory, which is counted by itself.
    "_project": (lambda o: o["ROWS"] * o["DEPTH"], 0, lambda o: o["ROWS"] * o["COLUMNS"], 4),
    "_apply_update": (lambda o: o["ROWS"] * o["COLUMNS"], 8, lambda o: o["ROWS"] * o["COLUMNS"], 4),
    "_residual_square": (lambda o: o["ROWS"] * o["COLUMNS"], 4, lambda o: o["ROWS"] * o["COLUMNS"], 0),
    "_adam_direction": (lambda o: o["LINES"] * o["ENTRIES"], 12, lambda o: o["LINES"] * o["ENTRIES"], 12),
    "_adamw": (lambda o: o["BLOCK"] * o.get("LINES", 1), 16, lambda o: o["BLOCK"] * o.get("LINES", 1), 12),
}


class Launch(NamedTuple):
    """What a wrapper would launch."""

    kernel: Any
    args: tuple[object, ...]
    options: Sizes


@dataclass(frozen=True)
class Build:
    """One kernel, compiled for one architecture.

    Attributes:
        kernel: name of the function.
        variant: side and precision, where it has them.
        tile: the sizes of its tile.
        arch: compute capability, 90 for 9.0.
        registers: of a thread.
        spilled: bytes of a thread, stores and loads.
        shared: bytes of a program.
        resident: programs that a multiprocessor has room for.
        loaded: bytes by element that a program loads by itself; None where nobody has said what an element is.
        stored: bytes by element that it stores.
        least: both that it cannot do without.
        copied: bytes by element of a product's operands that go to shared memory in one turn of its loop; None where
            that loop is more than one block.
        wide: the share of the bytes loaded and stored that goes in units of 16.
        tensor_cores: the instruction that multiplies.
    """

    kernel: str
    variant: str
    tile: str
    arch: int
    registers: int
    spilled: int
    shared: int
    resident: int
    loaded: float | None
    stored: float | None
    least: tuple[int, int] | None
    copied: float | None
    wide: float
    tensor_cores: str


def specialized(value: object, path: tuple[int, ...], constant: bool, constants: dict, attributes: dict) -> object:
    """The type of an argument, or of each part of one that is a tuple; what a launch knows of its value is added."""
    if isinstance(value, tuple):
        parts = [specialized(part, (*path, i), constant, constants, attributes) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if constant or value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    return mangle_type(value)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """What the kernels' wrappers would launch inside the block, in whichever module they are."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], tensor: torch.Tensor, *args: object, **options: Any) -> None:
        found.append(Launch(kernel, args, options))

    with contextlib.ExitStack() as stack:
        for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
            if hasattr(importlib.import_module(module.name), "launch"):
                stack.enter_context(mock.patch(f"{module.name}.launch", record))
        yield found


def compiled(launch: Launch, variant: str, arch: int) -> Build:
    """Compile what a launch would run, for one architecture."""
    options = dict(launch.options)
    settings = {key: options.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in options}
    signature, constants, attributes = {}, {}, {}
    values = (*launch.args, *options.values())
    for place, (name, value) in enumerate(zip(launch.kernel.arg_names, values, strict=True)):
        signature[name] = specialized(value, (place,), name in options, constants, attributes)
    log = io.StringIO()
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    with contextlib.redirect_stdout(log):
        source = ASTSource(launch.kernel, signature, constants, attributes)
        target = GPUTarget("cuda", arch, 32)
        built = triton.compile(source, target=target, options={**settings, "enable_fp_fusion": True})
    said, ptx = log.getvalue(), built.asm["ptx"]
    registers, threads = int(re.findall(r"Used (\d+) registers", said)[-1]), 32 * settings.get("num_warps", 4)
    shared, moved, name = built.metadata.shared, traffic(ptx), launch.kernel.__name__
    room = [THREADS // threads, REGISTERS // (-(-registers // 8) * 8 * threads), SHARED[arch] // max(1, shared)]
    # What moves is known of moments in float32.
    known = ELEMENTS.get(name) if options.get("FORM", "plain") == "plain" else None
    copied = None
    if moved.copied and "DEPTH" in options:
        copied = moved.copied * threads / ((options["ROWS"] + options["COLUMNS"]) * options["DEPTH"])
    return Build(
        kernel=name,
        variant=variant,
        tile=" x ".join(str(size) for key, size in options.items() if key.isupper() and type(size) is int),
        arch=arch,
        registers=registers,
        spilled=sum(int(size) for size in re.findall(r"(\d+) bytes spill", said)),
        shared=shared,
        resident=min(room),
        loaded=moved.loaded * threads / known[0](options) if known else None,
        stored=moved.stored * threads / known[2](options) if known else None,
        least=(known[1], known[3]) if known else None,
        copied=copied,
        wide=moved.wide,
        tensor_cores=", ".join(sorted(set(re.findall(r"\b(wgmma(?=\.mma_async)|mma\.sync|tcgen05(?=\.mma))", ptx)))),
    )


def chosen(shapes: tuple[tuple[int, int], ...] = SHAPES, precisions: tuple[str, ...] = PRECISIONS) -> Iterator[tuple]:
    """Every launch of the table of kernels, with its variant."""
    named: set[str] = set()
    built: set[tuple[str, str]] = set()
    for place, shape in enumerate(shapes):
        operands = Operands.random(1, shape, RANK, torch.device("meta"))
        side = operands.side
        calls = [(f"{side}, {precision}", case) for precision in precisions for case in cases(operands, precision)]
        calls += [(side, case) for case in elementwise(operands)]
        # Of a whole step's kernels, those that no other case has.
        for variant, case in sorted(calls, key=lambda call: call[1].name == "step_together"):
            named.add(case.name)
            if not case.ranked and place > 0:
                continue
            with recorded() as found:
                case.call()
            for launch in found:
                name, whole = launch.kernel.__name__, case.name == "step_together"
                if not (whole and (name, side) in built):
                    yield launch, _variant(launch, side if whole else variant if case.ranked else "")
                built.add((name, side))
    for name in others(named):
        print(f"{name}: benchmarks/gpu_check/kernel_table.py has no case of it")


def _variant(launch: Launch, of: str) -> str:
    """With the form of the moments where it is not the plain one, or that of the residual."""
    form = launch.options.get("FORM", "plain")
    return of if form == "plain" else ", ".join(filter(None, (of, form)))


def table(builds: list[Build]) -> str:
    """The builds as a table in Markdown, a row for all architectures of a kernel."""
    architectures = sorted({build.arch for build in builds})
    mark = " / ".join(f"sm_{arch}" for arch in architectures)
    columns = [
        "kernel",
        "tile",
        f"registers, {mark}",
        "spilled, B",
        "shared, KB",
        "programs",
        "read, written, B (least)",
    ]
    columns += ["wide", "copied, B", "products"]
    said = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows: dict[tuple[str, str], list[Build]] = {}
    for build in builds:
        rows.setdefault((build.kernel, build.variant), []).append(build)
    for (kernel, variant), of_row in rows.items():
        each = lambda get, of_row=of_row: _once([str(get(build)) for build in of_row])  # noqa: E731
        name = f"`{kernel.removeprefix('_')}`" + (f", {variant}" if variant else "")
        said.append(
            f"| {name} | {of_row[0].tile} | {each(lambda b: b.registers)} | {each(lambda b: b.spilled)} "
            f"| {each(lambda b: round(b.shared / 1024))} | {each(lambda b: b.resident)} | {each(_bytes)} "
            f"| {each(lambda b: f'{b.wide:.0%}')} | {each(_copied)} "
            f"| {each(lambda b: b.tensor_cores)} |"
        )
    return "\n".join(said)


def _bytes(build: Build) -> str:
    if build.least is None:
        return ""
    return f"{build.loaded:.1f}, {build.stored:.1f} ({build.least[0]}, {build.least[1]})"


def _copied(build: Build) -> str:
    if not build.tensor_cores:
        return ""
    return "-" if build.copied is None else f"{build.copied:.1f}"


def _once(values: list[str]) -> str:
    """One value where all are equal."""
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def written(page: str, content: str) -> str:
    """A page with other content between its marks.

    Raises:
        ValueError: it has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"--write names a page without the marks {BEGIN} and {END}; put them where the table belongs.")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=tuple(SHARED))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marks of a page")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.write is not None:
        written(args.write.read_text(), "")
    found = []
    for launch, variant in chosen():
        found += [compiled(launch, variant, arch) for arch in args.arch]
        print(found[-1], flush=True)
    said = f"Triton {triton.__version__}:\n\n{table(found)}"
    print(said)
    if args.write is not None:
        args.write.write_text(written(args.write.read_text(), said))
    if args.json is not None:
        args.json.write_text(
            json.dumps({"triton": triton.__version__, "builds": [asdict(each) for each in found]}, indent=1)
        )


if __name__ == "__main__":
    main()
