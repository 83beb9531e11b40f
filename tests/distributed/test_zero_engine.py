"""FiraAdam in a DeepSpeed engine: stage 0, groups, schedulers, faults, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ds_fira
from ds_fira.optim.presets import PRESETS, ModelSize, transferred_scale
from tests.distributed.zero_jobs import config
from tests.grids import once
from tests.ranks import Pools

SHAPES = [(8, 6), (6, 9), (8, 6), (5, 7)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3}


@pytest.mark.parametrize(("world_size", "dtype"), once([1, 2, 3], ["fp32", "bf16", "fp16"]))
def test_stage_0(ranks: Pools, world_size: int, dtype: str) -> None:
    """Replicated states: all ranks agree to the bit, and with one process; each basis is computed once for all."""
    results = ranks.run(
        world_size, "train", ds_config=config(0, dtype, {**PARAMS, "weight_decay": 0.1}), shapes=SHAPES, steps=7
    )
    first = results[0]
    for other in results[1:]:
        for i, states in enumerate(first["state"]):
            for mine, theirs in zip(states, other["state"][i], strict=True):
                assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert sum(result["decompositions"] for result in results) == first["metrics"]["refreshes"] == 3 * len(SHAPES)

    params = [[torch.nn.Parameter(p.clone()) for p in group] for group in first["start"]]
    groups = [{**g["settings"], "params": p} for g, p in zip(first["groups"], params, strict=True)]
    optimizer = ds_fira.FiraAdam(groups)
    for gradients in first["gradients"]:
        for i, seen in gradients.items():
            for param, grad in zip(params[i], seen, strict=True):
                param.grad = grad
        if gradients:
            optimizer.step()
    for result in results:
        for expected, weights in zip(params, result["weights"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, weights, strict=True))


@pytest.mark.parametrize("way", ["json", "object", "callable"])
def test_weights_do_not_move_before_training(ranks: Pools, way: str) -> None:
    """The wrapper of stage 0 steps with zero gradients as it is built: neither decay nor a step count comes of it."""
    settings = {**PARAMS, "lr": 1.0, "weight_decay": 0.5}
    ds_config = config(0, "bf16", settings)
    if way == "json":
        result = ranks.run(1, "train", ds_config=ds_config, shapes=SHAPES, steps=1)[0]
    else:
        del ds_config["optimizer"]
        result = ranks.run(
            1,
            "train_with_object",
            ds_config=ds_config,
            shapes=SHAPES,
            steps=1,
            settings=settings,
            as_callable=way == "callable",
        )[0]
    torch.manual_seed(0)
    from tests.distributed.zero_jobs import Net

    fresh = [p.detach().bfloat16().float() for p in Net(SHAPES).parameters()]
    start = [p for group in result["start"] for p in group]
    assert sorted(float(p.abs().sum()) for p in start) == sorted(float(p.abs().sum()) for p in fresh)
    assert all(int(state["step"]) == 1 for group in result["state"] for state in group)


def test_user_groups_survive(ranks: Pools) -> None:
    """A user's own lr, weight decay and name go to every group that comes of theirs."""
    results = ranks.run(2, "train_with_groups", ds_config=config(2, "fp32", PARAMS), shapes=SHAPES, steps=2)
    found = {
        (group["settings"].get("name"), group["settings"]["lr"], group["settings"]["weight_decay"], name)
        for group in results[0]["groups"]
        for name, _, _ in group["members"]
    }
    ranked = {name for g in results[0]["groups"] if "rank" in g["settings"] for name, _, _ in g["members"]}
    assert found == {
        ("first", 0.02, 0.3, "layers.0.weight"),
        ("first", 0.02, 0.3, "layers.1.weight"),
        ("first", 0.02, 0.3, "norm.weight"),
        (None, 0.01, 0.0, "layers.2.weight"),
        (None, 0.01, 0.0, "layers.3.weight"),
        (None, 0.01, 0.0, "embedding.weight"),
        (None, 0.01, 0.0, "lm_head.weight"),
        (None, 0.01, 0.0, "norm.bias"),
    }
    assert ranked == {f"layers.{i}.weight" for i in range(4)}


@pytest.mark.parametrize(
    ("params", "preset", "expected"),
    [
        ({"lr": 0.02}, None, (0.02, 1.0)),
        ({"lr": 0.02}, "recommended", (0.02, transferred_scale(ModelSize(width=6, depth=3, rank=2)))),
        ({"residual_scale": 0.5}, "recommended", (PRESETS["recommended"].settings["lr"], 0.5)),
    ],
    ids=str,
)
def test_param_groups_as_model_parameters(
    ranks: Pools, params: dict[str, float], preset: str | None, expected: tuple[float, float]
) -> None:
    """Groups that say themselves what is projected are split by shape; their preset gives what the JSON leaves out."""
    ds_config = config(2, "fp32", {**params, "update_proj_gap": 3})
    shapes = [(8, 6), (6, 9), (8, 6)]
    results = ranks.run(2, "train_with_param_groups", ds_config=ds_config, shapes=shapes, steps=2, preset=preset)
    given = [[(g["settings"]["lr"], g["settings"]["residual_scale"]) for g in result["groups"]] for result in results]
    assert given == [[expected] * 4] * 2
    found = [
        (group["settings"].get("rank"), group["settings"]["weight_decay"], [name for name, _, _ in group["members"]])
        for group in results[0]["groups"]
    ]
    assert found == [
        (2, 0.1, ["layers.0.weight", "layers.2.weight"]),
        (2, 0.1, ["layers.1.weight"]),
        (None, 0.1, ["embedding.weight", "lm_head.weight"]),
        (None, 0.0, ["norm.weight", "norm.bias"]),
    ]


