"""Checkpoints of `torch.distributed.checkpoint` with FSDP2 and DDP: exact, on any number of ranks and any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_fsdp import SHAPES, TOLERANCE, alone, run
from tests.grids import full_if
from tests.ranks import Pools

SAVED = 3  # with a refresh behind it: the gap is 3, and another at the first step that follows


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether tensors by name, or by name and key, are equal to the bit."""
    tensors = [
        {
            (name, key): value
            for name, own in each.items()
            for key, value in (own if isinstance(own, dict) else {"": own}).items()
        }
        for each in (first, second)
    ]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(value, tensors[1][key]) for key, value in tensors[0].items()
    )


CASES = {
    "float32": {},
    "bfloat16": {"params": {"state_dtype": "bfloat16"}},
    "int8": {"params": {"state_dtype": "int8"}},
    "gathered": {"params": {"exact_cuts": True}},
    "normalized": {"params": {"residual": "normalized"}},
    "experts": {"kind": "experts"},
    "columns": {"shard_dim": 1},
    "behind": {"behind": True},
    "flat": {"flat": True},
    "ddp": {"ddp": True},
    "tensor parallel": {"tensor_parallel": (1, 2), "shapes": [(12, 40), (40, 12)]},
}


# The others are of forms of states that one process has, or that test_fsdp.py trains with.
IN_EVERY_RUN = ("int8", "behind", "columns")


@pytest.mark.parametrize("case", full_if(lambda case: case not in IN_EVERY_RUN, CASES))
def test_a_resumed_run_is_the_same_to_the_bit(ranks: Pools, tmp_path: Path, case: str) -> None:
    job = CASES[case]
    through = run(ranks, save=(SAVED, str(tmp_path)), **job)
    before = run(ranks, steps=SAVED, **job)[0]
    again = run(ranks, load=(SAVED, str(tmp_path)), **job)
    for result in again:
        assert same(result["loaded"], before["states"])
        assert same(result["start"], before["end"])
    for first, second in zip(through, again, strict=True):
        assert same(first["end"], second["end"])
        assert same(first["states"], second["states"])


OTHERS = [
    pytest.param(2, {"mesh": (2, 1)}, id="copies"),
    pytest.param(2, {"shard_dim": 1}, id="columns"),
    pytest.param(2, {"ddp": True}, id="ddp"),
    pytest.param(4, {"tensor_parallel": (2, 2)}, id="tensor parallel", marks=pytest.mark.full),
    pytest.param(3, {"flat": True}, id="flat", marks=pytest.mark.full),
    *(pytest.param(n, {}, id=str(n), marks=pytest.mark.full) for n in (1, 3, 4)),
    pytest.param(4, {"mesh": (2, 2)}, id="copies of shards", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("world_size", "job"), OTHERS)
def test_on_other_ranks(ranks: Pools, tmp_path: Path, world_size: int, job: dict[str, Any]) -> None:
    """What is loaded is what was saved, to the bit; the steps are those of one process that goes on with it."""
    shapes = [(12, 40), (40, 12)] if "tensor_parallel" in job else SHAPES
    run(ranks, save=(SAVED, str(tmp_path)), flat=job.get("flat", False), shapes=shapes)
    before = run(ranks, steps=SAVED, shapes=shapes)[0]
    results = run(ranks, world_size, load=(SAVED, str(tmp_path)), shapes=shapes, **job)
    _, params = alone(results[0], states=before["states"])
    for result in results:
        assert same(result["loaded"], before["states"])
        for name, weight in params.items():
            start, end = result["start"][name], result["end"][name]
            assert torch.equal(start, before["end"][name])
            assert (end - weight).norm() <= TOLERANCE * (weight - start).norm()


def test_from_zero_to_fsdp_and_back(ranks: Pools, tmp_path: Path) -> None:
    """States and weights go over to the bit, by names, and the steps between are those of one process.

    Norms have a rate of their own, for which ZeRO-2 has them in a param group that others have not.
    """
    params = {"lr": 0.01, "rank": 3, "update_proj_gap": 2, "weight_decay": 0.1, "vector_lr_scale": 0.1}
    job = {"module": "tests.distributed.whole_state_jobs", "shapes": SHAPES[:3], "params": params}
    results = ranks.run(2, "zero_to_fsdp_and_back", folder=str(tmp_path), **job)
    for found in results:
        projected = found["zero"].keys()
        assert len(projected) == 3
        assert same(found["zero"], {name: found["taken"][name] for name in projected})
        assert same(found["back"], {name: found["fsdp"][name] for name in projected})
        assert same(found["weights"][0], found["weights"][1])
        assert same(found["weights"][2], found["weights"][3])
        _, alone_with = alone({**found, "start": found["weights"][1]}, states=found["taken"])
        for name, weight in alone_with.items():
            change = (weight - found["weights"][1][name]).norm()
            assert (weight - found["weights"][2][name]).norm() <= TOLERANCE * change, name
