"""FSDP2 without DeepSpeed: the weights and states of one process, and no state held twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_fira
from ds_fira.optim.registry import TYPES
from tests.grids import full_if
from tests.ranks import Pools

MODULE = "tests.distributed.fsdp_jobs"
# Both sides, rows that two and three ranks share unevenly, an empty shard on the last of four, one row.
SHAPES = [(12, 40), (40, 12), (13, 37), (12, 40), (5, 17), (1, 9)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3, "alpha": 0.5, "weight_decay": 0.1}
# Of the weight change; as at ZeRO-3.
TOLERANCE = 1e-5


def run(ranks: Pools, world_size: int = 2, params: dict[str, Any] | None = None, **job: Any) -> list[dict[str, Any]]:
    settings = {**PARAMS, **(params or {})}
    return ranks.run(world_size, "train", module=MODULE, **{"shapes": SHAPES, "settings": settings, **job})


def alone(
    result: dict[str, Any], kind: str = "FiraAdam", states: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The optimizer and the weights of one process that makes the same steps with the gradients that the ranks saw.

    Args:
        result: of one rank.
        kind: the name of the optimizer.
        states: by name, with which it begins; None for none.
    """
    params = {name: torch.nn.Parameter(weight.clone()) for name, weight in result["start"].items()}
    groups = [{**settings, "params": [params[name] for name in names]} for settings, names in result["groups"]]
    optimizer = TYPES[kind](groups)
    for name, state in (states or {}).items():
        optimizer.state[params[name]].update({key: value.clone() for key, value in state.items()})
    for seen in result["gradients"]:
        for name, param in params.items():
            param.grad = seen.get(name)
        optimizer.step()
    return optimizer, params


def check(
    results: list[dict[str, Any]], *, low_rank: bool = True, kind: str = "FiraAdam", copies: int | None = 1
) -> None:
    """Weights and states as in one process: to the bit, of matrices on the low-rank way but for rounding.

    Args:
        results: of all ranks.
        low_rank: whether some matrix goes the low-rank way.
        kind: the name of the optimizer.
        copies: how often all ranks together hold every state; None where some are held once and others more often.
    """
    optimizer, params = alone(results[0], kind)
    ways = results[0]["ways"]
    assert ("low_rank" in ways.values()) == low_rank
    for name, param in params.items():
        weight, start = param.detach(), results[0]["start"][name]
        change = (weight - start).norm()
        assert change > 0.0, name
        states, mine = results[0]["states"][name], optimizer.state[param]
        assert states.keys() == mine.keys()
        assert all(result["names"][name] == set(mine) for result in results)
        for result in results:
            if ways.get(name) == "low_rank":
                assert (weight - result["end"][name]).norm() <= TOLERANCE * change, name
            else:
                assert torch.equal(weight, result["end"][name]), name
        for key, value in mine.items():
            assert states[key].shape == value.shape
            assert states[key].dtype == value.dtype
            if ways.get(name) == "low_rank":
                close = (states[key] - value).double().norm() <= TOLERANCE * value.double().norm()
                assert close, (name, key)
            else:
                assert torch.equal(states[key], value), (name, key)
        if name in results[0]["low_rank"]:
            for result in results:
                assert torch.equal(result["low_rank"][name].basis.to(states["basis"].dtype), states["basis"])
    for result in results:
        first, *keys = result["printed"]
        assert all(key in first for key in keys)
    expected = ds_fira.metrics(optimizer)
    for key in ("matrix_steps", "refreshes", "projected_matrices", "limiter_activations"):
        assert results[0]["metrics"][key] == expected[key], key
    lone = sum(
        value.numel()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key.startswith(("basis", "exp_avg"))
    )
    if copies is not None:
        assert sum(result["held"] for result in results) == copies * lone


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 3, 4))])
@pytest.mark.parametrize("given", ["model", "params", "groups"])
def test_low_rank_way(ranks: Pools, world_size: int, given: str) -> None:
    check(run(ranks, world_size, given=given), low_rank=world_size > 1)


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 3, 4))])
def test_gathered_to_the_bit(ranks: Pools, world_size: int) -> None:
    check(run(ranks, world_size, {"exact_cuts": True}), low_rank=False)


CASES = {
    "columns": {"shard_dim": 1},
    "copies": {"mesh": (2, 1)},
    "bf16": {"bf16": True},
    "accumulation": {"accumulation": 3},
    "clip": {"clip": 0.01},
    "compiled": {"compiled": True},
    "offload": {"offload": True},
    "frozen": {"frozen": ("layers.1.weight", "norm.bias")},
    "experts": {"kind": "experts"},
    "expert columns": {"kind": "experts", "shard_dim": 1},
    "bf16 states": {"params": {"state_dtype": "bfloat16", "exact_cuts": True}},
    "rotated": {"params": {"refresh_moments": "rotate", "subspace": "randomized", "stagger": True}},
    "normalized": {"params": {"residual": "normalized"}},
    "galore": {"optimizer": "GaLoreAdam"},
}


