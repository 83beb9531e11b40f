"""Launches of one step with the Triton kernels, counted under the interpreter: no GPU, and no time is measured.

    TRITON_INTERPRET=1 python -m benchmarks.speed.launches [--stage 3] [--kernels off]

Every operation of torch's that a `TorchDispatchMode` sees counts, views and reads of the host's own numbers too, and
every kernel; what the interpreter itself does for a kernel does not. A step's launches do not depend on the sizes of
its matrices, so these are small: 48 x 16 for a feed-forward weight of LLaMA, and as many as the model has. Each count
is of a step between refreshes, with gradients in memory that no step before it had.

Of matrices that ZeRO splits the step of one rank counts (`benchmarks.speed.split_launches`), collectives aside.
`--stage 3` counts LLaMA-7B on 8 ranks, every matrix split over all: which of them go together is as at the model's own
sizes, rank 1024. `--kernels off` counts torch's functions instead; of what they do in blocks these sizes have one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.speed.split_launches import step_of_a_rank
from ds_fira import FiraAdam
from ds_fira.core import kernels
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.local_matrices import LocalMatrices

HIDDEN, FEED_FORWARD, RANK = 16, 48, 4
# The matrices of one layer of a LLaMA, in their order.
LAYER = [(HIDDEN, HIDDEN)] * 4 + [(FEED_FORWARD, HIDDEN)] * 2 + [(HIDDEN, FEED_FORWARD)]
# Those of LLaMA-7B, and the rank of their projection.
LAYER_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
LAYERS_7B, RANK_7B = 32, 1024


class Operations(TorchDispatchMode):
    """Counts the operations of torch's by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Marks of the profiler are no operations.
        self.names[str(func)] += func.namespace != "profiler"
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Operations and kernels by name, of what is done inside the block; the kernels must be interpreted."""
    from triton.runtime.interpreter import GridExecutor

    interpret, mode = GridExecutor.__call__, Operations()

    def launch(executor: Any, *args: Any, **options: Any) -> None:
        mode.names[executor.fn.__name__] += 1
        with _disable_current_modes():
            interpret(executor, *args, **options)

    with mock.patch.object(GridExecutor, "__call__", launch), mode:
        yield mode.names


def of_a_step(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int) -> Counter[str]:
    """What the step after `steps` others launches."""
    for step in range(steps + 1):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        if step == steps:
            with counted() as names:
                optimizer.step()
            return names
        optimizer.step()
    raise AssertionError(steps)


def separate(shapes: list[tuple[int, ...]], steps: int = 2, **settings: Any) -> Counter[str]:
    """A step of parameters of their own, as alone or at stage 0, after `steps` others."""
    params = [Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for shape in shapes]
    groups = [{"params": params, "rank": RANK}]
    return of_a_step(FiraAdam(groups, update_proj_gap=100, **settings), params, steps)


def partition(shapes: list[tuple[int, int]], fragment: int = 0, steps: int = 2, **settings: Any) -> Counter[str]:
    """A step of a flat partition of matrices, and of one of `fragment` elements under AdamW, after `steps` others."""
    numels = [m * n for m, n in shapes]
    flats = [
        Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0))) for size in (sum(numels), fragment)
    ]
    # As in ZeRO, the flat buffers take the parameters' place when the optimizer is there.
    groups = [{"params": [Parameter(torch.empty(1, 1))], "rank": RANK}, {"params": [Parameter(torch.empty(1))]}]
    optimizer = FiraAdam(groups[: 1 + (fragment > 0)], update_proj_gap=100, project_full_rank=True, **settings)
    for group, flat in zip(optimizer.param_groups, flats, strict=False):
        group["params"] = [flat]
    whole = tuple(
        MatrixShard(f"m{i}", shape, sum(numels[:i]), 0, shape[0] * shape[1]) for i, shape in enumerate(shapes)
    )
    optimizer.bind(flats[0], LocalMatrices(whole, tuple(range(len(whole)))))
    return of_a_step(optimizer, flats[: len(optimizer.param_groups)], steps)


def unprojected(shapes: list[tuple[int, ...]], steps: int = 2, **settings: Any) -> Counter[str]:
    """What a param group under AdamW adds to a step, after `steps` others: tensors of their own."""
    params = [Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for shape in shapes]
    groups = [{"params": [Parameter(torch.zeros(RANK, RANK))], "rank": RANK}, {"params": params}]
    # The one that would be projected has no gradient.
    return of_a_step(FiraAdam(groups, update_proj_gap=100, project_full_rank=True, **settings), params, steps)


def split(shapes: list[tuple[int, int]], **given: Any) -> Counter[str]:
    """A rank's step of matrices that are split over ranks, see `step_of_a_rank`."""
    return step_of_a_rank(shapes, counted, **given)[0]


