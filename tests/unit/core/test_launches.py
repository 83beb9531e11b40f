"""How many operations and kernels a step launches with the kernels; counted in the interpreter, whatever the sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.speed.launches import (
    FEED_FORWARD,
    HIDDEN,
    LAYER,
    LAYER_7B,
    LAYERS_7B,
    RANK_7B,
    counted,
    partition,
    separate,
    split,
    unprojected,
    zero3,
)
from benchmarks.speed.split_launches import plan
from ds_fira.core import kernels, quantization
from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.batches import MAX_BATCH
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import allocate, matrix_states, state_views
from ds_fira.core.step import MatrixTask, update
from ds_fira.sharding.lowrank.step import turns_of
from tests.grids import once
from tests.unit.core.kernel_cases import random, random_basis

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("kernels_allowed"),
    # What the interpreter's NumPy says of zero by zero outside of a matrix.
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]

# Of the batch: two allocations, seven kernels, and one more for 8-bit states; two more where products are in bfloat16.
MOST_OF_A_BATCH = 12
# Where matrices do not lie at equal distances: the table that says where they are.
TABLE = 2
# The step counts on the host, the kernel, and the table where gradients have moved.
MOST_OF_ADAMW = 3
# Of a matrix that ZeRO splits, alone: the sums of all ranks, two memories, what travels, and the kernels between.
MOST_OF_A_SPLIT = 20
# Of a turn of such matrices of two kinds, without what adds the numbers of each to the metrics.
MOST_OF_A_TURN = 25
WIDE, TALL = (HIDDEN, FEED_FORWARD), (FEED_FORWARD, HIDDEN)
# Not at equal distances.
MIXED = [WIDE, TALL, WIDE, WIDE, TALL]
FORMS: list[dict[str, Any]] = [
    {},
    {"scaling": "matrix", "formulation": "paper", "weight_decay": 0.1, "residual_warmup": 9},
    {"scaling": "none", "limiter": "none", "eps": 0.0},
    {"residual": "normalized"},
    {"residual": "normalized", "scaling": "matrix", "limiter": "growth", "residual_beta": 0.0},
    {"residual": "none"},
]


@pytest.mark.parametrize(
    ("shape", "state_dtype", "form"), once([WIDE, TALL], ["float32", "bfloat16", "int8"], FORMS), ids=str
)
def test_a_batch_launches_a_dozen(shape: tuple[int, int], state_dtype: str, form: dict[str, Any]) -> None:
    names = separate([(2, *shape)], steps=1, state_dtype=state_dtype, **form)
    assert 6 < names.total() <= MOST_OF_A_BATCH, names


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_products_in_bfloat16_round_the_basis_once(state_dtype: str) -> None:
    """One kernel and an allocation more, for all products and all matrices; none where it is stored so."""
    names = separate([(2, *WIDE)], steps=1, state_dtype=state_dtype, matmul_precision="bfloat16")
    assert names["_cast"] == (state_dtype == "float32")
    assert 6 < names.total() <= MOST_OF_A_BATCH, names


def test_a_batch_has_at_most_so_many_matrices() -> None:
    """Then another batch begins."""
    names = separate([(MAX_BATCH + 1, 16, 16)], steps=1)
    assert names["_project"] == names["_apply_update"] == 2
    assert names.total() <= 2 * MOST_OF_A_BATCH, names


@pytest.mark.parametrize(
    "state_dtype", [*(pytest.param(each, marks=pytest.mark.full) for each in ("float32", "bfloat16")), "int8"]
)
def test_matrices_of_their_own_are_batches(state_dtype: str) -> None:
    """Whose gradients are new in every step: two shapes, so two batches."""
    names = separate(MIXED, steps=1, state_dtype=state_dtype)
    assert names["_project"] == 2
    assert names.total() <= 2 * (MOST_OF_A_BATCH + TABLE) < 0.1 * 73 * len(MIXED), names


def test_a_partition_launches_a_batch_for_each_shape() -> None:
    """Wherever the matrices of a shape lie; and a fragment under AdamW."""
    names = partition(MIXED, fragment=100, steps=1)
    assert names["_project"] == 2
    assert names.total() <= 2 * MOST_OF_A_BATCH + MOST_OF_ADAMW, names


@pytest.mark.full
def test_a_partition_of_7b_launches_a_few() -> None:
    """28 matrices, as of LLaMA-7B on 8 ranks."""
    names = partition(LAYER * 4, fragment=100)
    assert names.total() <= 4 * MOST_OF_A_BATCH + MOST_OF_ADAMW <= 80, names


@pytest.mark.parametrize("state_dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full), "int8"])
def test_a_parameter_under_adamw_is_one_kernel(state_dtype: str) -> None:
    """Of 5,000 elements, enough to be stored as the setting says."""
    names = partition([TALL], fragment=5000, steps=1, state_dtype=state_dtype)
    assert names["_adamw"] == 1
    assert names.total() <= MOST_OF_A_BATCH + MOST_OF_ADAMW, names


def test_a_capturable_step_counts_on_the_device() -> None:
    """Of matrices nothing more is launched; of a parameter under AdamW a kernel in place of the host's count."""
    usual, capturable = (partition([TALL], fragment=100, steps=1, capturable=each) for each in (False, True))
    more, less = capturable - usual, usual - capturable
    assert dict(more) == {"aten.empty.memory_format": 1, "_adamw_sizes": 1}
    assert dict(less) == {"aten._foreach_add_.Scalar": 1}


