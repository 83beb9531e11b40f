"""`check_sync_every`: a flipped bit on one rank stops every rank, with its name."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ds_fira
from ds_fira.engine.deepspeed import tensor_hash
from ds_fira.engine.deepspeed.weight_sync import refuse_partitioned_weights
from tests.distributed.zero_jobs import config
from tests.grids import once
from tests.ranks import Pools

SHAPES = [(8, 6), (6, 9), (8, 6), (5, 7)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64]


def run(
    ranks: Pools,
    world_size: int,
    stage: int,
    dtype: str,
    every: int | None,
    flip: Any,
    default: int | None = None,
    **extra: Any,
) -> list[Any]:
    """`train_with_flip` for six steps on every rank."""
    ds_config = config(stage, dtype, {**PARAMS, "check_sync_every": every}, **extra)
    return ranks.run(
        world_size,
        "train_with_flip",
        "tests.distributed.sync_jobs",
        ds_config=ds_config,
        shapes=SHAPES,
        steps=6,
        flip=flip,
        default=default,
    )


@pytest.mark.parametrize(("stage", "dtype"), once([0, 1, 2], ["fp32", "bf16", "fp16"]))
def test_a_flipped_bit_stops_every_rank_by_name(ranks: Pools, stage: int, dtype: str) -> None:
    """In step 4 on rank 1 of 3, in one bit of one weight: every rank stops there with the same sentence."""
    results = run(ranks, 3, stage, dtype, 2, (4, 1, "layers.1.weight"))
    assert [(done, compared) for done, _, compared, _ in results] == [(4, [2, 4])] * 3
    (text,) = {raised for _, raised, *_ in results}
    assert re.search(
        r"check_sync_every = 2 found at step 4 .* weights, layers\.1\.weight on rank 1 of .*: load the last checkpoint",
        text,
    )
    assert "." not in text.rstrip(".").replace("layers.1.weight", ""), "more than one sentence"


@pytest.mark.parametrize(
    ("stage", "name"), [(0, "embedding.weight"), (1, "embedding.weight"), (2, "embedding.weight"), (0, "master")]
)
def test_what_no_step_overwrites_is_found_later(ranks: Pools, stage: int, name: str) -> None:
    """A frozen weight, and stage 0's master copy, whose lowest bit bf16 does not show; two ranks have no majority."""
    results = run(ranks, 2, stage, "bf16", 3, (1, 1, name))
    (text,) = {raised for _, raised, *_ in results}
    shown = "master copy of " if name == "master" else name
    assert f"found at step 3 that the ranks no longer hold the same weights, {shown}" in text
    assert "on ranks [0, 1], of which no majority agrees" in text


def test_ranks_that_agree_train_as_without_the_check(ranks: Pools) -> None:
    """Cuts of both kinds, accumulation, offload, a wrapper of its own: never an alarm, no FiraAdam collective more."""
    for stage, dtype, extra in [
        (0, "fp16", {}),
        (1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}),
        (2, "fp32", {"gradient_accumulation_steps": 2}),
        (2, "bf16", {"zero_offload_optimizer": {"device": "cpu"}, "zero_round_robin_gradients": True}),
    ]:
        checked = run(ranks, 3, stage, dtype, 1, None, **extra)
        plain = run(ranks, 3, stage, dtype, 0, None, **extra)
        assert {raised for _, raised, *_ in checked + plain} == {""}, (stage, dtype)
        made = checked[0][0]
        assert [compared for _, _, compared, _ in checked] == [list(range(1, made + 1))] * 3
        assert [compared for _, _, compared, _ in plain] == [[]] * 3
        assert [counted for *_, counted in checked] == [counted for *_, counted in plain]


@pytest.mark.parametrize(("stage", "found"), [(0, 5), (1, 0)])
def test_stage_0_compares_by_default(ranks: Pools, stage: int, found: int) -> None:
    """Every `zero_sync.DEFAULT` steps, here 5; elsewhere it has to be asked for, and 0 is never."""
    flip = (2, 1, "embedding.weight")
    results = run(ranks, 2, stage, "bf16", None, flip, default=5)
    assert [compared for _, _, compared, _ in results] == [[found] if found else []] * 2
    (text,) = {raised for _, raised, *_ in results}
    expected = "check_sync_every = 5 (the default at stage 0; 0 switches it off) found at step 5"
    assert (expected in text) == (stage == 0)
    assert [compared for _, _, compared, _ in run(ranks, 2, stage, "bf16", 0, flip, default=5)] == [[]] * 2


