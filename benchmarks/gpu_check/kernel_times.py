"""Stage 3: time of every kernel by shape, rank, precision and tile, beside its floor and beside cuBLAS."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from benchmarks.gpu_check.ceilings import copy_rate, product_rate
from benchmarks.gpu_check.kernel_table import KernelCase, Operands, cases, elementwise, others
from benchmarks.gpu_check.record import Check
from benchmarks.gpu_check.timing import device_seconds
from benchmarks.gpu_check.warm_up import compile_kernels, jobs
from ds_fira.core import kernels

# Rows x columns x depth, warps and stages, beside the ones in use: those that compile for an H100 without a spilled
# register (`benchmarks/speed/builds.py`).
VARIANTS = {
    "tf32": ((64, 128, 32, 4, 3), (128, 128, 32, 8, 3), (128, 128, 32, 8, 4)),
    "bfloat16": ((64, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3)),
}
# The update, whose W and G take registers too, has no room for tiles as wide as this.
TOO_WIDE = 256
# Seconds that a size takes, its compilations not counted; and with the variants of its tiles.
NEEDS, NEEDS_VARIANTS = 3.0, 8.0


def measure(check: Check) -> None:
    """The rank of most interest first, then the other ranks, then the tiles."""
    if check.rehearsal:
        kernels.interpret_on_cpu(True)
    with check.attempt("compilation"):
        compile_kernels(check, jobs(check, VARIANTS))
    ceilings = {"copy": copy_rate(check)}
    ceilings |= {precision: product_rate(check, precision) for precision in ("float32", "tf32", "bfloat16")}
    shapes, ranks = check.sizes.shapes, check.sizes.ranks
    found: set[str] = set()
    for rank in ranks[: 1 if check.rehearsal else None]:
        for shape in shapes:
            with check.attempt("time", shape=list(shape), rank=rank):
                found |= _size(check, shape, rank, ceilings)
    for name in others(found):
        check.record("time", None, "us", kernel=name, reason="benchmarks/gpu_check/kernel_table.py has no case of it")
    for shape in shapes[1:] if not check.rehearsal else shapes[:1]:
        for rank in ranks[:2] if not check.rehearsal else ranks[:1]:
            with check.attempt("time", shape=list(shape), rank=rank, tile="variants"):
                _variants(check, shape, rank, ceilings)


def _size(check: Check, shape: tuple[int, int], rank: int, ceilings: dict[str, float]) -> set[str]:
    facts: dict[str, Any] = {"shape": [check.sizes.batch, *shape], "rank": rank}
    if not check.enough("time", NEEDS, **facts):
        return set()
    operands = Operands.random(check.sizes.batch, shape, rank, check.device)
    named = set()
    for precision in ("tf32", "bfloat16", *(["float32"] if rank == check.sizes.ranks[0] else [])):
        for case in cases(operands, precision):
            named.add(case.name)
            _record(check, case, ceilings, precision=precision, **facts)
    for case in elementwise(operands):
        named.add(case.name)
        if rank == check.sizes.ranks[0] or case.ranked:
            _record(check, case, ceilings, **facts)
    return named


def _variants(check: Check, shape: tuple[int, int], rank: int, ceilings: dict[str, float]) -> None:
    facts: dict[str, Any] = {"shape": [check.sizes.batch, *shape], "rank": rank}
    operands = Operands.random(check.sizes.batch, shape, rank, check.device)
    for precision, variants in VARIANTS.items():
        for sizes in variants[: 1 if check.rehearsal else None]:
            if not check.enough("time", NEEDS_VARIANTS, tile=list(sizes), precision=precision, **facts):
                return
            with tiles_of(precision, sizes):
                for case in cases(operands, precision):
                    if varied(case, sizes):
                        _record(check, case, ceilings, precision=precision, tile=list(sizes), peer=False, **facts)


def _record(check: Check, case: KernelCase, ceilings: dict[str, float], peer: bool = True, **facts: Any) -> None:
    """Time of one kernel; the share of what bytes and products alone would take."""
    with check.attempt("time", kernel=case.name, **facts):
        taken = device_seconds(case.call, check.device)
        floor = max(case.moved / ceilings["copy"], case.operations / ceilings[facts.get("precision", "float32")])
        found = {
            "of ceiling": floor / taken,
            "GB/s": case.moved / taken / 1e9,
            "TFLOP/s": case.operations / taken / 1e12,
        }
        if peer and case.peer is not None:
            beside = device_seconds(case.peer, check.device)
            found |= {"of cuBLAS": beside / taken, "peer": case.peer_name, "peer us": beside * 1e6}
        check.record("time", taken * 1e6, "us", kernel=case.name, **facts, **found)


def varied(case: KernelCase, sizes: tuple[int, int, int, int, int]) -> bool:
    """Whether a kernel is measured with such a tile; the exact sum of the residual has one of its own."""
    return case.name == "project" or (case.name == "apply_update_" and sizes[1] < TOO_WIDE)


@contextmanager
def tiles_of(precision: str, sizes: tuple[int, int, int, int, int]) -> Iterator[None]:
    """Other tiles for the products of a precision."""
    from ds_fira.core.kernels import tiles

    with contextlib.ExitStack() as stack:
        for product in ("project", "update"):
            stack.enter_context(mock.patch.dict(tiles.TILES[product], {precision: tiles.Tiles(*sizes)}))
        yield
