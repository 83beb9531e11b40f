"""How the collectives of a low-rank step overlap: as few round trips as the plan says, and not a bit changed by it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from threading import Barrier, Lock
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import BASIS
from ds_fira.observe.metrics import StepMetrics
from ds_fira.sharding.geometry import matrices_of, split
from ds_fira.sharding.lowrank import answer_form
from ds_fira.sharding.lowrank import step as low_rank_step
from ds_fira.sharding.lowrank import turn as low_rank_turn
from ds_fira.sharding.lowrank.step import LowRankMatrices, turns_of
from ds_fira.sharding.lowrank.turn import overlapped
from ds_fira.sharding.plan import plan_groups
from ds_fira.sharding.refresher import Refresher
from ds_fira.sharding.split_matrix import SplitMatrix
from tests.unit.sharding.threads import Threads

# Both sides, cuts in rows, a matrix of which most ranks hold a part of one row.
SHAPES = [(12, 40), (40, 12), (2, 300), (31, 17), (26, 37)]
GIVEN = {"lr": 0.01, "rank": 3, "update_proj_gap": 3, "alpha": 0.5, "weight_decay": 0.1}
STEPS = 5  # refreshes at 0 and 3
# (elements of a turn, turns at once, whether payloads are read late): the order of one collective after another; two
# turns of one matrix each, whose collectives overlap; the same, and what travels is read as late as can be.
ALONE, PAIRS, LATE = (1, 1, False), (1, 2, False), (1, 2, True)
TOGETHER = (10**9, 2, False)


def planned(ranks: int, evenly_sharded: bool) -> tuple[dict[int, SplitMatrix], int]:
    """Matrices that are each cut over all ranks, their slices back to back, and the elements of a partition."""
    fragments, offset = [], 0
    for index, shape in enumerate(SHAPES):
        size = -(-math.prod(shape) // ranks)
        (matrix,) = matrices_of(f"w{index}", shape, 0)
        parts = split(matrix, size, ranks)
        fragments.append({rank: replace(part, offset=part.offset + offset) for rank, part in parts.items()})
        offset += size
    rare = GroupSettings(**{**GIVEN, "update_proj_gap": 10**6})
    (layout,) = plan_groups([(fragments, offset)], ranks, [rare], evenly_sharded)
    # The thin one would be gathered.
    return {position: replace(matrix, way="low_rank") for position, matrix in enumerate(layout.split)}, offset


def train(
    monkeypatch: pytest.MonkeyPatch,
    order: tuple[int, int, bool],
    changed: dict[str, Any],
    *,
    ranks: int = 3,
    evenly_sharded: bool = False,
    fault: bool = False,
    only: slice = slice(None),
    computing: Lock | None = None,
    before: Callable[[LowRankMatrices, dict[str, Tensor], int, int], None] | None = None,
) -> list[tuple[list[Tensor], list[int], list[int]]]:
    """By rank: weights and states after every step, and the round trips and collectives of every step.

    Args:
        monkeypatch: sets the order.
        order: elements of a turn, turns at once, and whether payloads are read late.
        changed: settings.
        ranks: how many.
        evenly_sharded: as at ZeRO-3.
        fault: whether gradients are as they should not be: of rank 1 in the second and in the fourth step, in which the
            residual of the new basis is rounding; of two matrices not finite in the third.
        only: which of the matrices.
        computing: held by the rank that computes, where one may at a time.
        before: called before every step, with the matrices, the states, the rank and the number of the step.
    """
    numel, at_once, late = order
    monkeypatch.setattr(low_rank_step, "MAX_STEP_NUMEL", numel)
    monkeypatch.setattr(low_rank_turn, "AT_ONCE", at_once)
    matrices, size = planned(ranks, evenly_sharded)
    matrices = dict(list(matrices.items())[only])
    settings = GroupSettings(**{**GIVEN, **changed})
    generator = torch.Generator().manual_seed(0)
    weights, *grads = (torch.randn(ranks, size, generator=generator) for _ in range(1 + STEPS))
    for position, matrix in matrices.items() if fault else ():
        spans = [(rank, slice(f.offset, f.offset + f.numel)) for rank, f in matrix.fragments]
        for step in range(1, STEPS, 2):
            whole = torch.cat([grads[step][span] for span in spans]).view(matrix.shape)
            whole = whole[:, :1] @ whole[:1]
            for (_, fragment), span in zip(matrix.fragments, spans, strict=True):
                grads[step][span] = whole.view(-1)[fragment.start : fragment.stop]
        if position in (1, 4):
            grads[2][spans[0]] = math.nan
    numbers = {matrix.name: position for position, matrix in matrices.items()}
    barrier, box = Barrier(ranks), [()] * ranks

    def run(rank: int) -> tuple[list[Tensor], list[int], list[int]]:
        communicator, refresher = Threads(rank, barrier, box, late), Refresher(StepMetrics(), "FiraAdam")
        communicator.computing = computing
        param = torch.nn.Parameter(weights[rank].clone())
        one = LowRankMatrices(matrices, communicator, numbers)
        state = one.allocate(param, settings, FIRA_ADAM)
        found, trips, started = [], [0], [0]
        with torch.no_grad(), computing or nullcontext():
            for number, grad in enumerate(grads):
                if before is not None:
                    before(one, state, rank, number)
                param.grad = grad[rank].clone()
                one.step(param, state, settings, 1e-4, refresher, FIRA_ADAM)
                found += [param.detach().clone(), *(state[key].clone() for key in sorted(state))]
                trips.append(communicator.round_trips)
                started.append(communicator.started)
        return found, *([b - a for a, b in itertools.pairwise(c)] for c in (trips, started))

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


@pytest.mark.parametrize(
    ("changed", "evenly_sharded"),
    [
        ({"alpha": 1.0}, False),
        ({"alpha": 1.0, "refresh_moments": "rotate", "subspace": "gram"}, True),
        ({"scaling": "matrix", "formulation": "paper", "stagger": True}, False),
        ({"residual": "normalized", "scaling": "matrix", "limiter": "growth"}, True),
        ({"residual": "none"}, True),
        ({"residual": "normalized"}, False),
    ],
    ids=str,
)
def test_no_bit_goes_by_the_order(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], evenly_sharded: bool
) -> None:
    """All in one turn, one matrix a turn, one turn at a time: the same weights and states after every step.

    So they are where a turn is too long for answers in parts.
    """
    given = {"changed": changed, "evenly_sharded": evenly_sharded, "fault": True}
    expected = train(monkeypatch, ALONE, **given)
    assert len(expected[0][0]) > STEPS * (1 + 4 * len(SHAPES))
    assert not all(torch.equal(a, b) for a, b in zip(expected[0][0], expected[1][0], strict=False))
    for order, short in ((LATE, 2**20), (TOGETHER, 2**20), (TOGETHER, 0)):
        monkeypatch.setattr(answer_form, "SHORT_TURN_NUMEL", short)
        for (before, *_), (after, *_) in zip(expected, train(monkeypatch, order, **given), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), (order, short)


# Of steps 1, 2 and 4, which have no refresh: round trips one behind the other, and collectives. Each phase waited for
# by itself, it was one for the sums of a group and three for each turn, four where rows of P are borrowed. Two are the
# fewest of a turn: R needs the gradients of all ranks, and C needs R.
LIMITER, NO_LIMITER = {}, {"residual": "normalized"}


@pytest.mark.parametrize(
    ("changed", "evenly_sharded", "order", "trips", "collectives"),
    [
        (LIMITER, False, TOGETHER, 2, 4),  # 4 one after another
        (NO_LIMITER, False, TOGETHER, 2, 4),
        (LIMITER, True, TOGETHER, 2, 1 + 3 + 3),  # 5 one after another; the left and the right have a turn each
        (NO_LIMITER, True, TOGETHER, 2, 1 + 3 + 3),
        (LIMITER, False, PAIRS, 6, 1 + 5 * 3),  # 16 one after another
        (LIMITER, True, PAIRS, 6, 1 + 3 + 4 + 3 * 3),  # 18 one after another; the first turn keeps its rows of P
    ],
    ids=str,
)
def test_round_trips(
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    evenly_sharded: bool,
    order: tuple[int, int, bool],
    trips: int,
    collectives: int,
) -> None:
    """Counted on every rank alike, whatever it holds, in steps between refreshes."""
    for _, found, started in train(monkeypatch, order, changed, evenly_sharded=evenly_sharded):
        assert [found[step] for step in (1, 2, 4)] == [trips] * 3
        assert [started[step] for step in (1, 2, 4)] == [collectives] * 3


def test_a_long_turn_sends_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """C and phi of a left matrix behind the sums, a round trip more, where its bytes take longer than that."""
    monkeypatch.setattr(answer_form, "SHORT_TURN_NUMEL", 0)
    for _, found, _ in train(monkeypatch, TOGETHER, LIMITER, evenly_sharded=True):
        assert [found[step] for step in (1, 2, 4)] == [3] * 3


@pytest.mark.parametrize("in_place", [True, False])
def test_a_basis_from_outside_is_sent_to_those_who_keep_its_rows(
    monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """One rank's basis is written to, or its states are replaced, as a load does: as if no rank had kept any rows."""

    def meddle(one: LowRankMatrices, state: dict[str, Tensor], rank: int, step: int) -> None:
        if step == 2 and rank == 1:
            for key in [key for key in state if key.startswith(BASIS)]:
                state[key] = state[key].mul_(-1.0) if in_place else -state[key]

    def meddle_and_forget(one: LowRankMatrices, state: dict[str, Tensor], rank: int, step: int) -> None:
        meddle(one, state, rank, step)
        one._kept.forget(range(len(SHAPES)))

    given = {"evenly_sharded": True, "changed": LIMITER}
    found, expected, ordinary = (
        train(monkeypatch, TOGETHER, before=before, **given) for before in (meddle, meddle_and_forget, None)
    )
    for (after, *_), (same, *_), (other, *_) in zip(found, expected, ordinary, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(after, same, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(after, other, strict=True))
    # R of those matrices once more, in that step alone.
    assert [a - b for a, b in zip(found[0][1], ordinary[0][1], strict=True)] == [0, 0, 2, 0, 0]


def test_round_trips_of_a_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step, R once more, and two for the bases: with those that are replaced, or without."""
    for changed in ({}, {"subspace": "randomized"}):
        for _, found, _ in train(monkeypatch, TOGETHER, changed, only=slice(1)):
            assert found[3] == found[1] + 1 + 2


def test_a_residual_that_is_rounding_takes_few_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the right the sum alone; on the left R there, the sum, and the answers once more."""
    for only, more in ((slice(3, 4), 1), (slice(1), 3)):
        ordinary, faulty = (
            train(monkeypatch, TOGETHER, {"alpha": 1.0}, fault=fault, only=only)[0] for fault in (False, True)
        )
        assert faulty[1][3] == ordinary[1][3] + more


def test_generators_take_turns() -> None:
    """Two at a time, and a new one goes as far as it gets before the other waits."""
    said: list[str] = []

    def turn(name: str, stops: int) -> Iterator[None]:
        for place in range(stops):
            said.append(f"{name}{place}")
            yield

    overlapped(turn(name, stops) for name, stops in [("a", 3), ("b", 1), ("c", 2), ("d", 1)])
    assert said == ["a0", "b0", "a1", "c0", "a2", "c1", "d0"]


def test_a_large_group_has_two_turns_and_a_small_one_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its sizes; and matrices that wait for rows of P first have a turn of their own."""
    matrices, _ = planned(3, False)
    assert turns_of(matrices) == [list(matrices)]
    monkeypatch.setattr(low_rank_step, "MIN_TURN_NUMEL", 10)
    assert len(turns_of(matrices)) == 2
    assert sorted(position for turn in turns_of(matrices) for position in turn) == list(matrices)
    even, _ = planned(3, True)
    first, second = turns_of(even)
    assert [even[position].side for position in (*first, *second)] == ["right"] * len(first) + ["left"] * len(second)
    monkeypatch.setattr(low_rank_step, "MAX_STEP_NUMEL", 1)
    assert all(len(turn) == 1 for turn in turns_of(even))
