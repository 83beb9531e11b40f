"""`ds_fira.step_in_backward` under FSDP2: the weights of `optimizer.step()`, and one module's gradients at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fira.engine.fsdp2.backward import ShardedGradients
from tests.grids import full_if
from tests.ranks import Pools

MODULE = "tests.distributed.sharded_backward_jobs"


def same(one: dict[str, Any], other: dict[str, Any], bound: float = 0.0) -> None:
    """Weights and states are equal, to the bit or within a part of their size."""
    assert one["states"].keys() == other["states"].keys()
    pairs = [(name, value, other["weights"][name]) for name, value in one["weights"].items()]
    for name, state in one["states"].items():
        assert state.keys() == other["states"][name].keys()
        pairs += [(f"{name}: {key}", value, other["states"][name][key]) for key, value in state.items()]
    for name, left, right in pairs:
        if bound:
            assert (left - right).double().norm() <= bound * left.double().norm(), name
        else:
            assert torch.equal(left, right), name


CASES = {
    "exact": {"settings": {"exact_cuts": True}},
    "low-rank": {},
    "groups": {"decays": True},
    "copies": {"mesh": (2, 1)},
    "bf16": {"bf16": True},
    "offload": {"offload": True},
    "kept": {"kept": True},
    "together": {"separate": False},
    "pair": {"pair": True},
    "frozen": {"frozen": "blocks.1.up"},
    "module without a gradient": {"frozen": "rare.0"},
    "parts": {"parts": 2, "twice": False},
    "compiled": {"compiled": True},
    "int8": {"settings": {"state_dtype": "int8"}},
    "normalized": {"settings": {"residual": "normalized", "refresh_moments": "rotate", "stagger": True}},
    "late": {"late": 2},
}


@pytest.mark.parametrize("case", full_if(lambda case: case not in ("low-rank", "exact"), CASES))
def test_the_weights_of_step(ranks: Pools, case: str) -> None:
    for plain, released in ranks.run(2, "both", module=MODULE, **CASES[case]):
        same(plain, released)


@pytest.mark.parametrize("clip", full_if(lambda clip: clip == "parameter", ("previous", "parameter")))
def test_clipping_is_by_whole_norms(ranks: Pools, clip: str) -> None:
    job = {"clip": clip, "twice": False, "decays": True}
    (plain, released), other = ranks.run(2, "both", module=MODULE, **job)
    assert released["norms"] == other[1]["norms"]
    assert released["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    assert min(plain["norms"]) > 0.05
    same(plain, released, 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("clip", ["previous", "parameter"])
def test_a_gradient_that_is_not_finite_skips_its_parameter_alone(ranks: Pools, clip: str) -> None:
    """On every rank, a matrix; of the rest each rank its shard, and all of it where whole norms are known in time."""
    answers = ranks.run(2, "spoiled", module=MODULE, clip=clip)
    assert answers[0] == answers[1]
    kept, norm = answers[0]
    assert math.isfinite(norm)
    block = ["norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight"]
    expected = block if clip == "parameter" else ["up.weight", "down.weight"]
    assert kept == [*(f"blocks.1.{name}" for name in expected), "never.weight", "never.bias"]


@pytest.mark.parametrize("by", full_if(lambda by: by == "states", ("checkpoint", "states")))
def test_a_resume_is_to_the_bit(ranks: Pools, by: str, tmp_path: Path) -> None:
    # As with torch's own optimizers, a checkpoint loads where every parameter of the optimizer has a state.
    job = {"module": MODULE, "releases": True, "clip": "previous", "steps": 5, "frozen": "never"}
    folder = str(tmp_path) if by == "checkpoint" else None
    whole, resumed = (ranks.run(2, "train", saved=saved, folder=folder, **job)[0] for saved in (None, 3))
    same(whole, resumed)


@pytest.mark.full
@pytest.mark.parametrize("job", [{"mesh": (2, 2)}, {"mesh": (2, 2), "clip": "parameter"}, {"clip": "previous"}])
def test_four_ranks(ranks: Pools, job: dict[str, Any]) -> None:
    answers = ranks.run(4, "both", module=MODULE, **job)
    for plain, released in answers:
        same(plain, released, 1e-4 if "clip" in job else 0.0)
        same(answers[0][1], released)


def test_memory_is_shards_states_and_one_module_s_gradients(ranks: Pools) -> None:
    size, depth = 128, 12
    for (large, states), (small, alike) in ranks.run(2, "peaks", module=MODULE, size=size, depth=depth):
        one = 4 * size * size
        shards = depth * one // 2
        assert states == alike
        # Of one module weight and gradient whole, what is reduced of them, shards; of the next one the whole weight.
        assert shards + states < small < shards + states + 5 * one
        # All gradients, and no copies of what is stepped together, which would be as large again.
        assert 2 * shards + states + 5 * one < large < 2 * shards + states + 7 * one


def test_units_are_stepped_once_and_whole() -> None:
    """One with a missing gradient when the next begins; one that comes back is refused."""
    first, second, third = ([torch.zeros(1), torch.zeros(1)] for _ in range(3))
    gradients = ShardedGradients([first, second, third], "FiraAdam")
    assert list(gradients.arrive(first[0])) == []
    assert list(gradients.arrive(first[1])) == [first]
    assert list(gradients.arrive(second[0])) == []
    given = gradients.arrive(third[0])
    assert next(given) == second[:1]
    assert list(given) == []
    with pytest.raises(RuntimeError, match="FSDP2 reduced the gradients of a module in two parts"):
        list(gradients.arrive(first[1]))
    assert list(gradients.finish()) == []
    assert list(gradients.arrive(first[1])) == []
    assert list(gradients.finish()) == [first[1:]]


REFUSED = {
    "process group": "FiraAdam: process_group does not go with step_in_backward under FSDP2",
    "buckets": "FiraAdam: bucket_bytes = 1000 has no effect without process_group",
    "in part": "FiraAdam: step_in_backward trains a model that fully_shard holds in part, and 1.weight is not sharded",
    "second": "FiraAdam: a parameter of shape (8, 8) got a second gradient before optimizer.step()",
}


@pytest.mark.parametrize("what", REFUSED)
def test_one_sentence_on_every_rank(ranks: Pools, what: str) -> None:
    said = ranks.run(2, "refused", module=MODULE, what=what)
    assert said[0] == said[1]
    assert said[0].startswith(REFUSED[what]), said[0]
