"""AutoEP: the experts of a rank are one parameter, of the same name on all ranks, and train as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.autoep_net import autoep
from tests.distributed.expert_jobs import STEPS
from tests.distributed.test_experts import MODULE, PARAMS, check, check_resumes
from tests.distributed.zero_jobs import config
from tests.grids import full_if
from tests.ranks import Pools

# Ranks, stage, experts of every layer, autoep_size, further settings, clipping, the ways in which experts are cut.
CASES = {
    "one expert a rank": (2, 1, [2], 2, {}, 0.3, []),
    "several a rank": (2, 2, [4, 2], 2, {}, 0.3, []),
    "held by all, cut low-rank": (2, 2, [3], 1, {}, 0.3, ["low_rank"]),
    "stage 0": (2, 0, [4], 2, {}, 0.0, []),
    "an object": (2, 2, [4], 2, {"way": "object"}, 0.0, []),
    "four ranks, two groups of two": (4, 2, [2], 2, {}, 0.3, ["low_rank"]),
    "four ranks, gathered": (4, 1, [2, 6], 2, {"exact_cuts": True}, 0.3, ["gathered"]),
    "four ranks, one group": (4, 2, [4], 4, {}, 0.3, []),
    "four ranks at stage 0": (4, 0, [4], 2, {}, 0.0, []),
}
IN_EVERY_RUN = ("several a rank", "stage 0")


@pytest.mark.parametrize("name", full_if(lambda name: name not in IN_EVERY_RUN, CASES))
def test_experts_train_as_in_one_process(ranks: Pools, name: str) -> None:
    """Whole, cut on both ways, replicated; the router is not projected."""
    size, stage, layers, shared_by, extra, clip, ways = CASES[name]
    kwargs = {key: extra[key] for key in ("way",) if key in extra}
    params = {**PARAMS, **{key: value for key, value in extra.items() if key not in kwargs}}
    ds_config = config(stage, "fp32", params, gradient_clipping=clip, **autoep(shared_by))
    runs = ranks.run(size, "train", MODULE, ds_config=ds_config, layers=layers, **kwargs)
    check(runs, params, clip, stage)
    assert runs[0]["ways"] == ways
    assert runs[0]["metrics"]["matrix_steps"] == STEPS * len(runs[0]["projected"])
    experts = {
        f"layers.{i}.experts.w{k}[{e}]" for i, count in enumerate(layers) for k in (1, 2, 3) for e in range(count)
    }
    routers = {f"layers.{i}.router.gate.weight" for i in range(len(layers))}
    # An object is made before AutoEP's routers are there, and of the model's own linear layer.
    assert {*runs[0]["projected"]} == {"embed.weight", "out.weight", *experts, *(routers if kwargs else ())}


# Ranks, stage and another one, dtype, autoep_size and another one.
RESUMES = {
    "stage 2": (2, (2, 0), "fp32", 2, 1),
    "stage 0 in bf16": (2, (0, 1), "bf16", 2, 1),
    "stage 3": (2, (3, 2), "fp32", 2, 1),
    "four ranks": (4, (1, 3), "fp32", 4, 2),
}


@pytest.mark.parametrize("name", full_if(lambda name: name != "stage 2", RESUMES))
def test_a_resumed_run_is_the_same(ranks: Pools, name: str, tmp_path: Path) -> None:
    """To the bit, also by way of half the ranks with other experts each; nearly so with others on as many ranks."""
    size, stages, dtype, own, others = RESUMES[name]

    def run(ranks_now: int, elsewhere: bool, stage: int, **kwargs: Any) -> list[Any]:
        ds_config = config(stage, dtype, PARAMS, **autoep(others if elsewhere else own))
        return ranks.run(ranks_now, "run", MODULE, ds_config=ds_config, layers=[4], **kwargs)

    check_resumes(run, size, stages, tmp_path, 1e-5 if dtype == "fp32" else 2e-2)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 2])
def test_what_is_told_of_experts_is_of_all(ranks: Pools, stage: int) -> None:
    """Recorded factors by the numbers of experts; a changed weight is named with the experts that the ranks hold."""
    params = {**PARAMS, "record_scaling_factors": 2, "check_sync_every": 1}
    ds_config = config(stage, "fp32", params, **autoep(2))
    found = ranks.run(4, "tell", MODULE, ds_config=ds_config, layers=[4])
    names = {f"layers.0.experts.w{k}[{e}]" for k in (1, 2, 3) for e in range(4)}
    for each in found:
        assert {*each["factors"]} == {*names, "embed.weight", "out.weight"}
        assert {len(steps) for steps in each["factors"].values()} == {STEPS // 2}
        assert "no longer hold the same weights, layers.0.experts.w1[2:4]" in each["message"]
        assert each["message"] == found[0]["message"]
