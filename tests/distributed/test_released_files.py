"""Files and states of the released code that are damaged, harmful or of another kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_fira
from tests.distributed.released_jobs import released_groups, released_run
from tests.distributed.safe_jobs import evil
from tests.distributed.test_released_state import FIRA, GALORE, OURS, SHAPES
from tests.distributed.zero_jobs import Net, config
from tests.programs import run_code
from tests.ranks import Pools

READ = """
import sys, torch, ds_fira
content = ds_fira.read_released_state(sys.argv[1])
projectors = [s["projector"] for s in content["optimizer"]["state"].values() if "projector" in s]
assert all(isinstance(p.ortho_matrix, torch.Tensor) and p.rank == 2 for p in projectors)
assert not {"fira", "galore_torch"} & set(sys.modules)
print(len(projectors))
"""


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    """A state dict and the weights of each kind."""
    return {
        kind: released_run(kind, SHAPES, 3, 2, settings)[:2] for kind, settings in (("fira", FIRA), ("galore", GALORE))
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["fira", "galore"])
def test_files_are_read_without_the_packages(runs: dict[str, Any], kind: str, legacy: bool, tmp_path: Path) -> None:
    """And what is read goes on as the state dict itself does, given as such or as a path."""
    state, weights = runs[kind]
    path = tmp_path / "optimizer.pt"
    torch.save({"optimizer": state, "step": 3}, path, _use_new_zipfile_serialization=not legacy)
    done = run_code(READ, [str(path)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(len(SHAPES))
    found = []
    for given in (state, ds_fira.read_released_state(path), ds_fira.read_released_state(path)["optimizer"], str(path)):
        model = Net(SHAPES)
        model.load_state_dict(weights)
        optimizer = ds_fira.FiraAdam(released_groups(model, FIRA), lr=0.01)
        ds_fira.load_released_state(optimizer, given, released_groups(model, {}))
        found.append([optimizer.state[param] for group in optimizer.param_groups for param in group["params"]])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


@pytest.mark.parametrize("kind", ["system", "eval", "setstate"])
@pytest.mark.parametrize("legacy", [False, True])
def test_no_file_runs_code(runs: dict[str, Any], kind: str, legacy: bool, tmp_path: Path) -> None:
    """Neither beside the state, nor in it, nor as an attribute of a projector."""
    state, marker = runs["fira"][0], tmp_path / "mark"
    number = state["param_groups"][1]["params"][0]
    projector = type(state["state"][number]["projector"])(2)
    projector.ortho_matrix = evil(kind, marker)
    changed = {**state["state"], number: {**state["state"][number], "projector": projector}}
    for content in (
        {"optimizer": state, "config": evil(kind, marker)},
        {**state, "state": {**state["state"], 99: evil(kind, marker)}},
        {**state, "state": changed},
    ):
        path = tmp_path / "optimizer.pt"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=r"optimizer\.pt would import .*; save the optimizer alone") as caught:
            ds_fira.read_released_state(path)
        assert str(caught.value).count("\n") == 0
    assert not marker.exists()


def _first(state: dict[str, Any], change: Any) -> dict[str, Any]:
    """The state dict with the state of its first projected parameter changed, not the one given."""
    number = state["param_groups"][1]["params"][0]
    held = dict(state["state"][number])
    change(held)
    return {**state, "state": {**state["state"], number: held}}


def _plain(state: dict[str, Any], change: Any) -> dict[str, Any]:
    """Likewise of the first that is not projected."""
    number = state["param_groups"][0]["params"][0]
    held = dict(state["state"][number])
    change(held)
    return {**state, "state": {**state["state"], number: held}}


def _spoil(key: str, value: float) -> Any:
    def change(held: dict[str, Any]) -> None:
        held[key] = held[key].clone()
        held[key].view(-1)[3] = value

    return change


def _basis(change: Any) -> Any:
    def set_it(held: dict[str, Any]) -> None:
        before = held["projector"]
        held["projector"] = type(before)(before.rank)
        held["projector"].ortho_matrix = change(before.ortho_matrix.clone())

    return set_it


def _group(number: int, **values: Any) -> Any:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        groups = [dict(group) for group in state["param_groups"]]
        for key, value in values.items():
            groups[number].pop(key) if value is None else groups[number].update({key: value})
        return {**state, "param_groups": groups}

    return change


def _scaled(matrix: torch.Tensor) -> torch.Tensor:
    return 3.0 * matrix


def _with_nan(matrix: torch.Tensor) -> torch.Tensor:
    matrix[0, 0] = float("nan")
    return matrix


NAME = "4"  # alone, parameters are known by their numbers
BAD: dict[str, tuple[Any, str]] = {
    "transposed moments": (
        lambda s: _first(s, lambda h: h.update(exp_avg=h["exp_avg"].mT)),
        rf"exp_avg of {NAME} has shape \(2, 8\) .* where \(8, 2\) belongs",
    ),
    "flat moments": (lambda s: _first(s, lambda h: h.update(exp_avg_sq=h["exp_avg_sq"].flatten())), r"shape \(16,\)"),
    "flat moments of AdamW": (
        lambda s: _plain(s, lambda h: h.update(exp_avg=h["exp_avg"].flatten())),
        r"exp_avg of 0 has shape \(66,\)",
    ),
    "one moment of another shape": (
        lambda s: _plain(s, lambda h: h.update(exp_avg_sq=h["exp_avg_sq"].mT)),
        r"exp_avg_sq of 0 has shape \(6, 11\)",
    ),
    "NaN in a moment": (lambda s: _first(s, _spoil("exp_avg", float("nan"))), rf"exp_avg of {NAME} is not finite"),
    "inf in a moment of AdamW": (
        lambda s: _plain(s, _spoil("exp_avg_sq", float("inf"))),
        "exp_avg_sq of 0 is not finite",
    ),
    "negative squares": (lambda s: _first(s, _spoil("exp_avg_sq", -1e-9)), rf"exp_avg_sq of {NAME}.* negative"),
    "negative squares of AdamW": (
        lambda s: _plain(s, _spoil("exp_avg_sq", -1.0)),
        "exp_avg_sq of 0, .* negative",
    ),
    "a NaN basis": (lambda s: _first(s, _basis(_with_nan)), rf"basis of {NAME} .* is not finite"),
    "a scaled basis": (lambda s: _first(s, _basis(_scaled)), rf"basis of {NAME} .* are not orthonormal"),
    "a zero basis": (lambda s: _first(s, _basis(torch.zeros_like)), "are not orthonormal"),
    "a transposed basis": (lambda s: _first(s, _basis(lambda p: p.mT.contiguous())), rf"projector of {NAME} holds"),
    "a flat basis": (lambda s: _first(s, _basis(torch.flatten)), rf"projector of {NAME} holds \(12,\)"),
    "no projector": (lambda s: _first(s, lambda h: h.pop("projector")), "holds NoneType"),
    "a negative step": (lambda s: _first(s, lambda h: h.update(step=-3)), rf"{NAME} has step = -3, which is below 1"),
    "a NaN step": (lambda s: _plain(s, lambda h: h.update(step=float("nan"))), "has step = nan, which is no whole"),
    "half a step": (
        lambda s: _first(s, lambda h: h.update(step=torch.tensor(2.5))),
        "has step = 2.5, which is no whole",
    ),
    "a text for a step": (lambda s: _first(s, lambda h: h.update(step="2")), "has step = '2', which is no whole"),
    "no step": (lambda s: _first(s, lambda h: h.pop("step")), "has step = None"),
    "a NaN norm": (
        lambda s: _first(s, lambda h: h.update(scaling_grad=torch.tensor(float("nan")))),
        "is nan, which is",
    ),
    "a negative norm": (
        lambda s: _first(s, lambda h: h.update(scaling_grad=-1.0)),
        r"is -1\.0, which is no finite norm",
    ),
    "norms": (lambda s: _first(s, lambda h: h.update(scaling_grad=torch.ones(3))), r"is of shape \(3,\)"),
    "no norm": (lambda s: _first(s, lambda h: h.pop("scaling_grad")), rf"state of {NAME} has no scaling_grad"),
    "no params": (_group(0, params=None), "param group 0 of the state dict has no list of params"),
    "a gap of 0": (_group(1, update_proj_gap=0), "param group 1 of the state dict has update_proj_gap = 0"),
    "no gap": (_group(1, update_proj_gap=None), "has update_proj_gap = None"),
    "a rank of 0": (_group(1, rank=0), "has rank = 0"),
    "another proj_type": (_group(1, proj_type="full"), "has proj_type = 'full'; only 'std'"),
    "a state of nobody": (lambda s: {**s, "state": {**s["state"], 99: {}}}, "a state of parameter 99"),
    "no groups": (lambda s: {"state": s["state"]}, "has no param_groups"),
    "no dict": (lambda s: [s], "has no param_groups"),
    "a state that is none": (lambda s: {**s, "state": {**s["state"], 0: [3]}}, r"FiraAdam: .* \(.*\); load another"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_run_can_have_left_is_refused(runs: dict[str, Any], case: str) -> None:
    """With the parameter, what is wrong, and the remedy; the optimizer stays as it was."""
    change, message = BAD[case]
    model = Net(SHAPES)
    optimizer = ds_fira.FiraAdam(released_groups(model, FIRA), lr=0.01)
    with pytest.raises(ValueError, match=message) as caught:
        ds_fira.load_released_state(optimizer, change(runs["fira"][0]), released_groups(model, {}))
    assert str(caught.value).startswith("FiraAdam: ")
    assert str(caught.value).count("\n") == 0
    assert ";" in str(caught.value)
    assert not optimizer.state


def test_a_parameter_without_a_state_is_said(runs: dict[str, Any]) -> None:
    """It never had a gradient, or was lost: it begins anew."""
    state = runs["fira"][0]
    number = state["param_groups"][1]["params"][0]
    rest = {**state, "state": {key: value for key, value in state["state"].items() if key != number}}
    model = Net(SHAPES)
    optimizer = ds_fira.FiraAdam(released_groups(model, FIRA), lr=0.01)
    with pytest.warns(UserWarning, match=rf"the released run has no state for {NAME}"):
        ds_fira.load_released_state(optimizer, rest, released_groups(model, {}))


@pytest.mark.parametrize("stage", [0, 2])
def test_one_bad_rank_stops_all(ranks: Pools, stage: int) -> None:
    """Whatever kind of error it is: also where the others would have gone on."""
    for kind in ("nan", "key"):
        results = ranks.run(
            2,
            "bad_on_one_rank",
            module="tests.distributed.released_jobs",
            ds_config=config(stage, "fp32", OURS),
            shapes=SHAPES,
            settings=FIRA,
            kind=kind,
        )
        assert results[0] == results[1]
        expected = "exp_avg of embedding.weight is not finite" if kind == "nan" else "rank 1 could not load"
        assert expected in results[0], results[0]


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    """As everywhere."""
    with pytest.raises(OSError, match="nothing"):
        ds_fira.read_released_state(os.fspath(tmp_path / "nothing.pt"))
