"""Compiling the kernels before they are timed: in several processes at once, which share Triton's cache on the disk.

What is compiled depends on tiles, on dtypes and on whether sizes are multiples of 16, not on the size of a matrix. So
small matrices stand for all of those whose tiles are as large.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

from benchmarks.gpu_check.record import Check

PROCESSES = 8
# (m, n) of either side; of the tiles of full size no side is cut.
SHAPES = ((512, 1024), (1024, 512))
REHEARSED_SHAPES = ((32, 48),)


class Job(NamedTuple):
    """What one process compiles.

    Attributes:
        shape: (m, n), which says the side.
        rank: of the projection.
        precision: of the products.
        tile: other tiles than those in use, as `tiles_of` takes them; None for a whole step too.
    """

    shape: tuple[int, int]
    rank: int
    precision: str
    tile: tuple[int, int, int, int, int] | None = None


def jobs(check: Check, variants: dict[str, tuple[tuple[int, int, int, int, int], ...]] | None = None) -> list[Job]:
    """Those of every rank, precision and side; or of other tiles."""
    if check.rehearsal:
        return [Job(shape, 8, "tf32") for shape in REHEARSED_SHAPES]
    if variants is not None:
        named = [(precision, tile) for precision, tiles in variants.items() for tile in tiles]
        return [Job(shape, 256, precision, tile) for shape in SHAPES for precision, tile in named]
    # Ranks from the width of a tile on have one set of tiles.
    return [Job(*each) for each in itertools.product(SHAPES, (256, 64), ("tf32", "bfloat16", "float32"))]


def compile_kernels(check: Check, chosen: list[Job]) -> None:
    """Compile, and record how long it took; what fails here fails again where it is measured, and is told there."""
    start = time.monotonic()
    workers = min(PROCESSES, len(chosen), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    faults = []
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done in as_completed([pool.submit(_compile, job, check.rehearsal) for job in chosen]):
            if (fault := done.exception()) is not None:
                faults.append(" ".join(f"{type(fault).__name__}: {fault}".split())[:200])
    facts = {"jobs": len(chosen), "processes": workers, **({"reason": faults[0]} if faults else {})}
    check.record("compilation", time.monotonic() - start, "s", failed=len(faults), **facts)


def _compile(job: Job, rehearsal: bool) -> None:
    import torch

    from benchmarks.common import default_device
    from benchmarks.gpu_check.kernel_table import Operands, cases, elementwise
    from benchmarks.gpu_check.kernel_times import tiles_of, varied
    from ds_fira import FiraAdam
    from ds_fira.core import kernels

    if rehearsal:
        kernels.interpret_on_cpu(True)
    operands = Operands.random(2, job.shape, job.rank, default_device())
    if job.tile is not None:
        with tiles_of(job.precision, job.tile):
            for case in cases(operands, job.precision):
                if varied(case, job.tile):
                    case.call()
    else:
        for case in (*cases(operands, job.precision), *elementwise(operands)):
            case.call()
        for weight in (operands.weight, operands.weight[0]):
            param = torch.nn.Parameter(weight)
            param.grad = operands.grad if weight.dim() == 3 else operands.grad[0]
            # A group with a rank of its own: one without takes tensors of three dimensions for no weights.
            group = {"params": [param], "rank": job.rank}
            optimizer = FiraAdam([group], subspace="randomized", matmul_precision=job.precision)
            for _ in range(2):
                optimizer.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
