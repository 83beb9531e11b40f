"""Compiles every kernel for a GPU, which takes none, and prints what the assembler says of each: one JSON a line.

Run as `python -m tests.gpu.kernel_builds`, without TRITON_INTERPRET; with `quick` for one side and the tensor cores
alone, with `sm_80` or `sm_100` for an A100 or a B200 in place of an H100. A step is made on meta tensors of the sizes
of a 7B model, and what it would launch is compiled with the tiles, strides and dtypes of that launch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.speed.builds import Launch, compiled, recorded
from ds_fira.core import kernels, quantization
from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.batches import SlicedTask
from ds_fira.core.matrix_slice import MatrixSlice
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import allocate, allocate_matrices, matrix_states, state_views
from ds_fira.core.step import MatrixTask
from ds_fira.sharding.geometry import MatrixShard, split
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.split_matrix import plan_split

CAPABILITY = next((size for size in (80, 100) if f"sm_{size}" in sys.argv), 90)
BETAS = (0.9, 0.999)
# (m, n, r, side): the two sides of a 7B model's feed-forward layers.
SHAPES = ((4096, 11008, 512, "left"), (11008, 4096, 512, "right"))
# Precision of the products, dtype of the weight, dtype of the gradient, dtype of the states, whether scattered.
DTYPES = (
    ("bfloat16", torch.bfloat16, torch.bfloat16, "int8", True),
    ("bfloat16", torch.float32, torch.float32, "float32", False),
    ("tf32", torch.float32, torch.float32, "float32", False),
    ("float32", torch.float32, torch.float32, "bfloat16", True),
    ("tf32", torch.bfloat16, torch.bfloat16, "float32", False),
)
# Settings of the other forms of the residual.
FORMS = (
    {"weight_rounding": "stochastic"},
    {"scaling": "matrix", "formulation": "paper", "residual_warmup": 10},
    {"scaling": "none", "limiter": "none"},
    {"residual": "normalized"},
    {"residual": "normalized", "scaling": "matrix", "limiter": "growth"},
    {"residual": "normalized", "residual_beta": 0.0},
    {"residual": "none"},
    # A capturable step reads its learning rate on the device.
    {"lr_tensor": torch.empty((), device="meta")},
)


def built(launches: list[Launch]) -> Iterator[dict[str, Any]]:
    """What the compiler makes of each launch, with the constants that it is made for; the list is empty then."""
    for launch in launches:
        constants = {key: value for key, value in launch.options.items() if isinstance(value, (str, int))}
        yield {**asdict(compiled(launch, "", CAPABILITY)), **constants}
    launches.clear()


def tasks_of(
    shape: tuple[int, int, int, str],
    precision: str,
    weight_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    state_dtype: str,
    scattered: bool,
    **settings: Any,
) -> list[MatrixTask]:
    """One matrix, or three in a buffer that has room for four, so that a table says where they are."""
    m, n, r, side = shape
    group = GroupSettings(rank=r, proj_type=side, matmul_precision=precision, state_dtype=state_dtype, **settings)
    buffers = [torch.empty(4 * m * n, dtype=dtype, device="meta") for dtype in (weight_dtype, grad_dtype)]
    count = 3 if scattered else 1
    state = allocate(buffers[0], [(m, n)] * count, group, batched=True)
    views = matrix_states(state, [(m, n)] * count, group, True, FIRA_ADAM, dtype=torch.float32)
    places = (0, 1, 3)[:count]
    return [
        SlicedTask(*(MatrixSlice(flat, place * m * n, (m, n), (n, 1)) for flat in buffers), view, group, 1e-4)
        for place, view in zip(places, views, strict=True)
    ]


def split_step(shape: tuple[int, int], settings: GroupSettings) -> None:
    """The step of the middle one of three ranks that share a matrix, cut inside rows, without what travels."""
    from ds_fira.core.kernels.fragment_squares import PROGRAMS, launch_squares
    from ds_fira.core.kernels.moving import add_arrived, move
    from ds_fira.core.kernels.split_step import SplitStep
    from ds_fira.sharding.lowrank.answer_form import answer_form
    from ds_fira.sharding.lowrank.layout import TurnLayout
    from ds_fira.sharding.lowrank.pieces import TurnPieces

    whole = MatrixShard("w", shape, 0, 0, shape[0] * shape[1])
    fragments = split(whole, -(-whole.stop // 3), 3)
    plan = LocalShardPlan.of(plan_split(fragments, 1, 3, settings), 0, 0, 1)
    layout = TurnLayout([plan], settings, {0: answer_form(plan.matrix, settings)})
    dtype = torch.bfloat16 if settings.rounds_stochastically else torch.float32
    param, grad = (torch.empty(plan.fragment.numel, dtype=dtype, device="meta") for _ in range(2))
    basis, low_rank, average = plan.matrix.basis_shape(1), plan.low_rank_shape, plan.averages(settings)
    stored = allocate_matrices(param, basis, low_rank, settings.state_dtype, (), FIRA_ADAM, average)
    held = [(layout.parts[0], state_views(stored, plan.matrix.side))]
    memory = SplitStep(param, grad, layout.sizes, settings, 1e-4, cleared=False)
    rows, sums = (torch.empty(size, dtype=torch.float64, device="meta") for size in ((1, 3), (1, 2)))
    launch_squares(grad, [(0, grad.numel())], [0], torch.empty(PROGRAMS, dtype=torch.float64, device="meta"), sums)
    memory.project(held)
    pieces = TurnPieces(layout, 3, settings.has_one_factor)
    delivery = pieces.parts_of_sums([0])
    move(memory.words, memory.doubles, None, memory.words, pieces.pieces_of_sums([0], delivery))
    answers = pieces.answers([0])
    move(memory.words, memory.doubles, held[0][1].basis, memory.words, pieces.pieces_of_answers([0], answers, [0]))
    add_arrived(memory.words, memory.doubles, memory.words, *pieces.arrivals([0], delivery))
    memory.advance(held, rows, lambda part: 0, [(sums, 0)])
    memory.take_sums(held, rows, lambda part: 0)
    memory.combine(held, over_region=plan.matrix.side == "right", exact=True)
    memory.apply(held)


def builds(shapes: tuple = SHAPES, dtypes: tuple = DTYPES, forms: tuple = FORMS) -> Iterator[dict[str, Any]]:
    """Every kernel's build, for every shape and choice of dtypes; then every form of residual."""
    with recorded() as found:
        for shape in shapes:
            for choice in dtypes:
                stats = kernels.step_together(tasks_of(shape, *choice))
                stats.add_to_(torch.empty(4, dtype=torch.float64, device="meta"), 1.0)
                yield from built(found)
        # What differs from form to form is small.
        for form in forms:
            small = (64, 96, 16, shapes[0][3])
            kernels.step_together(tasks_of(small, *dtypes[0], **form))
            yield from built(found)
            for shape, side in (((64, 97), "left"), ((97, 66), "right")):
                split_step(shape, GroupSettings(rank=16, proj_type=side, **form))
            yield from built(found)
        flat, size = torch.empty(2**20, device="meta"), (2**20,)
        step = {"step": 1, "lr": 0.1, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.0}
        count, rate = torch.empty((), dtype=torch.int64, device="meta"), torch.empty(1, device="meta")
        on_device = {**step, "step": [count], "lr": rate}
        for state_dtype in ("float32", "bfloat16", "int8"):
            kept = {"dtype": torch.float32, "device": "meta"}
            moments = [quantization.allocate(size, (), state_dtype, signed=signed, **kept) for signed in (True, False)]
            for counted in (step, on_device):
                for stochastic in (False, True):
                    operands = [(flat.bfloat16(), flat, *moments)]
                    kernels.adamw_together_(operands, **counted, stochastic=stochastic)
        yield from built(found)


if __name__ == "__main__":
    for build in builds(SHAPES[:1], DTYPES[:3], FORMS[:3]) if "quick" in sys.argv else builds():
        print(json.dumps(build), flush=True)
