"""What lies where under FSDP2: torch's own cuts, tiles of every matrix, and even shares of the states."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as torchs
from torch.distributed.tensor.placement_types import Shard

from ds_fira.core.settings import GroupSettings
from ds_fira.engine.fsdp2.attach import _places
from ds_fira.engine.fsdp2.shards import Shards, blocks
from ds_fira.sharding.plan import plan_groups
from ds_fira.sharding.split_matrix import state_numel

# Hidden size, inner size, layers and rank of the paper's LLaMA models; 32,000 tokens.
LLAMAS = {
    "60m": (512, 1376, 8, 128),
    "350m": (1024, 2736, 24, 256),
    "1b": (2048, 5461, 24, 512),
    "7b": (4096, 11008, 32, 1024),
}


@pytest.mark.parametrize("size", [1, 5, 6, 7, 8, 13])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_blocks_are_torch_s(size: int, ranks: int) -> None:
    for rank, block in enumerate(blocks(size, ranks)):
        shape, offset = torchs((size, 3), (ranks,), lambda _, rank=rank: rank, [Shard(0)], False)
        assert (len(block), block.start if len(block) else size) == (shape[0], min(offset[0], size))


@pytest.mark.parametrize("shape", [(13, 7), (2, 9), (5, 6, 4), (3, 4, 5)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_fragments_tile_every_matrix(shape: tuple[int, ...], dim: int, ranks: int) -> None:
    """And what a rank holds is what torch gives it: elements by their numbers; a rank steps rows that it holds."""
    whole, shards = torch.arange(torch.Size(shape).numel()).view(shape), Shards.of_dimension("w", shape, dim, ranks)
    for rank in range(ranks):
        chunks = whole.chunk(ranks, dim)
        torchs_own = chunks[rank].reshape(-1).tolist() if rank < len(chunks) else []
        assert [number for held in shards.held(rank) for number in held] == torchs_own
        assert shards.steps_held == (dim == 0 or len(shape) == 3 or ranks == 1)
        assert not shards.steps_held or shards.stepped(rank) == shards.held(rank)
    for index, matrix in enumerate(shards.fragments(lambda rank: 100 * rank)):
        spans = [(part.start, part.stop) for _, part in sorted(matrix.items())]
        for rank, part in matrix.items():
            first = index * shape[-2] * shape[-1]
            stepped = [number for elements in shards.stepped(rank) for number in elements]
            own = stepped[part.offset - 100 * rank :][: part.numel]
            assert own == list(range(first + part.start, first + part.stop))
        assert spans[0][0] == 0
        assert spans[-1][1] == shape[-2] * shape[-1]
        assert all(first[1] == second[0] for first, second in pairwise(spans))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", LLAMAS)
def test_states_are_shared_evenly(name: str, ranks: int) -> None:
    """The fullest rank holds at most 1.1 of an even share, and all together what one process does."""
    hidden, inner, layers, rank = LLAMAS[name]
    shapes = [(hidden, hidden)] * 4 * layers + [(inner, hidden)] * 2 * layers + [(hidden, inner)] * layers
    shards = [Shards.of_dimension(f"w{number}", shape, 0, ranks) for number, shape in enumerate(shapes)]
    flat = SimpleNamespace(shards=shards, communicator=SimpleNamespace(dp_size=ranks, dp_rank=0))
    _, fragments, size = _places(flat)
    settings = GroupSettings.of({"rank": rank, "update_proj_gap": 200})
    (layout,) = plan_groups([(fragments, size)], ranks, [settings], evenly_sharded=True)
    rest = [(32000, hidden)] * 2 + [(hidden,)] * (2 * layers + 1)
    unprojected = [Shards.of_dimension(f"r{number}", shape, 0, ranks) for number, shape in enumerate(rest)]
    held = [
        sum(matrix.state_numel(each) for matrix in layout.split)
        + sum(2 * len(elements) for other in unprojected for elements in other.held(each))
        for each in range(ranks)
    ]
    alone = sum(state_numel(shape, rank) for shape in shapes) + sum(2 * torch.Size(shape).numel() for shape in rest)
    scalars = len(shapes) * (ranks - 1)  # the limiter's norm, on every rank
    assert alone <= sum(held) <= alone + scalars
    assert max(held) <= 1.1 * sum(held) / ranks
