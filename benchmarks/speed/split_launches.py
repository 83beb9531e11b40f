"""One rank's step of matrices that ZeRO splits, in one process, for `benchmarks.speed.launches` to count.

The other ranks send zeros: what a step launches goes by the plan, not by what arrives. Collectives themselves are not
counted, the memory that they need is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.settings import GroupSettings
from ds_fira.observe.metrics import StepMetrics
from ds_fira.sharding.comm import Communicator, Pending
from ds_fira.sharding.geometry import matrices_of, split
from ds_fira.sharding.lowrank import answer_form
from ds_fira.sharding.lowrank.step import LowRankMatrices, turns_of
from ds_fira.sharding.plan import plan_groups
from ds_fira.sharding.refresher import Refresher
from ds_fira.sharding.split_matrix import SplitMatrix

# So rare that refreshes cost nothing, and the low-rank way is the cheaper one.
RARE = 10**6


class OneOfMany(Communicator):
    """A rank whose peers send it zeros, with the operations of a `Communicator` around its collectives."""

    def __init__(self, dp_rank: int, dp_size: int) -> None:
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.collectives = self.bytes_sent = 0

    def start_all_to_all(self, sent: Tensor, sent_counts: list[int], received_counts: list[int]) -> Pending[Tensor]:
        """As the communicator's."""
        received = sent.new_empty(sum(received_counts))
        self._count(sent)
        with _disable_current_modes():
            received.zero_()
        return Pending(lambda: received)

    def start_all_reduce(self, tensor: Tensor, keep: bool = True) -> Pending[Tensor]:
        """As the communicator's."""
        self._count(tensor)
        total = tensor.to(tensor.device, copy=keep)
        return Pending(lambda: total)


def plan(
    shapes: Sequence[tuple[int, int]], ranks: int, evenly_sharded: bool, settings: GroupSettings
) -> tuple[dict[int, SplitMatrix], int]:
    """Matrices that are each split over all ranks, by position, and the elements of a partition."""
    fragments, size = [], 0
    for index, shape in enumerate(shapes):
        own = -(-math.prod(shape) // ranks)
        parts = split(matrices_of(f"w{index}", shape, 0)[0], own, ranks)
        fragments.append({rank: replace(part, offset=part.offset + size) for rank, part in parts.items()})
        size += own
    (layout,) = plan_groups([(fragments, size)], ranks, [settings], evenly_sharded)
    return {position: replace(matrix, way="low_rank") for position, matrix in enumerate(layout.split)}, size


def step_of_a_rank(
    shapes: Sequence[tuple[int, int]],
    counted: Callable[[], AbstractContextManager[Counter[str]]],
    *,
    ranks: int = 2,
    dp_rank: int = 0,
    evenly_sharded: bool = False,
    real: Sequence[tuple[int, int]] = (),
    steps: int = 2,
    **given: Any,
) -> tuple[Counter[str], int]:
    """What a step between refreshes launches on one rank, after others, and its collectives.

    Args:
        shapes: of the matrices, each split over all ranks.
        counted: counts inside a block.
        ranks: how many.
        dp_rank: the rank.
        evenly_sharded: as at ZeRO-3.
        real: shapes that say how matrices go in turns, where those of `shapes` stand for larger ones; then
            `real_rank` is the rank of their projection.
        steps: made before.
        given: settings.
    """
    real_rank = given.pop("real_rank", None)
    given = {"rank": 4, "update_proj_gap": RARE, **given}
    settings = GroupSettings(**given)
    matrices, size = plan(shapes, ranks, evenly_sharded, settings)
    communicator = OneOfMany(dp_rank, ranks)
    numbers = {matrix.name: position for position, matrix in matrices.items()}
    group = LowRankMatrices(matrices, communicator, numbers)
    if real:
        of_the_model = GroupSettings(**{**given, "rank": real_rank})
        group.deal(turns_of(plan(real, ranks, evenly_sharded, of_the_model)[0]))
    param, refresher = Parameter(random(size, 0)), Refresher(metrics := StepMetrics(), "FiraAdam")
    state = group.allocate(param, settings, FIRA_ADAM)
    for key, value in state.items():
        if key.startswith("basis"):
            value.copy_(random(value.numel(), 1).view(value.shape) / len(value) ** 0.5)
        elif key.startswith("refresh_step"):
            value.zero_()
    names: Counter[str] = Counter()
    with torch.no_grad(), long_turns() if real else nullcontext():
        for step in range(steps + 1):
            param.grad = random(size, step + 2)
            before = communicator.collectives
            with counted() if step == steps else nullcontext(names) as names:
                for plan_of, stats, _ in group.step(param, state, settings, 1e-4, refresher, FIRA_ADAM):
                    if plan_of.owns:
                        metrics.record(stats, settings.residual_scale)
    return names, communicator.collectives - before


@contextmanager
def long_turns() -> Iterator[None]:
    """Take no turn for a short one: those of larger matrices are not, whatever stands for them."""
    before, answer_form.SHORT_TURN_NUMEL = answer_form.SHORT_TURN_NUMEL, 0
    try:
        yield
    finally:
        answer_form.SHORT_TURN_NUMEL = before


def random(size: int, seed: int) -> Tensor:
    """Numbers that go by the seed."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))
