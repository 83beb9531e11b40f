"""A preset gives the same settings to the same groups whichever way it is named, and the user wins over it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ds_fira
from ds_fira import ApolloAdam, FiraAdam, FiraRMSProp, GaLoreAdam
from ds_fira.checkpoint.named_state import KEY
from ds_fira.optim import presets
from ds_fira.optim.param_groups import build_groups, group_defaults
from ds_fira.optim.presets import PRESETS, ModelSize, transferred_scale
from ds_fira.optim.settings import check_params
from ds_fira.tools.dry_run import plan_run
from tests.small_models import llama

RANK = 4
SCALE, LR = transferred_scale(ModelSize(16, 2, RANK)), PRESETS["recommended"].settings["lr"]


def by_model(model: nn.Module, kind: type = FiraAdam, **settings: object):
    return kind(model, rank=RANK, preset="recommended", **settings)


def by_names(model: nn.Module, kind: type = FiraAdam, **settings: object):
    return kind(model.named_parameters(), rank=RANK, preset="recommended", **settings)


def by_param_groups(model: nn.Module, kind: type = FiraAdam, **settings: object):
    groups = ds_fira.param_groups(model, RANK, preset="recommended", optimizer=kind.algorithm.name)
    return kind(groups, **settings)


def by_param_groups_with_settings(model: nn.Module, kind: type = FiraAdam, **settings: object):
    return kind(
        ds_fira.param_groups(model, RANK, preset="recommended", optimizer=kind.algorithm.name, **settings),
    )


def by_config(model: nn.Module, kind: type = FiraAdam, stage: int = 2, dp_size: int = 2, **settings: object):
    """As `ds_fira.engine.deepspeed.attach.build_optimizer` does."""
    checked = check_params({"rank": RANK, "preset": "recommended", **settings}, algorithm=kind.algorithm)
    groups = build_groups(model, model.parameters(), checked, stage, dp_size, kind.algorithm)
    return kind(groups, **group_defaults(checked))


WAYS = [by_model, by_names, by_param_groups, by_param_groups_with_settings, by_config]


def projected(optimizer: torch.optim.Optimizer, *names: str) -> set[tuple[object, ...]]:
    """Values of settings in the projected groups."""
    return {tuple(group[name] for name in names) for group in optimizer.param_groups if "rank" in group}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same(way: Callable) -> None:
    optimizer = way(llama())
    assert {group["lr"] for group in optimizer.param_groups} == {LR}
    assert projected(optimizer, "residual_scale") == {(SCALE,)}
    plain = {
        tuple(p.shape)
        for group in FiraAdam(llama(), rank=RANK).param_groups
        if "rank" in group
        for p in group["params"]
    }
    assert {tuple(p.shape) for g in optimizer.param_groups if "rank" in g for p in g["params"]} == plain
    assert all(group["preset"]["name"] == "recommended" for group in optimizer.param_groups)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [{"residual_scale": 0.5}, {"lr": 0.02}, {"lr": 0.02, "residual_scale": 0.5}], ids=str)
def test_the_user_wins(way: Callable, given: dict[str, float]) -> None:
    expected = {"lr": LR, "residual_scale": SCALE, **given}
    optimizer = way(llama(), **given)
    assert projected(optimizer, "lr", "residual_scale") == {(expected["lr"], expected["residual_scale"])}
    assert {group["lr"] for group in optimizer.param_groups} == {expected["lr"]}
    for group in optimizer.param_groups:
        if "rank" in group:
            assert not given.keys() & group["preset"].keys()


def test_a_groups_own_scale_wins() -> None:
    model = llama()
    first, second = (list(layer.parameters()) for layer in model.model.layers)
    groups = [{"params": first, "residual_scale": 0.5}, {"params": second}]
    expected = {(0.5,), (SCALE,)}
    assert projected(FiraAdam(copy.copy(groups), rank=RANK, preset="recommended"), "residual_scale") == expected
    made = ds_fira.param_groups(model, RANK, preset="recommended", groups=groups)
    assert projected(FiraAdam(made), "residual_scale") == expected
    checked = check_params({"rank": RANK, "preset": "recommended"})
    built = build_groups(model, copy.copy(groups), checked, 2, 2)
    assert projected(FiraAdam(built, **group_defaults(checked)), "residual_scale") == expected


def test_the_size_is_that_of_all_groups_together() -> None:
    """Not of one layer, and not of what a stage leaves of a group when it splits it by shape."""
    model = llama(layers=3)
    groups = [{"params": list(layer.parameters())} for layer in model.model.layers]
    scale = transferred_scale(ModelSize(16, 3, RANK))
    assert projected(FiraAdam(groups, rank=RANK, preset="recommended"), "residual_scale") == {(scale,)}
    assert projected(by_config(model), "residual_scale") == {(scale,)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_plan_of_any_stage_and_ranks_has_one_scale(stage: int, ranks: int) -> None:
    mark = presets.preset_mark("recommended", [(f"{layer}.weight", (16, 16), RANK) for layer in range(2)])
    settings = ({"preset": "recommended"}, presets.values_of(mark), {})
    plans = [plan_run(llama(), ranks, stage, rank=RANK, **how) for how in settings]
    found, _, plain = ([group for group in plan.groups if "rank" in group.settings] for plan in plans)
    assert {(group.settings["residual_scale"], group.settings["lr"]) for group in found} == {(SCALE, LR)}
    assert {group.settings["residual_scale"] for group in plain} == {1.0}
    held = [[plan.state_bytes(rank, torch.float32) for rank in range(ranks if stage else 1)] for plan in plans]
    assert held[0] == held[1]
    assert projected(by_config(llama(), stage=stage, dp_size=ranks), "residual_scale") == {(SCALE,)}


def test_without_a_preset_no_group_says_anything_of_one() -> None:
    model = llama()
    for groups in (FiraAdam(model, rank=RANK).param_groups, ds_fira.param_groups(model, RANK)):
        assert not any("preset" in group for group in groups)
    assert projected(FiraAdam(model, rank=RANK), "lr", "residual_scale") == {(1e-3, 1.0)}


def test_it_steps_as_its_settings_do() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    second = copy.deepcopy(first)
    inputs = torch.randn(5, 6)
    mark = presets.preset_mark("recommended", [("0.weight", (8, 6), 2), ("2.weight", (6, 8), 2)])
    pairs = [
        (first, FiraAdam(first, rank=2, preset="recommended")),
        (second, FiraAdam(second, rank=2, **presets.values_of(mark))),
    ]
    for model, optimizer in pairs:
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_group_added_later_has_the_presets_scale_or_its_own(way: Callable) -> None:
    optimizer = way(llama())
    later = [nn.Parameter(torch.zeros(32, 64)) for _ in range(3)]
    if "param_names" in optimizer.param_groups[0]:  # torch wants all groups with names, or none
        later = [(f"later.{number}", param) for number, param in enumerate(later)]
    optimizer.add_param_group({"params": later[:1], "rank": 2})
    optimizer.add_param_group({"params": later[1:2], "rank": 2, "residual_scale": 0.5})
    assert [group["residual_scale"] for group in optimizer.param_groups[-2:]] == [SCALE, 0.5]
    assert [group["lr"] for group in optimizer.param_groups[-2:]] == [LR, LR]
    with pytest.raises(ValueError, match=r"^FiraAdam param group: preset = 'recommended' concerns the whole training;"):
        optimizer.add_param_group({"params": later[2:], "preset": "recommended"})


def test_its_own_groups_make_an_optimizer_again() -> None:
    """Whose groups say everything; what they leave to the preset may differ from group to group."""
    model = llama()
    layers = [{"params": list(layer.parameters())} for layer in model.model.layers]
    optimizer = FiraAdam([{**layers[0], "residual_scale": 0.5, "lr": 0.02}, layers[1]], rank=RANK, preset="recommended")
    again = FiraAdam(optimizer.param_groups)
    assert (
        projected(again, "lr", "residual_scale")
        == projected(optimizer, "lr", "residual_scale")
        == {(0.02, 0.5), (LR, SCALE)}
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [GaLoreAdam, ApolloAdam, FiraRMSProp])
def test_other_optimizers_refuse_it(way: Callable, kind: type) -> None:
    with pytest.raises(
        ValueError, match=r"preset = 'recommended' is a setting of FiraAdam that \w+ has no use for; rem"
    ):
        way(llama(), kind)


@pytest.mark.parametrize("kind", [GaLoreAdam, ApolloAdam, FiraRMSProp])
def test_other_optimizers_refuse_groups_made_with_one(kind: type) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: preset = 'recommended' is a setting of FiraAdam"):
        kind(ds_fira.param_groups(llama(), RANK, preset="recommended"))


def test_two_presets_and_one_in_a_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "PRESETS", {**PRESETS, "other": presets.Preset({"lr": 0.5})})
    model, deeper = llama(), llama(layers=3)
    groups = ds_fira.param_groups(model, RANK, preset="recommended")
    in_group = [{"params": list(model.parameters()), "preset": "recommended"}]
    checked = check_params({"rank": RANK})
    for make in (lambda found: FiraAdam(found, rank=RANK), lambda found: build_groups(model, found, checked, 2, 2)):
        with pytest.raises(
            ValueError, match=r"^FiraAdam: preset = 'recommended' in a param group is a setting of the wh"
        ):
            make(in_group)
        with pytest.raises(ValueError, match=r"^FiraAdam: preset = .* in one param group and .* in another"):
            make([*groups, *ds_fira.param_groups(deeper, RANK, preset="recommended")])
    checked["preset"] = "other"
    with pytest.raises(ValueError, match=r"^FiraAdam: preset = 'other' beside param groups .* with 'recommended'"):
        build_groups(model, groups, checked, 2, 2)


def resumed(first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        second.load_state_dict(first.state_dict())
    return [str(each.message) for each in said]


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_keeps_the_scale_that_was_stored(way: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the law has changed since; a plain number, as any other setting's."""
    first = way(llama())
    assert {group["residual_scale"] for group in first.state_dict()["param_groups"] if "rank" in group} == {SCALE}
    monkeypatch.setattr(presets, "BASE_STEP", 4 * presets.BASE_STEP)
    second = way(llama())
    ((changed,),) = projected(second, "residual_scale")
    assert changed == pytest.approx(4 * SCALE)
    assert resumed(first, second) == []
    assert projected(second, "residual_scale") == {(SCALE,)}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_goes_on_without_what_the_preset_gives_since(way: Callable) -> None:
    """Saved by a version whose preset gave norms no learning rate of their own, and that had no such setting."""
    first, second = way(llama()), way(llama())
    earlier = first.state_dict()
    for group in earlier["param_groups"]:
        del group["vector_lr_scale"], group["preset"]["vector_lr_scale"]
    for given in earlier[KEY]["settings"]:
        given.pop("vector_lr_scale")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        second.load_state_dict(earlier)
    assert not said
    assert {group["vector_lr_scale"] for group in second.param_groups} == {1.0}
    third = way(llama(), vector_lr_scale=0.5)
    third.load_state_dict(earlier)
    assert {group["vector_lr_scale"] for group in third.param_groups} == {0.5}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_takes_what_the_user_changes(way: Callable) -> None:
    first, second = way(llama()), way(llama(), residual_scale=0.5)
    assert any(f"residual_scale = 0.5 where the checkpoint had {SCALE}" in each for each in resumed(first, second))
    assert projected(second, "residual_scale") == {(0.5,)}
    third = way(llama())
    assert any(f"residual_scale = {SCALE} where the checkpoint had 0.5" in each for each in resumed(second, third))
    assert projected(third, "residual_scale") == {(SCALE,)}


def test_a_preset_may_come_and_go() -> None:
    """Over a resume: what it gives is a new value, said, and nothing is left of a preset that is gone."""
    plain, preset = FiraAdam(llama(), rank=RANK), by_model(llama())
    (said,) = resumed(plain, preset)
    assert f"residual_scale = {SCALE} where the checkpoint had 1.0" in said
    assert f"lr goes on from the checkpoint's 0.001, not from {LR}" in said
    assert projected(preset, "residual_scale") == {(SCALE,)}
    (said,) = resumed(preset, FiraAdam(llama(), rank=RANK, residual_scale=1.0))
    assert f"residual_scale = 1.0 where the checkpoint had {SCALE}" in said
    again = FiraAdam(llama(), rank=RANK)
    resumed(preset, again)
    assert not any("preset" in group for group in again.param_groups)