def test_one_process_has_nobody_to_compare_with(ranks: Pools) -> None:
    """No hash is made there."""
    assert run(ranks, 1, 2, "fp32", 1, (2, 0, "layers.1.weight"))[0][1:3] == ("", [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_changed_element_always_changes_the_hash(dtype: torch.dtype) -> None:
    """Every bit of elements at the start, the end and about the edges of chunks and words; any shape and strides."""
    values = torch.randint(-100, 100, (3 * tensor_hash.CPU_CHUNK * tensor_hash.WORD // dtype.itemsize + 5,)).to(dtype)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    width, size = 8 * dtype.itemsize, tensor_hash.CPU_CHUNK * tensor_hash.WORD // dtype.itemsize
    seen = {int(tensor_hash.hash_tensor(values))}
    places = (0, 1, size - 1, size, 2 * size + 3, len(values) - 1)
    for place in places:
        for bit in range(width):
            mask = 1 << bit if bit < width - 1 or dtype.itemsize == 1 else -(1 << bit)
            values.view(bits)[place] ^= mask
            seen.add(int(tensor_hash.hash_tensor(values)))
            values.view(bits)[place] ^= mask
    assert len(seen) == 1 + len(places) * width
    assert int(tensor_hash.hash_tensor(values)) in seen
    shifted = torch.cat([values[:1], values])[1:]  # not where a word may begin
    assert int(tensor_hash.hash_tensor(shifted)) == int(tensor_hash.hash_tensor(values))
    grid = values[:60].view(6, 10)
    assert int(tensor_hash.hash_tensor(grid.t().contiguous().t())) == int(tensor_hash.hash_tensor(grid))
    assert int(tensor_hash.hash_tensor(values[:0])) == 0


def test_order_and_pairs_of_flips_count() -> None:
    """Two elements or chunks exchanged, all signs flipped, two sign bits of words flipped, two tensors exchanged."""
    values = torch.randn(3 * tensor_hash.CPU_CHUNK, generator=torch.Generator().manual_seed(0))
    size = tensor_hash.CPU_CHUNK
    swapped, chunks, pair = values.clone(), values.clone(), values.clone()
    swapped[[5, 9]] = values[[9, 5]]
    chunks[:size], chunks[size : 2 * size] = values[size : 2 * size], values[:size]
    pair[[1, 3]] = -values[[1, 3]]  # the highest bits of two words
    assert len({int(tensor_hash.hash_tensor(x)) for x in (values, swapped, chunks, pair, -values)}) == 5
    hashes = tensor_hash.hash_tensors([values, swapped])
    assert int(tensor_hash.combine(hashes)) != int(tensor_hash.combine(hashes.flip(0)))


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([[1, 2], [1, 2]], None),
        ([[1, 2], [1, 3], [1, 2]], "b on rank 1"),
        ([[1, 2], [9, 3], [1, 2], [1, 4], [1, 2]], "a, b on ranks 1, 3"),
        ([[1, 2], [1, 3]], "b on ranks [0, 1], of which no majority agrees"),
        ([[None, 2], [1, 3], [None, 2], [1, 2], [1, 2]], "b on rank 1"),
        ([[None, 2], [1, 2], [None, 2], [3, 2], [1, 2]], "a on rank 3"),
        ([[None, 2], [1, 2], [None, 2], [3, 2]], "a on ranks [1, 3], of which no majority agrees"),
    ],
)
def test_the_odd_ranks_are_named(rows: list[list[int | None]], text: str | None) -> None:
    """Those outside the majority of the ranks that hold the tensor, where there is one."""
    held = [{name: value for name, value in zip("ab", row, strict=True) if value is not None} for row in rows]
    assert tensor_hash.describe_difference(held) == text


def test_stage_3_and_values_without_sense_are_refused() -> None:
    """One sentence with the setting, the value and the remedy."""
    optimizer = ds_fira.FiraAdam([torch.nn.Parameter(torch.zeros(3, 3))], rank=2, check_sync_every=5)
    engine = SimpleNamespace(basic_optimizer=optimizer, zero_optimization_stage=lambda: 3)
    with pytest.raises(
        ValueError, match=r"FiraAdam: check_sync_every = 5 .* zero_optimization\.stage = 3.*set it to 0"
    ):
        refuse_partitioned_weights(engine)
    for value in (-1, True, 1.5, "often"):
        with pytest.raises(ValueError, match=r"check_sync_every = .* is not legal; .* 0 for no check"):
            ds_fira.FiraAdam([torch.nn.Parameter(torch.zeros(3, 3))], check_sync_every=value)
    with pytest.raises(ValueError, match=r"unknown setting 'check_sync'.* did you mean 'check_sync_every'"):
        ds_fira.param_groups(torch.nn.Linear(3, 3), rank=2, check_sync=4)
