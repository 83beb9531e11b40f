"""A checkpoint of torch's AdamW goes on in FiraAdam: moments, step counts, schedule; and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_fira
from ds_fira.core.subspace import projection_side
from tests.distributed.adam_jobs import adam_config
from tests.distributed.resize_jobs import rows
from tests.distributed.zero_jobs import Net, config
from tests.grids import full_if
from tests.ranks import Pools

SHAPES = [(8, 6)] * 5 + [(6, 12)] * 3 + [(3, 40), (40, 7)]
PARAMS = {"rank": 2, "update_proj_gap": 2, "lr": 0.01, "weight_decay": 0.05, "eps": 1e-8}
SAVED, END = 3, 7
TOLERANCE = 1e-5
_references: dict[str, dict[str, Any]] = {}


def reference(**params: Any) -> dict[str, Any]:
    """One process: AdamW on all rows, then FiraAdam with moments that are projected here, on the first gradient."""
    key = repr(params)
    if key in _references:
        return _references[key]
    settings = {**PARAMS, **params}
    torch.manual_seed(0)
    model = Net(SHAPES)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    fira = ds_fira.FiraAdam(model, **settings)
    projected = {id(param) for group in fira.param_groups if group.get("rank") for param in group["params"]}
    losses = []
    for step in range(END):
        for group in (*adam.param_groups, *fira.param_groups):
            group["lr"] = 0.01 * 0.9**step
        loss = model(rows(step))
        loss.backward()
        losses.append(float(loss))
        if step == SAVED:
            for param in model.parameters():
                fira.state[param].update(taken_over(param, adam.state[param], id(param) in projected))
        (adam if step < SAVED else fira).step()
        model.zero_grad()
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    _references[key] = {"losses": losses, "weights": weights, "lr": 0.01 * 0.9**END}
    return _references[key]


def taken_over(param: Tensor, state: dict[str, Tensor], projected: bool) -> dict[str, Tensor]:
    """The state of FiraAdam before the step whose gradient `param` has."""
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if not projected:
        return {"step": torch.tensor(SAVED), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    left = projection_side(tuple(param.shape), "std", "released") == "left"
    u, _, vh = torch.linalg.svd(param.grad, full_matrices=False)
    basis = u[:, :2] if left else vh[:2].T
    return {
        "step": torch.tensor(SAVED),
        "refresh_step": torch.tensor(SAVED),
        "basis": basis.contiguous(),
        "residual_norm": torch.tensor(0.0),
        "exp_avg": basis.T @ m if left else m @ basis,
        "exp_avg_sq": basis.square().T @ v if left else v @ basis.square(),
    }


def agree(results: list[dict[str, Any]]) -> dict[str, Any]:
    for other in results[1:]:
        assert other["error"] == results[0]["error"]
        for name, weight in results[0].get("weights", {}).items():
            assert torch.equal(weight, other["weights"][name]), name
    return results[0]


def adam_run(ranks: Pools, size: int, stage: int, dtype: str = "fp32", **arguments: Any) -> dict[str, Any]:
    settings = adam_config(config(stage, dtype, PARAMS, **arguments.pop("extra", {})), weight_decay=0.05)
    module = "tests.distributed.adam_jobs"
    return agree(ranks.run(size, "adam", module=module, ds_config=settings, shapes=SHAPES, **arguments))


def fira_run(ranks: Pools, size: int, stage: int, dtype: str = "fp32", **arguments: Any) -> dict[str, Any]:
    params, extra = {**PARAMS, **arguments.pop("params", {})}, arguments.pop("extra", {})
    module = "tests.distributed.resize_jobs"
    arguments = {"ds_config": config(stage, dtype, params, **extra), "shapes": SHAPES, "scheduler": True, **arguments}
    return agree(ranks.run(size, "run", module=module, **arguments))


def assert_goes_on(found: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    assert found["error"] == ""
    assert found["steps"] == SAVED
    assert found["client_state"]["note"] == "kept"
    assert found["losses"] == pytest.approx(expected["losses"][SAVED:], rel=tolerance)
    assert found["lr"] == pytest.approx(dict.fromkeys(found["lr"], expected["lr"]), rel=1e-12)
    for name, weight in expected["weights"].items():
        difference = (found["weights"][name].float() - weight).norm() / weight.norm().clamp(min=1e-30)
        assert difference < tolerance, name


# Stage and ranks of AdamW, then of FiraAdam.
WAYS = [(0, 2, 0, 2), (1, 2, 1, 2), (2, 2, 2, 2), (3, 2, 3, 2), (2, 3, 3, 2), (3, 2, 2, 3), (0, 1, 2, 2)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_adamws_moments_are_projected_on_the_first_basis(ranks: Pools, tmp_path: Path, way: tuple[int, ...]) -> None:
    stage, size, next_stage, next_size = way
    adam_run(ranks, size, stage, first=0, last=SAVED, save=str(tmp_path))
    found = fira_run(ranks, next_size, next_stage, first=SAVED, last=END, load=str(tmp_path), seed=7)
    assert_goes_on(found, reference())
