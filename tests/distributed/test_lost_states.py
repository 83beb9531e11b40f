"""A resume loses nothing without a word: other names, other dtypes, a state that is gone, another rank's file."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_fira
from ds_fira.checkpoint.covering import fill
from ds_fira.checkpoint.named_state import KEY, SavedState
from ds_fira.checkpoint.slices import Missing
from ds_fira.core.state import STEP
from ds_fira.sharding.geometry import ParamSlice
from tests.distributed.rule_jobs import FiraAges
from tests.distributed.zero_jobs import config
from tests.ranks import Pools

SHAPES = [(8, 6), (6, 12), (5, 5)]


def trained(named: str, steps: int = 3, kind: Any = ds_fira.FiraAdam, **settings: Any) -> Any:
    """An optimizer over three matrices, one of them not projected, and an expert tensor; by `named`: none, a or b."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in (*SHAPES, (2, 6, 4))]
    items: list[Any] = params if named == "none" else [(f"{named}{i}", param) for i, param in enumerate(params)]
    groups = [{"params": [*items[:2], items[3]], "rank": 2}, {"params": [items[2]]}]
    optimizer = kind(groups, lr=0.01, **settings)
    for step in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return optimizer


def states(optimizer: Any) -> list[dict[str, Tensor]]:
    return [optimizer.state.get(param, {}) for group in optimizer.param_groups for param in group["params"]]


