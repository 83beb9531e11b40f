"""Properties of the geometry and of the plans over random shapes and numbers of ranks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_fira.core.settings import GroupSettings
from ds_fira.optim.settings import check_params
from ds_fira.sharding.geometry import MatrixShard, matrices_of, split
from ds_fira.sharding.plan import plan_groups, plan_hash, split_by_size, split_evenly

shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8)
ranks = st.integers(1, 7)
# Of the plans of `test_the_hash_of_a_plan_is_that_of_version_0_1_0`, not evenly sharded and evenly sharded.
HASHES = (
    "15844e79cc8d7f7304116cdd6d99c96ab5f7081abbedaf2c30ef22bf1e7f3b21",
    "23deb3b869ab2efdd4a3daf42fdd347a278de8767683b9d8e96a4d0b85c26985",
)


def buffer_of(shapes: list[tuple[int, int]], ranks: int) -> tuple[list[MatrixShard], int]:
    """The matrices of a ZeRO buffer, back to back, and its partition size: padded to twice the ranks."""
    matrices, begin = [], 0
    for index, shape in enumerate(shapes):
        matrices += matrices_of(f"w{index}", shape, begin)
        begin += math.prod(shape)
    return matrices, math.ceil(begin / (2 * ranks)) * 2


@settings(max_examples=200, deadline=None, derandomize=True)
@given(shapes, ranks)
def test_fragments_tile_every_matrix_and_alias_the_buffer(shapes: list[tuple[int, int]], ranks: int) -> None:
    """Writing through the fragments of all partitions fills the buffer's matrices, each element once."""
    matrices, size = buffer_of(shapes, ranks)
    buffer = torch.zeros(size * ranks)
    partitions = [buffer[rank * size : (rank + 1) * size] for rank in range(ranks)]
    for matrix in matrices:
        fragments = split(matrix, size, ranks)
        bounds = [(fragment.start, fragment.stop) for fragment in fragments.values()]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == math.prod(matrix.shape)
        assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
        for rank, fragment in fragments.items():
            view = fragment.fragment(partitions[rank])
            assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            view += torch.arange(fragment.start, fragment.stop) + 1.0
            if fragment.is_whole:
                whole = fragment.matrix(partitions[rank])
                assert whole.shape == matrix.shape
                assert whole.data_ptr() == view.data_ptr()
    for matrix in matrices:
        expected = torch.arange(math.prod(matrix.shape)) + 1.0
        assert torch.equal(matrix.fragment(buffer), expected)
    assert buffer.count_nonzero() == sum(math.prod(shape) for shape in shapes)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(shapes, min_size=1, max_size=3), ranks)
def test_plans_place_every_matrix_once(groups: list[list[tuple[int, int]]], ranks: int) -> None:
    """Whole on one rank or split with one owner among the sharers, in consecutive partitions."""
    whole = [buffer_of(group, ranks) for group in groups]
    buffers = [([split(matrix, size, ranks) for matrix in matrices], size) for matrices, size in whole]
    chosen = [GroupSettings.of(check_params({"rank": 2, "exact_cuts": True}))] * len(groups)
    layouts = plan_groups(buffers, ranks, chosen)
    assert plan_hash(layouts) == plan_hash(plan_groups(buffers, ranks, chosen))
    for (matrices, _), layout in zip(whole, layouts, strict=True):
        placed = [shard.name for held in layout.unsplit for shard in held] + [matrix.name for matrix in layout.split]
        assert sorted(placed) == sorted(matrix.name for matrix in matrices)
        owned = [matrix for rank in range(ranks) for matrix in layout.gathered_by(rank)]
        assert sorted(matrix.name for matrix in owned) == sorted(matrix.name for matrix in layout.split)
        for matrix in layout.split:
            assert matrix.owner in [rank for rank, _ in matrix.fragments]
            assert len(matrix.fragments) > 1
            assert list(matrix.sharers) == [rank for rank, _ in matrix.fragments]
            assert [matrix.fragment(rank) for rank in matrix.sharers] == [shard for _, shard in matrix.fragments]
        in_turns = [matrix for turn in layout.gathered_turns for matrix in turn]
        assert sorted(matrix.name for matrix in in_turns) == sorted(matrix.name for matrix in layout.split)


def test_the_hash_of_a_plan_is_that_of_version_0_1_0() -> None:
    """Checkpoints hold hashes of plans; these were computed by version 0.1.0, with both ways in the plan."""
    matrices, size = buffer_of([(12, 40), (9, 7), (40, 12), (4, 4)], 3)
    buffers = [([split(matrix, size, 3) for matrix in matrices], size)] * 2
    chosen = [GroupSettings.of(check_params({"rank": 2, "exact_cuts": exact})) for exact in (False, True)]
    for evenly_sharded, expected in enumerate(HASHES):
        layouts = plan_groups(buffers, 3, chosen, bool(evenly_sharded))
        assert {matrix.way for layout in layouts for matrix in layout.split} == {"gathered", "low_rank"}
        assert plan_hash(layouts) == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from("abcd"), max_size=30), ranks, st.one_of(st.none(), st.integers(0, 4)))
def test_split_evenly_keeps_everything_and_divides(kinds: list[str], ranks: int, most: int | None) -> None:
    """Every item once, one kind to a group, one group of each kind not divisible at most, none above the cap."""
    most_of = None if most is None else (lambda kind: most)
    groups = split_evenly([(kind, (kind, i)) for i, kind in enumerate(kinds)], ranks, most_of)
    if most is None:
        assert len(groups) <= 2 * len(set(kinds))
    else:
        assert max((len(group) for group in groups), default=0) <= max(1, most) * ranks
    assert sorted(item for group in groups for item in group) == sorted((kind, i) for i, kind in enumerate(kinds))
    for kind in "abcd":
        sizes = [len(group) for group in groups if group[0][0] == kind]
        assert sum(size % ranks != 0 for size in sizes) <= 1
        assert all(size < ranks for size in sizes if size % ranks)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 20), max_size=30), st.integers(0, 40))
def test_split_by_size_keeps_the_order_and_the_limit(sizes: list[int], limit: int) -> None:
    """Every item once and in order; a run over the limit is one item; no run has room for the next one's first."""
    runs = split_by_size([(size, (i, size)) for i, size in enumerate(sizes)], limit)
    assert [item for run in runs for item in run] == list(enumerate(sizes))
    totals = [sum(size for _, size in run) for run in runs]
    assert all(total <= limit or len(run) == 1 for run, total in zip(runs, totals, strict=True))
    assert all(total + after[0][1] > limit for total, after in zip(totals, runs[1:], strict=False))


def test_other_dimensions_cannot_be_projected() -> None:
    """A vector in a projected group is named in the error."""
    with pytest.raises(ValueError, match=r"bias of shape \(4,\).*without 'rank'"):
        matrices_of("bias", (4,))