def test_target_modules_in_json(ranks: Pools) -> None:
    """Only the modules named are projected; the rest is AdamW."""
    params = {**PARAMS, "target_modules": ["layers.1", "layers.3"]}
    results = ranks.run(2, "train", ds_config=config(2, "fp32", params), shapes=SHAPES, steps=2)
    ranked = {name for g in results[0]["groups"] if "rank" in g["settings"] for name, _, _ in g["members"]}
    assert ranked == {"layers.1.weight", "layers.3.weight"}
    assert results[0]["metrics"]["projected_matrices"] == 2


def test_scheduler_reaches_every_group(ranks: Pools) -> None:
    """A DeepSpeed scheduler sets the lr of all groups, however many there are of one the user made."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.4, "warmup_num_steps": 4}}
    ds_config = config(2, "fp32", PARAMS, scheduler=scheduler)
    results = ranks.run(2, "train", ds_config=ds_config, shapes=SHAPES, steps=6)
    assert len(results[0]["lr"]) > 2
    assert results[0]["lr"] == pytest.approx([0.4] * len(results[0]["lr"]))


@pytest.mark.parametrize(("when", "value", "stage"), once([0, 3], [float("nan"), float("inf"), 0.0, "rank 1"], [0, 2]))
def test_faulty_gradients_pass(ranks: Pools, stage: int, value: float | str, when: int) -> None:
    """One matrix's gradient is NaN, infinite, zero or of rank 1, at the first step or at a refresh: training goes on.

    Stage 0 in fp32 and stage 2 with check_grad_overflow off are where DeepSpeed lets such gradients through.
    """
    dtype = "fp32" if stage == 0 else "bf16"
    extra: dict[str, Any] = {} if stage == 0 else {"bf16": {"check_grad_overflow": False}}
    results = ranks.run(
        3,
        "train",
        ds_config=config(stage, dtype, PARAMS, **extra),
        shapes=SHAPES,
        steps=6,
        faults={when: ("layers.1.weight", value)},
    )
    for result in results:
        assert all(len(gradients) > 0 for gradients in result["gradients"]), "DeepSpeed kept the gradient from us"
        for state in (state for group in result["state"] for state in group):
            assert all(torch.isfinite(tensor).all() for tensor in state.values())
        for name, weight in result["module"].items():
            assert torch.isfinite(weight).all(), name
            assert torch.equal(weight, results[0]["module"][name]), "ranks drifted apart"
    faulty = [
        grad
        for i, gradients in results[0]["gradients"][when].items()
        for grad in gradients
        if "rank" in results[0]["groups"][i]["settings"]
    ]
    if value not in (0.0, "rank 1") and stage == 0:
        assert not all(torch.isfinite(grad).all() for grad in faulty)
    # It trained on after the fault, the faulty matrix too.
    assert results[0]["losses"][-1] < results[0]["losses"][0]
    steps = [int(s["step"].max()) for r in results for g in r["state"] for s in g if "basis" in s and s["step"].numel()]
    assert max(steps) == 6
    assert min(steps) >= 5


@pytest.mark.parametrize(
    ("stage", "save_at", "options"),
    [
        (0, 2, {}),
        (1, 3, {}),
        *(
            pytest.param(stage, save_at, {}, marks=pytest.mark.full)  # stages 2 and 3 with other settings below
            for stage, save_at in [(0, 3), (1, 2), (2, 2), (2, 3), (3, 2), (3, 3)]
        ),
        (3, 2, {"exact_cuts": True}),
        (3, 3, {"state_dtype": "int8", "subspace": "randomized", "refresh_moments": "rotate"}),
        pytest.param(2, 3, {"exact_cuts": True}, marks=pytest.mark.full),
        pytest.param(0, 3, {"state_dtype": "bfloat16"}, marks=pytest.mark.full),
        (2, 3, {"state_dtype": "bfloat16", "subspace": "randomized", "refresh_moments": "rotate"}),
        (2, 2, {"state_dtype": "int8", "subspace": "gram", "stagger": True}),
    ],
)
def test_resume_is_exact(ranks: Pools, tmp_path: Path, stage: int, save_at: int, options: dict[str, Any]) -> None:
    """Saved at a refresh or between two, loaded into a new engine on as many ranks: the same run to the bit."""
    ds_config = config(stage, "bf16", {**PARAMS, "update_proj_gap": 2, **options})
    assert (
        ranks.run(2, "resume", ds_config=ds_config, shapes=SHAPES, steps=5, save_at=save_at, folder=str(tmp_path))
        == [True] * 2
    )