@pytest.mark.parametrize("after", ["none", "a", "b"])
@pytest.mark.parametrize("before", ["none", "a", "b"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_names_and_state_dtype_change_together(before: str, after: str, state_dtype: str) -> None:
    """Without an engine, parameters are found by position, also where their states are converted."""
    saved = trained(before)
    resumed = trained(after, steps=0, state_dtype=state_dtype)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    for mine, theirs in zip(states(resumed), states(saved), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine
        for key, value in theirs.items():
            assert mine[key].dtype == (torch.bfloat16 if mine[key].dtype != value.dtype else value.dtype)
            torch.testing.assert_close(mine[key].to(value.dtype), value, rtol=0.01, atol=1e-6)


def test_a_restore_under_other_names_is_refused() -> None:
    """Where nothing of a parameter is found."""
    saved = SavedState()
    saved.add(trained("a").state_dict())
    with pytest.raises(ValueError, match="FiraAdam: the checkpoint knows nothing of 'b0'; train the same parameters"):
        trained("b", steps=0).restore(saved, weights=False)


def _drop(key: str) -> Any:
    return lambda content: content["state"][0].pop(key)


LOSSES: dict[str, tuple[Any, str]] = {
    "a state": (lambda c: c["state"].pop(2), "the saved state of .* has lost basis, exp_avg, exp_avg_sq"),
    "a state of AdamW": (lambda c: c["state"].pop(3), "the saved state of .* has lost exp_avg, exp_avg_sq, step"),
    "a moment": (_drop("exp_avg"), "the saved state of .* has lost exp_avg"),
    "a norm": (_drop("residual_norm"), "the saved state of .* has lost residual_norm"),
    "another shape": (
        lambda c: c["state"][0].update(exp_avg=c["state"][0]["exp_avg"].mT),
        r"the state of parameter 0 of shape \(8, 6\) has exp_avg of shape \(2, 8\) where \(8, 2\) belongs",
    ),
    "a number for a tensor": (lambda c: c["state"][0].update(step=3), "the saved state of .* has lost step"),
    "something more": (lambda c: c["state"][0].update(more=torch.ones(1)), "has more of shape .1,. where None"),
    "a group": (lambda c: c["param_groups"].pop(), "."),
    "places of another": (
        lambda c: c[KEY]["places"][0]["pieces"][0].__setitem__(3, 40),
        "another rank's share of the run",
    ),
    "a group more": (
        lambda c: (c["param_groups"].append({**c["param_groups"][1], "params": []}), c.pop(KEY)),
        r"has param groups of \[3, 1, 0\] tensors, and the optimizer of \[3, 1\]",
    ),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("case", LOSSES)
def test_what_is_lost_is_said(case: str, old: bool) -> None:
    """Before anything of the optimizer changes; a state dict of 0.1.0 does not say what it had, but the shapes do."""
    harm, message = LOSSES[case]
    content = copy.deepcopy(trained("none").state_dict())
    if old:
        content[KEY].pop("states")
        if case in ("a state", "a state of AdamW"):
            return  # as of a parameter that never had a gradient
        if case == "a moment":
            message = "has exp_avg of shape None where"
    harm(content)
    optimizer = trained("none", steps=1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(content)
    after = optimizer.state_dict()
    for number, state in before["state"].items():
        assert all(torch.equal(value, after["state"][number][key]) for key, value in state.items())


def test_every_range_is_covered() -> None:
    """Sources that overlap do not hide a gap."""
    missing = Missing(range(100))
    assert missing.take(range(-5, 30)) == [range(30)]
    assert missing.take(range(50, 60)) == [range(50, 60)]
    assert missing.take(range(20, 70)) == [range(30, 50), range(60, 70)]
    assert missing.take(range(10, 65)) == []
    assert missing.ranges == [range(70, 100)]
    assert missing.take(range(70, 170)) == [range(70, 100)]
    assert missing.ranges == []
    assert Missing(range(4, 4)).ranges == []


@pytest.mark.parametrize("seed", range(5))
def test_ranges_against_sets(seed: int) -> None:
    """Whatever is taken, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    missing, expected = Missing(range(3, 60)), set(range(3, 60))
    for _ in range(20):
        start, length = torch.randint(0, 60, (2,), generator=generator).tolist()
        found = range(start, start + length // 4)
        taken = {element for part in missing.take(found) for element in part}
        assert taken == expected.intersection(found)
        expected -= taken
        assert {element for part in missing.ranges for element in part} == expected


def test_overlapping_slices_with_a_gap_are_refused() -> None:
    """As many elements as there are, twice the first half."""
    flat = torch.arange(8.0)
    wanted = ParamSlice("w", 0, 0, 8)
    with pytest.raises(ValueError, match="lacks a part of the weights of w"):
        fill(
            torch.zeros(8),
            [wanted],
            {"w": [(ParamSlice("w", 0, 0, 4), flat), (ParamSlice("w", 0, 0, 4), flat)]},
            "weights",
            {},
        )
    target = torch.zeros(8)
    fill(target, [wanted], {"w": [(ParamSlice("w", 0, 0, 5), flat), (ParamSlice("w", 3, 3, 8), flat)]}, "weights", {})
    assert torch.equal(target, flat)


def test_a_rules_state_may_be_named_after_the_basis(ranks: Pools, tmp_path: Path) -> None:
    """`basis_age` of a parameter without a projection comes through a resume on other ranks."""
    assert FiraAges.algorithm.states.keys() == {"basis_age", "momentum"}
    params = {"rank": 2, "update_proj_gap": 3, "lr": 0.01, "target_modules": ["layers"]}
    arguments = {"module": "tests.distributed.rule_jobs", "shapes": SHAPES}
    folder = str(tmp_path / "first")
    ds_config = {**config(2, "fp32", params), "optimizer": {"type": "FiraAges", "params": params}}
    whole = ranks.run(2, "run", ds_config=ds_config, first=0, last=6, save=folder, save_at=4, **arguments)[0]
    for world_size, stage in ((1, 2), (3, 2), (2, 0)):
        ds_config["zero_optimization"] = {"stage": stage}
        found = ranks.run(world_size, "run", ds_config=ds_config, first=4, last=6, load=folder, seed=5, **arguments)[0]
        assert found["error"] == ""
        assert found["losses"] == pytest.approx(whole["losses"][4:], rel=1e-5)
        for name, weight in whole["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stage", "kind"), [(2, "optim"), (3, "optim"), (3, "model")])
def test_another_ranks_file_is_refused_on_every_rank(ranks: Pools, tmp_path: Path, stage: int, kind: str) -> None:
    """Under a manifest that was made anew, nothing else tells the two files apart."""
    params = {"rank": 2, "update_proj_gap": 3, "lr": 0.01}
    arguments = {
        "module": "tests.distributed.resize_jobs",
        "shapes": SHAPES,
        "ds_config": config(stage, "fp32", params),
    }
    ranks.run(2, "run", first=0, last=2, save=str(tmp_path), **arguments)
    (tag,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    names = [f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for rank in (0, 1)]
    shutil.copy(tag / names[0], tag / names[1])
    ds_fira.checkpoint.atomic_save.reseal(tmp_path, tag.name)
    found = ranks.run(2, "run", first=2, last=3, load=str(tmp_path), **arguments)
    assert found[0]["error"] == found[1]["error"]
    assert "another rank's share of the run; load each rank's own" in found[0]["error"]


def test_the_count_of_adamw_stays_on_the_host() -> None:
    """By the group it is in, not by the names of its states."""
    saved = trained("none", kind=FiraAges)
    resumed = trained("none", steps=0, kind=FiraAges)
    resumed.load_state_dict(saved.state_dict())
    assert states(resumed)[3][STEP].device.type == "cpu"
    assert states(resumed)[3].keys() == {STEP, "basis_age", "momentum"}