def zero3(layers: int = LAYERS_7B, ranks: int = 8) -> Counter[str]:
    """A rank's step of LLaMA-7B at stage 3: its matrices, and a fragment of all else under AdamW."""
    adamw = unprojected([(100,)], steps=1)
    given = {"ranks": ranks, "evenly_sharded": True, "real": LAYER_7B * layers, "real_rank": RANK_7B, "steps": 1}
    return split(LAYER * layers, **given) + adamw


def split_cases() -> Iterator[tuple[str, int, Callable[[], Counter[str]]]]:
    """What is counted of matrices that ZeRO splits, with the number of matrices in it."""
    for name, shape in (("right", (FEED_FORWARD, HIDDEN)), ("left", (HIDDEN, FEED_FORWARD))):
        for stage in (2, 3):
            for count in (1, 8):
                given: dict[str, Any] = {"evenly_sharded": stage == 3}
                case = f"{count} split, {name}, stage {stage}"
                yield case, count, lambda shape=shape, count=count, given=given: split([shape] * count, **given)
    yield "1 cut in rows, right", 1, lambda: split([(FEED_FORWARD + 1, HIDDEN)], ranks=3, dp_rank=1)
    yield "1 cut in rows, left", 1, lambda: split([(HIDDEN - 1, FEED_FORWARD)])


def cases() -> Iterator[tuple[str, int, Callable[[], Counter[str]]]]:
    """What is counted, with the number of matrices in it."""
    for state_dtype in ("float32", "bfloat16", "int8"):
        kept: dict[str, Any] = {"state_dtype": state_dtype}
        yield f"8 experts, {state_dtype}", 8, lambda kept=kept: separate([(8, FEED_FORWARD, HIDDEN)], **kept)
        yield f"one matrix, {state_dtype}", 1, lambda kept=kept: separate([(FEED_FORWARD, HIDDEN)], **kept)
        yield f"LLaMA-60M alone, {state_dtype}", 56, lambda kept=kept: separate(LAYER * 8, **kept)
    yield "17 under AdamW", 17, lambda: unprojected([(HIDDEN,)] * 17)
    yield "LLaMA-7B on 8 ranks", 28, lambda: partition(LAYER * 4, fragment=100)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, choices=[2, 3])
    parser.add_argument("--kernels", default="auto", choices=["auto", "off"])
    args = parser.parse_args()
    kernels.interpret_on_cpu(True)
    chosen = [*cases(), *split_cases()]
    if args.stage == 3:
        chosen = [("LLaMA-7B on 8 ranks, stage 3", len(LAYER) * LAYERS_7B, zero3)]
    for name, matrices, count in chosen:
        with kernels.switched(args.kernels):
            names = count()
        own = {key: number for key, number in names.items() if key.startswith("_")}
        aten = names.total() - sum(own.values())
        print(
            f"{name:28} {aten:5} operations + {sum(own.values()):4} kernels = {names.total():5}, "
            f"{names.total() / matrices:6.1f} a matrix"
        )


if __name__ == "__main__":
    main()
