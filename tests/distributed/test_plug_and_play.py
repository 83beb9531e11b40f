"""Fira around RMSProp and around rules of users under ZeRO: Algorithm 2 of the paper on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_fira
from ds_fira.core.algorithms import ALGORITHMS
from ds_fira.tools.dry_run import plan_run
from tests.distributed.rule_jobs import FiraAdaGrad, FiraLion, FiraNormalized, alone
from tests.distributed.zero_jobs import Net, config
from tests.grids import half
from tests.ranks import Pools

STEPS, GAP, LR = 6, 2, 0.01


SHAPES = [(8, 6)] * 3 + [(6, 12)] * 3 + [(6, 6), (3, 40)]


PARAMS = {"rank": 2, "update_proj_gap": GAP, "lr": 0.003, "alpha": 0.5, "weight_decay": 0.1}


PARAMS |= {"target_modules": ["layers"]}


KINDS = [ds_fira.FiraRMSProp, FiraLion, FiraAdaGrad]


JOBS = "tests.distributed.rule_jobs"


def ds_config(kind: type, stage: int = 2, dtype: str = "fp32", **params: Any) -> dict[str, Any]:
    return config(stage, dtype, {**PARAMS, **params}, optimizer={"type": kind.__name__})


def same_run(found: dict[str, Any], losses: list[float], weights: dict[str, Tensor], tolerance: float) -> None:
    assert found.get("error", "") == ""
    assert found["losses"] == pytest.approx(losses, rel=tolerance)
    for name, weight in weights.items():
        assert (found["weights"][name] - weight).norm() < tolerance * weight.norm().clamp(min=1e-6), name


@pytest.mark.parametrize(
    ("kind", "stage", "params"),
    [
        (FiraLion, 2, {}),
        *(pytest.param(kind, 2, {}, marks=pytest.mark.full) for kind in KINDS if kind is not FiraLion),
        (ds_fira.FiraRMSProp, 0, {}),
        (ds_fira.FiraRMSProp, 1, {"exact_cuts": True, "scaling": "matrix", "formulation": "paper"}),
        (ds_fira.FiraRMSProp, 2, {"scaling": "matrix", "formulation": "paper", "refresh_moments": "rotate"}),
        (FiraAdaGrad, 2, {"refresh_moments": "rotate", "proj_type": "reverse_std"}),
        (FiraAdaGrad, 3, {"refresh_moments": "rotate"}),
    ],
    ids=str,
)
def test_under_zero_it_is_one_process_with_the_whole_batch(
    ranks: Pools, tmp_path: Path, kind: type, stage: int, params: dict[str, Any]
) -> None:
    """On two ranks with cut matrices either way, stopped and resumed between."""
    losses, weights = alone(kind, SHAPES, STEPS, {**PARAMS, **params})
    # A sign turns over where its argument is rounding.
    tolerance = 1e-3 if kind is FiraLion else 1e-5
    options = {"module": JOBS, "ds_config": ds_config(kind, stage, **params), "shapes": SHAPES}
    first = ranks.run(2, "run", first=0, last=3, save=str(tmp_path), **options)[0]
    if stage in (1, 2):
        assert ("low_rank" in first["ways"]) != ("exact_cuts" in params), first["ways"]
    for found in ranks.run(2, "run", first=3, last=STEPS, load=str(tmp_path), seed=3, **options):
        same_run(found, losses[3:], weights, tolerance)


@pytest.mark.parametrize("kind", [ds_fira.FiraRMSProp, FiraAdaGrad])
def test_from_one_rank_to_two_and_back(ranks: Pools, tmp_path: Path, kind: type) -> None:
    losses, weights = alone(kind, SHAPES, STEPS, PARAMS)
    folders = [str(tmp_path / name) for name in "ab"]
    options = {"module": JOBS, "shapes": SHAPES, "ds_config": ds_config(kind)}
    ranks.run(1, "run", first=0, last=3, save=folders[0], **options)
    ranks.run(2, "run", first=3, last=5, load=folders[0], save=folders[1], seed=3, **options)
    for found in ranks.run(1, "run", first=5, last=STEPS, load=folders[1], seed=5, **options):
        same_run(found, losses[5:], weights, 1e-5)
    other = {**options, "ds_config": config(2, "fp32", PARAMS)}
    (found,) = ranks.run(1, "run", first=5, last=6, load=folders[1], **other)
    assert f"FiraAdam: the checkpoint was made by {kind.__name__}" in found["error"]


@pytest.mark.parametrize(("kind", "state_dtype"), half([ds_fira.FiraRMSProp, FiraLion], ["float32", "bfloat16"]))
def test_a_resumed_run_is_the_same_to_the_bit(ranks: Pools, tmp_path: Path, kind: type, state_dtype: str) -> None:
    settings = ds_config(kind, 2, "bf16", refresh_moments="rotate", state_dtype=state_dtype)
    options = {"ds_config": settings, "shapes": SHAPES, "steps": 5, "save_at": 3, "folder": str(tmp_path)}
    assert ranks.run(2, "resume", module=JOBS, **options) == [True, True]


def test_a_rule_that_is_not_elementwise(ranks: Pools) -> None:
    """Sees matrices whole even where ZeRO cuts them; what is not projected cannot be taken apart."""
    losses, weights = alone(FiraNormalized, SHAPES, STEPS, PARAMS, frozen=True)
    options = {"module": JOBS, "shapes": SHAPES}
    for found in ranks.run(2, "run_frozen", ds_config=ds_config(FiraNormalized), steps=STEPS, **options):
        assert set(found["ways"]) == {"gathered"}
        same_run(found, losses, weights, 1e-5)
    (whole, _), (plain,) = (
        alone(FiraNormalized, SHAPES, 4, PARAMS),
        ranks.run(1, "run", ds_config=ds_config(FiraNormalized, 0), first=0, last=4, **options),
    )
    assert plain["losses"] == pytest.approx(whole, rel=1e-5)
    cases = [(ds_config(FiraNormalized, stage), None) for stage in (1, 2, 3)]
    for stage, (kind, text) in zip((1, 2, 3), ranks.run(1, "try_to_build", cases=cases, **options)[0], strict=True):
        assert kind == "ValueError"
        assert f"FiraNormalized: zero_optimization.stage = {stage} takes the parameters that are not projected" in text


def test_memory_is_what_the_rule_keeps(ranks: Pools) -> None:
    results = ranks.run(2, "train", module=JOBS, ds_config=ds_config(ds_fira.FiraRMSProp), shapes=SHAPES, steps=2)
    planned = plan_run(Net(SHAPES), 2, 2, ALGORITHMS["FiraRMSProp"], **PARAMS)
    assert results[0]["memory"]["optimizer_state_bytes"] == [
        planned.state_bytes(rank, torch.float32) for rank in (0, 1)
    ]
    low_rank = sum(2 * min(shape) + 2 * max(shape) + 1 for shape in SHAPES)
    rest = sum(param.numel() for name, param in Net(SHAPES).named_parameters() if not name.startswith("layers."))
    assert results[0]["memory"]["paper_formula_bytes"] == 4 * (low_rank + rest)
    assert results[0]["metrics"]["limiter_activations"] > 0
