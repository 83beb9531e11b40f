"""The layout of real models: nothing split where ranks divide the layers, balanced state, the bytes of splits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.communication.layout import BYTES, plan_llama
from benchmarks.communication.partition import LLAMAS
from ds_fira.sharding.plan import GroupLayout
from ds_fira.sharding.projection import state_numel
from tests.distributed.zero_jobs import config
from tests.ranks import Pools


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("model", LLAMAS)
def test_llama_state_is_balanced(model: str, ranks: int) -> None:
    """The largest rank's state is at most 1.1 x (total / ranks); all ranks together hold what one process would."""
    plan = plan_llama(model, ranks)
    padding = BYTES * 2 * 2 * ranks  # of the AdamW group's buffer
    assert plan.formula <= sum(plan.by_rank) <= plan.formula + padding
    assert plan.imbalance <= 1.1
    if LLAMAS[model][3] % ranks == 0:
        assert plan.cut_matrices == 0


def test_paper_saving_for_1b() -> None:
    """The formula gives the paper's 61.1% smaller states for LLaMA 1B at rank 512."""
    hidden, intermediate, _, layers, rank = LLAMAS["1b"]
    attention, mlp = (hidden, hidden), (hidden, intermediate)
    projected = layers * (4 * state_numel(attention, rank) + 3 * state_numel(mlp, rank))
    full = layers * (4 * 2 * math.prod(attention) + 3 * 2 * math.prod(mlp))
    others = 2 * (2 * 32000 * hidden)
    assert 1 - (projected + others) / (full + others) == pytest.approx(0.611, abs=0.0005)


def test_counted_bytes_of_split_matrices(ranks: Pools) -> None:
    """Whole steps on three ranks, by hand: the borrowed fragments, gradient and weight, and back.

    (6, 9): 54 elements in partitions of 18, three fragments. (4, 4): 16 elements in partitions of 6, fragments of 6, 6
    and 4. The first has the larger state and goes to rank 0; the second to the least loaded of the others, rank 1.
    """
    params = {"lr": 0.01, "rank": 2, "update_proj_gap": 2, "exact_cuts": True}
    results = ranks.run(3, "train", ds_config=config(2, "fp32", params), shapes=[(6, 9), (4, 4)], steps=5)
    layouts: list[GroupLayout] = results[0]["layouts"]
    fragments = [[(rank, f.numel) for rank, f in matrix.fragments] for layout in layouts for matrix in layout.split]
    assert fragments == [[(0, 18), (1, 18), (2, 18)], [(0, 6), (1, 6), (2, 4)]]
    assert [matrix.owner for layout in layouts for matrix in layout.split] == [0, 1]
    element = 4
    lent = [6, 18, 18 + 4]  # to the owners: rank 0 of the second matrix, rank 1 of the first, rank 2 of both
    borrowed = [18 + 18, 6 + 4, 0]  # returned by the owners
    expected = [5 * element * (2 * out + back) for out, back in zip(lent, borrowed, strict=True)]
    assert [result["bytes_sent"] for result in results] == expected
    assert [result["collectives"] for result in results] == [5 * 2 * 2] * 3  # there and back, for both groups


def test_no_bytes_where_nothing_is_split(ranks: Pools) -> None:
    """Matrices that divide by the ranks: no collective of ours in any step, refresh steps included."""
    params = {"lr": 0.01, "rank": 2, "update_proj_gap": 2}
    shapes = [(6, 8)] * 4 + [(8, 4)] * 2
    results = ranks.run(2, "train", ds_config=config(2, "bf16", params), shapes=shapes, steps=5)
    assert [(result["collectives"], result["bytes_sent"]) for result in results] == [(0, 0), (0, 0)]
    assert results[0]["metrics"]["refreshes"] == 3 * 6


def test_measured_bytes_agree_with_the_plan(ranks: Pools) -> None:
    """A live engine's states on three ranks add up to the formula, but for counters and padding."""
    params = {"lr": 0.01, "rank": 3, "update_proj_gap": 2, "exact_cuts": True}
    shapes = [(8, 6), (6, 9), (5, 7), (6, 9)]
    results = ranks.run(3, "train", ds_config=config(2, "fp32", params), shapes=shapes, steps=3)
    memory: dict[str, Any] = results[0]["memory"]
    assert all(result["memory"] == memory for result in results)
    counters = 2 * 8 * len(shapes) + 3 * 8  # step and refresh_step by matrix; AdamW's step by rank
    padding = 2 * 4 * 2 * 3
    held = sum(memory["optimizer_state_bytes"])
    assert memory["paper_formula_bytes"] + counters <= held <= memory["paper_formula_bytes"] + counters + padding
    projected = sum(state_numel(shape, 3) for shape in shapes)
    others = 2 * (11 * 6 + 6 + 6 + 11 * 6)
    assert memory["paper_formula_bytes"] == 4 * (projected + others)
    assert memory["adamw_bytes"] == 4 * (2 * sum(math.prod(shape) for shape in shapes) + others)
