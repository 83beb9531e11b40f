"""What a step allocates beyond low-rank tensors, counted by torch's allocator."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

import ds_fira
from benchmarks.memory.allocation import peak_bytes
from tests.reference.harness import with_a_rank

CPU = torch.device("cpu")
# R and the direction; with compressed states both moments too.
HELD = {"float32": 2, "bfloat16": 4, "int8": 4}


def peak(shape: tuple[int, int], rank: int | None, dtype: torch.dtype, grad_dtype: torch.dtype, **settings) -> int:
    """Peak bytes of a step after the first, which makes the basis."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02).to(dtype))
    param.grad_dtype = None
    group = {"params": [param]} if rank is None else {"params": [param], "rank": rank}
    optimizer = ds_fira.FiraAdam(with_a_rank(group), lr=1e-3, weight_decay=0.1, subspace="gram", **settings)
    param.grad = torch.randn(shape, generator=generator).to(grad_dtype)
    optimizer.step()
    param.grad = torch.randn(shape, generator=generator).to(grad_dtype)
    return peak_bytes(optimizer.step, CPU)


def test_the_count_sees_what_is_held_at_once() -> None:
    kept = []
    assert peak_bytes(lambda: kept.append(torch.zeros(1000) + torch.zeros(1000)), CPU) == 12000
    assert peak_bytes(lambda: [torch.zeros(1000).sum() for _ in range(5)], CPU) < 4000 + 1000


@pytest.mark.parametrize("shape", [(512, 1376), (1376, 512), (1024, 1024)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_a_step_holds_no_more_than_a_twentieth_of_a_matrix(shape, dtype, grad_dtype) -> None:
    """Beyond R and the direction, at the shapes of LLaMA 60M and 350M; a second float32 copy would show as 100%."""
    rank = 128
    low_rank = 4 * rank * max(shape)
    beyond = peak(shape, rank, dtype, grad_dtype) - HELD["float32"] * low_rank
    assert beyond <= 0.05 * shape[0] * shape[1] * dtype.itemsize


def test_bfloat16_weights_are_stepped_in_blocks() -> None:
    """Three float32 blocks of the smallest height, 8 rows of 1024, are the most beside a weight in bfloat16."""
    shape, rank = (1024, 2048), 64
    beyond = peak(shape, rank, torch.bfloat16, torch.bfloat16) - 2 * 4 * rank * 2048
    assert beyond <= 0.06 * shape[0] * shape[1] * 2


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", pytest.param("int8", marks=pytest.mark.full)])
def test_adamw_holds_blocks_alone(state_dtype: str) -> None:
    """An embedding: nothing in float32, decoded blocks of both moments where they are compressed."""
    shape = (12000, 512)
    assert peak(shape, None, torch.float32, torch.float32, state_dtype=state_dtype) <= 0.05 * 4 * shape[0] * shape[1]


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_compressed_states_are_decoded_for_one_matrix_at_a_time(state_dtype: str) -> None:
    shape, rank = (1024, 2048), 64
    low_rank = HELD[state_dtype] * 4 * rank * 2048 + 4 * rank * 1024  # the basis too
    beyond = peak(shape, rank, torch.float32, torch.float32, state_dtype=state_dtype) - low_rank
    assert beyond <= 0.05 * shape[0] * shape[1] * 4


@pytest.mark.parametrize("shape", [(96, 200), (200, 96)], ids=str)
def test_a_step_multiplies_twice(shape: tuple[int, int]) -> None:
    """Two products of 2 m n r operations: G onto the basis and one back. The released code makes three."""
    rank = 16
    param = torch.nn.Parameter(torch.randn(shape))
    optimizer = ds_fira.FiraAdam([{"params": [param], "rank": rank}], lr=1e-3)
    param.grad = torch.randn(shape)
    optimizer.step()
    # The counter knows addmm, not its form in place.
    in_place = {torch.ops.aten.addmm_: lambda self, left, right, *_, **__: addmm_flop(self, left, right)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as flops:
        optimizer.step()
    assert flops.get_total_flops() == 2 * 2 * shape[0] * shape[1] * rank
