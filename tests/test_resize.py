"""Resume on another number of ranks, from one ZeRO stage to another, with other settings: the same run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import Pools
from tests.zero_jobs import config

SHAPES = [(8, 6)] * 5 + [(6, 12)] * 3 + [(3, 40), (40, 7)]
PARAMS = {"rank": 2, "update_proj_gap": 3, "lr": 0.01, "weight_decay": 0.05}
SAVED, END = 5, 9  # a refresh at 3, and at 6 after the resume
TOLERANCE = 1e-5

_whole: dict[str, Any] = {}
_saved: dict[Any, Path] = {}


def job(ranks: Pools, world_size: int, stage: int, dtype: str = "fp32", **arguments: Any) -> dict[str, Any]:
    params = {**PARAMS, **arguments.pop("params", {})}
    extra = arguments.pop("extra", {})
    arguments = {"shapes": SHAPES, "scheduler": True, **arguments}
    results = ranks.run(
        world_size, "run", module="tests.resize_jobs", ds_config=config(stage, dtype, params, **extra), **arguments
    )
    for other in results[1:]:
        assert other["error"] == results[0]["error"]
        for name, weight in results[0].get("weights", {}).items():
            assert torch.equal(weight, other["weights"][name]), name
    return results[0]


def saved(ranks: Pools, folders: Path, world_size: int, stage: int, dtype: str = "fp32", **arguments: Any) -> Path:
    """The folder of a run of `SAVED` steps, made once."""
    key = repr((world_size, stage, dtype, arguments))
    if key not in _saved:
        folder = folders / str(len(_saved))
        job(ranks, world_size, stage, dtype, first=0, last=SAVED, save=str(folder), **arguments)
        _saved[key] = folder
    return _saved[key]


def whole(ranks: Pools, dtype: str = "fp32", **arguments: Any) -> dict[str, Any]:
    """The uninterrupted run."""
    key = repr((dtype, arguments))
    if key not in _whole:
        _whole[key] = job(ranks, 1, 2, dtype, first=0, last=END, **arguments)
    return _whole[key]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    assert found["error"] == ""
    assert found["steps"] == SAVED
    assert found["client_state"]["note"] == "kept"
    assert found["losses"] == pytest.approx(expected["losses"][SAVED:], rel=tolerance)
    assert found["lr"] == pytest.approx(expected["lr"], rel=1e-12)
    for name, weight in expected["weights"].items():
        difference = (found["weights"][name] - weight).norm() / weight.norm().clamp(min=1e-30)
        assert difference < tolerance, name


@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_another_number_of_ranks(ranks: Pools, folders: Path, before: int, after: int) -> None:
    folder = saved(ranks, folders, before, 2)
    found = job(ranks, after, 2, first=SAVED, last=END, load=str(folder), seed=7)
    assert_same_run(found, whole(ranks))


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_another_stage(ranks: Pools, folders: Path, before: int, after: int) -> None:
    folder = saved(ranks, folders, 2, before)
    found = job(ranks, 3, after, first=SAVED, last=END, load=str(folder), seed=7)
    assert_same_run(found, whole(ranks))
