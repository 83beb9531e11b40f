"""Runs of PyPI `fira` and `galore-torch` go on under DeepSpeed as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ds_fira
from tests.distributed.released_jobs import released_groups, released_run
from tests.distributed.resize_jobs import rows
from tests.distributed.zero_jobs import Net, config
from tests.ranks import Pools

SHAPES = [(8, 6)] * 3 + [(6, 12)] * 3 + [(6, 6), (3, 40)]
STOP, END = 5, 10
FIRA = {"rank": 2, "update_proj_gap": 3, "alpha": 1.0, "proj_type": "std"}
GALORE = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
OURS = {"rank": 2, "update_proj_gap": 3, "lr": 0.01, "weight_decay": 0.1, "target_modules": ["layers"]}
AS_GALORE = {**OURS, "alpha": 0.25, "residual": "none"}


def assert_continued(result: dict[str, Any]) -> None:
    assert result["error"] == ""
    assert result["losses"] == pytest.approx(result["expected_losses"], rel=1e-5)
    for name, weight in result["expected"].items():
        assert (result["weights"][name] - weight).norm() < 1e-5 * weight.norm().clamp(min=1e-6), name


@pytest.mark.parametrize(
    ("kind", "stage", "world_size"), [("fira", 2, 2), ("fira", 0, 2), ("fira", 1, 3), ("galore", 2, 3)]
)
def test_a_released_run_goes_on(ranks: Pools, kind: str, stage: int, world_size: int) -> None:
    settings, ours = (FIRA, OURS) if kind == "fira" else (GALORE, AS_GALORE)
    results = ranks.run(
        world_size,
        "continued",
        module="tests.distributed.released_jobs",
        kind=kind,
        ds_config=config(stage, "fp32", ours),
        shapes=SHAPES,
        steps=END,
        stop=STOP,
        settings=settings,
        by_name=stage == 0,
    )
    for result in results:
        assert_continued(result)


@pytest.mark.parametrize("stage", [2, 3])
def test_at_full_rank(ranks: Pools, stage: int) -> None:
    """What the default would step unprojected goes on as the released code had it."""
    results = ranks.run(
        2,
        "continued",
        module="tests.distributed.released_jobs",
        kind="fira",
        ds_config=config(stage, "fp32", {**OURS, "rank": 6}),
        shapes=SHAPES,
        steps=END,
        stop=STOP,
        settings={**FIRA, "rank": 6},
        by_name=True,
    )
    for result in results:
        assert_continued(result)


@pytest.mark.parametrize("rank", [2, 6])
def test_alone(rank: int) -> None:
    """Also at a rank above sides of matrices, which the released code projects all the same."""
    settings = {**FIRA, "rank": rank}
    state, weights, losses, _ = released_run("fira", SHAPES, END, STOP, settings)
    model = Net(SHAPES)
    model.load_state_dict(weights)
    optimizer = ds_fira.FiraAdam(released_groups(model, settings), lr=0.01, weight_decay=0.1)
    ds_fira.load_released_state(optimizer, state, released_groups(model, {}))
    for step in range(STOP, END):
        loss = model(rows(step))
        loss.backward()
        assert float(loss.detach()) == pytest.approx(losses[step], rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ours": {"rank": 3}}, "rank = 3 for .*, whose state in the checkpoint was made with 2"),
        ({"ours": {"proj_type": "reverse_std"}}, "proj_type = 'reverse_std' for "),
        ({"drop": 1}, r"groups of \[4, 8\] parameters, and groups of \[8\] were named"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(ranks: Pools, options: dict[str, Any], message: str) -> None:
    results = ranks.run(
        2,
        "continued",
        module="tests.distributed.released_jobs",
        kind="fira",
        ds_config=config(2, "fp32", {**OURS, **options.get("ours", {})}),
        shapes=SHAPES,
        steps=3,
        stop=2,
        settings=FIRA,
        drop=options.get("drop", 0),
    )
    for result in results:
        with pytest.raises(ValueError, match=message):
            raise ValueError(result["error"])


def test_eight_bit_and_full_projections_are_refused() -> None:
    state, _, _, _ = released_run("fira", SHAPES, 3, 2, FIRA)
    model = Net(SHAPES)
    groups = released_groups(model, FIRA)
    optimizer = ds_fira.FiraAdam(groups, lr=0.01)
    first = state["param_groups"][1]["params"][0]
    state["state"][first]["projector"].ortho_matrix = [torch.zeros(3, 2), torch.zeros(2, 3)]
    with pytest.raises(ValueError, match=r"the projector of .* holds list"):
        ds_fira.load_released_state(optimizer, state, released_groups(model, {}))
    del state["state"][first]["exp_avg"]
    with pytest.raises(ValueError, match="has no tensor exp_avg"):
        ds_fira.load_released_state(optimizer, state, released_groups(model, {}))
    with pytest.raises(ValueError, match="none of the model's"):
        ds_fira.load_released_state(optimizer, state, [[nn.Parameter(torch.zeros(1))]], model)