def test_a_capturable_group_under_adamw_is_two_kernels() -> None:
    """However many tensors, of which each has a count of its own on the device; memory for their sizes beside it."""
    names = unprojected([(16,), (48,), (4, 8), (16,)], steps=1, capturable=True)
    assert (names["_adamw_sizes"], names["_adamw"]) == (1, 1)
    assert names.total() <= MOST_OF_ADAMW + 1, names


@pytest.mark.parametrize("state_dtype", ["float32", pytest.param("int8", marks=pytest.mark.full)])
def test_a_group_under_adamw_is_one_kernel(state_dtype: str) -> None:
    """However many tensors of whole 16-byte units, whatever their sizes."""
    names = unprojected([(16,), (48,), (4, 8), (16,)], steps=1, state_dtype=state_dtype)
    assert names["_adamw"] == 1
    assert names.total() <= MOST_OF_ADAMW, names


@pytest.mark.parametrize("state_dtype", [pytest.param("float32", marks=pytest.mark.full), "int8"])
def test_one_task_of_a_batch_is_its_matrices(state_dtype: str) -> None:
    """Tensors with a leading dimension, as one task: the bits of the matrices by themselves, at a batch's launches."""
    count, settings = 3, GroupSettings(rank=4, state_dtype=state_dtype)
    results = []
    for batched in (True, False):
        weight, grad = random(count, *TALL, seed=5), random(count, *TALL)
        state = allocate(weight, [TALL] * count, settings, True)
        state["basis"].copy_(random_basis((count,), HIDDEN, 4))
        state["refresh_step"].zero_()
        views = matrix_states(state, [TALL] * count, settings, True, FIRA_ADAM)
        if batched:
            # Found out by a launch, once, and a table that all steps share.
            assert kernels.supports(weight)
            for stored in views[0].moments.values():
                quantization.read(stored)
            task = MatrixTask(weight, grad, state_views(state, "right", index=slice(0, count)), settings, 1e-4)
            with counted() as names:
                stats = update(task)
            assert 6 < names.total() <= MOST_OF_A_BATCH, names
            assert stats.residual_sq.shape == stats.limiter_divisor.shape == stats.grad_finite.shape == (count,)
            assert stats.low_rank_sq.shape == (count, TALL[0])
        else:
            for index, view in enumerate(views):
                update(MatrixTask(weight[index], grad[index], view, settings, 1e-4))
        results.append([weight, *state.values()])
    for together, alone in zip(*results, strict=True):
        assert torch.equal(together, alone)
    assert not torch.equal(results[0][0], random(count, *TALL, seed=5))


@pytest.mark.parametrize(
    ("shape", "given"),
    [
        (TALL, {}),
        (WIDE, {}),
        (TALL, {"evenly_sharded": True}),
        (WIDE, {"evenly_sharded": True}),
        # Cut inside rows: two borrowed rows, two edges.
        ((FEED_FORWARD + 1, HIDDEN), {"ranks": 3, "dp_rank": 1}),
        pytest.param((HIDDEN - 1, FEED_FORWARD), {}, marks=pytest.mark.full),
        pytest.param(WIDE, {"dp_rank": 1}, marks=pytest.mark.full),
        pytest.param(WIDE, {"evenly_sharded": True, "ranks": 8}, marks=pytest.mark.full),
        pytest.param(WIDE, {"scaling": "matrix", "state_dtype": "bfloat16"}, marks=pytest.mark.full),
        pytest.param(TALL, {"evenly_sharded": True, "residual": "normalized"}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_a_split_matrix_launches_twenty(shape: tuple[int, int], given: dict[str, Any]) -> None:
    """On one rank, in a whole step, its collectives aside."""
    names = split([shape], steps=1, **given)
    assert 6 < names.total() <= MOST_OF_A_SPLIT, names


@pytest.mark.parametrize("shape", [TALL, pytest.param(WIDE, marks=pytest.mark.full)])
def test_split_matrices_alike_are_a_batch(shape: tuple[int, int]) -> None:
    """Eight launch what one does, and add their numbers to the metrics of those that own them."""
    names = split([shape] * 8, steps=1, evenly_sharded=True)
    assert names["_project"] == names["_apply_update"] == 1
    assert names["_tally"] == 4
    assert names.total() <= MOST_OF_A_SPLIT + 3, names


def test_a_turn_of_two_kinds_launches_a_few() -> None:
    """As most turns of LLaMA-7B at stage 3; so all of them together launch few thousand."""
    names = split(LAYER[3:5], steps=1, ranks=8, evenly_sharded=True)
    assert names["_project"] == 2
    assert names.total() - names["_tally"] <= MOST_OF_A_TURN, names
    planned, _ = plan(LAYER_7B * LAYERS_7B, 8, True, GroupSettings(rank=RANK_7B, update_proj_gap=10**6))
    turns, owned = turns_of(planned), len(planned) // 8
    assert len(turns) > 50
    assert all(len({planned[position].shape for position in turn}) <= 2 for turn in turns)
    assert len(turns) * MOST_OF_A_TURN + owned + MOST_OF_ADAMW < 5000


@pytest.mark.full
def test_7b_at_stage_3_launches_few_thousand() -> None:
    """224 matrices, all of them split over 8 ranks."""
    names = zero3()
    assert 500 < names.total() < 5000, names