# Settings of the step that ZeRO-3 has the same way, whose states test_fsdp_checkpoint.py carries over.
OF_THE_STEP = ("rotated", "normalized", "galore", "bf16 states", "expert columns")


@pytest.mark.parametrize("case", full_if(lambda case: case in OF_THE_STEP, CASES))
def test_ways_to_train(ranks: Pools, case: str) -> None:
    job = CASES[case]
    results = run(ranks, **job)
    low_rank = case not in ("copies", "experts", "expert columns", "bf16 states")
    check(results, low_rank=low_rank, kind=job.get("optimizer", "FiraAdam"), copies=2 if case == "copies" else 1)


@pytest.mark.parametrize(
    ("world_size", "mesh"),
    [(2, (1, 2)), *(pytest.param(*case, marks=pytest.mark.full) for case in ((2, (2, 1)), (4, (2, 2))))],
)
@pytest.mark.parametrize("exact", [False, True])
def test_tensor_parallel_beside_it(ranks: Pools, world_size: int, mesh: tuple[int, int], exact: bool) -> None:
    """Weights cut by columns and rows over one dimension of the mesh, and by rows over the other."""
    shapes = [(12, 40), (40, 12), (16, 24)]
    results = run(ranks, world_size, {"exact_cuts": exact}, tensor_parallel=mesh, shapes=shapes)
    assert all(len(result["ways"]) == 3 for result in results)
    check(results, low_rank=not exact, copies=None)


@pytest.mark.full
@pytest.mark.parametrize("job", [{"mesh": (2, 2)}, {"mesh": (2, 2), "shard_dim": 1}, {"kind": "experts"}])
def test_four_ranks(ranks: Pools, job: dict[str, Any]) -> None:
    """Two replicas of two shards; five experts over four ranks."""
    check(run(ranks, 4, **job), low_rank="mesh" in job, copies=2 if "mesh" in job else 1)


def test_gradients_that_are_placed_otherwise(ranks: Pools) -> None:
    assert ranks.run(2, "replicated_gradients", module=MODULE) == [True, True]


@pytest.mark.parametrize("job", [{}, pytest.param({"shard_dim": 1}, marks=pytest.mark.full)])
def test_what_has_no_gradient_is_left_alone(ranks: Pools, job: dict[str, Any]) -> None:
    """As in one process, also where a basis is due, and before there is one; a matrix as what is not projected."""
    first, second = ("layers.0.weight", "layers.1.weight", "norm.weight"), ("layers.1.weight", "layers.2.weight")
    results = run(ranks, unused={0: first, 3: second}, **job)
    assert not {*first} & results[0]["gradients"][0].keys()
    check(results)


REFUSED = {
    "other settings": "FiraAdam: ranks [1] planned another layout than rank 0; build the same model with the same "
    "settings on every rank.",
    "record": "FiraAdam: record_scaling_factors = 2 is not supported with parameters sharded by FSDP2; remove it",
    "capturable": "FiraAdam: capturable = True is not supported with parameters sharded by FSDP2",
    "two cuts": "FiraAdam: experts.weight of shape (5, 6, 7) is placed as ('S(0)', 'S(1)'), and a parameter may be cut",
    "two meshes": "FiraAdam: layers.1.weight is sharded over ranks [0, 1] and other matrices over [",
    "first version": "ds_fira: the model is sharded by FullyShardedDataParallel, which flattens parameters",
    "late group": "FiraAdam param group: the parameters are sharded, and which rank steps what was settled",
    "other parameters": "ds_fira: the param groups hold other parameters than at the first step",
    "other rank": "FiraAdam: rank = 2 for layers.0.weight, whose state in the checkpoint was made with 3; set rank",
    "share": "FiraAdam: this state dict is a rank's share of a run under ZeRO; load that checkpoint into an engine at",
    "other shapes": "FiraAdam: the state of layers.0.weight of shape (12, 8) has basis of shape (7, 3) where (8, 3)",
}


@pytest.mark.parametrize("what", REFUSED)
def test_one_sentence_on_every_rank(ranks: Pools, what: str) -> None:
    said = ranks.run(2, "refused", module=MODULE, what=what)
    assert said[0] == said[1]
    assert said[0].startswith(REFUSED[what]), said[0]
