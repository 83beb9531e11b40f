"""One rule for ranks: a constructor's, a JSON config's and those of param groups; and no Fira without any."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import ds_fira
from ds_fira import ApolloAdam, FiraAdam, FiraRMSProp, GaLoreAdam
from ds_fira.optim.param_groups import build_groups
from ds_fira.optim.settings import check_params

KINDS = [FiraAdam, GaLoreAdam, ApolloAdam, FiraRMSProp]


class Model(nn.Module):
    """Two layers, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 30, bias=False)


def by_constructor(model: nn.Module, groups: list, rank: int | None, kind: type = FiraAdam, **settings) -> list:
    """With names, by which a constructor tells embeddings and heads."""
    names = {id(param): name for name, param in model.named_parameters()}

    def named(params: list) -> list:
        return [(names[id(param)], param) for param in params]

    own = [{**item, "params": named(item["params"])} if isinstance(item, dict) else item for item in groups]
    return kind(own if isinstance(groups[0], dict) else named(own), rank=rank, **settings).param_groups


def by_config(model: nn.Module, groups: list, rank: int | None, kind: type = FiraAdam, stage: int = 0, **settings):
    params = check_params({**settings, "rank": rank}, algorithm=kind.algorithm)
    return build_groups(model, groups, params, stage, 2, kind.algorithm)


WAYS = [by_constructor, by_config]


def names_with_a_rank(model: nn.Module, groups: list) -> dict[str, int]:
    names = {id(param): name for name, param in model.named_parameters()}
    return {names[id(p)]: g["rank"] for g in groups if g.get("rank") is not None for p in g["params"]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_applies_to_the_weights_of_all_groups(way, kind):
    """Each group is split into what is projected and the rest, and both keep its keys."""
    model = Model()
    groups = [
        {"params": [*model.first.parameters(), *model.norm.parameters()], "lr": 0.5, "name": "first"},
        {
            "params": [*model.second.parameters(), *model.embed_tokens.parameters()],
            "weight_decay": 0.3,
            "name": "second",
        },
        {"params": list(model.lm_head.parameters()), "name": "head"},
    ]
    found = way(model, groups, 3, kind)
    assert names_with_a_rank(model, found) == {"first.weight": 3, "second.weight": 3}
    assert [(g["name"], len(g["params"]), g.get("rank")) for g in found] == [
        ("first", 1, 3),
        ("first", 3, None),
        ("second", 1, 3),
        ("second", 2, None),
        ("head", 1, None),
    ]
    assert {group["lr"] for group in found if group["name"] == "first"} == {0.5}
    assert {group["weight_decay"] for group in found if group["name"] == "second"} == {0.3}


@pytest.mark.parametrize("way", WAYS)
def test_a_group_of_rank_none_stays_unprojected(way):
    model = Model()
    groups = [{"params": list(model.first.parameters()), "rank": None}, {"params": list(model.second.parameters())}]
    assert names_with_a_rank(model, way(model, groups, 3)) == {"second.weight": 3}
    assert names_with_a_rank(model, way(model, groups, 3, target_modules=["second"])) == {"second.weight": 3}


@pytest.mark.parametrize("way", WAYS)
def test_groups_with_a_rank_say_what_is_projected(way):
    """And a rank beside them that does nothing is said."""
    model = Model()
    groups = [
        {"params": [model.first.weight], "rank": 2},
        {"params": [model.second.weight]},
        {"params": [model.lm_head.weight], "rank": None},
    ]
    with pytest.warns(UserWarning, match=r"FiraAdam: rank = 3.* is not used, because the param groups say themselves"):
        found = way(model, groups, 3)
    assert names_with_a_rank(model, found) == {"first.weight": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names_with_a_rank(model, way(model, groups, None)) == {"first.weight": 2}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_rank_anywhere_is_refused(way, kind):
    model = Model()
    weights = [model.first.weight, model.second.weight]
    missing = rf"^{kind.__name__}: rank = None.*set a rank, such as 128, or train with AdamW\.$"
    for groups in (weights, [{"params": weights}], [{"params": weights, "rank": None}]):
        with pytest.raises(ValueError, match=missing):
            way(model, groups, None, kind)
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: rank = 3.*every param group says rank = None"):
        way(model, [{"params": weights, "rank": None}], 3, kind)


def test_names_and_one_parameter_of_its_own():
    model = Model()
    groups = [{"params": list(model.first.named_parameters()), "name": "named"}, {"params": model.second.weight}]
    with pytest.raises(ValueError, match="with/without names"):  # torch's own rule: all or none
        FiraAdam(groups, rank=3)
    optimizer = FiraAdam(groups[:1], rank=3)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]
    assert len(FiraAdam(groups[1:], rank=3).param_groups) == 1
    with pytest.raises(TypeError, match="order"):
        FiraAdam([{"params": set(model.parameters())}], rank=3)


def test_param_groups_splits_a_group_that_has_a_rank_of_its_own():
    """Its norms and biases have none."""
    model = Model()
    groups = ds_fira.param_groups(model, 3, groups=[{"params": list(model.parameters()), "rank": 2}])
    assert names_with_a_rank(model, groups) == {"first.weight": 2, "second.weight": 2}
    FiraAdam(groups)


def test_a_group_added_later_says_itself_what_it_is():
    model = Model()
    optimizer = FiraAdam([model.first.weight], rank=3)
    optimizer.add_param_group({"params": [model.second.weight]})
    optimizer.add_param_group({"params": [model.lm_head.weight], "rank": 2})
    assert names_with_a_rank(model, optimizer.param_groups) == {"first.weight": 3, "lm_head.weight": 2}


def test_nothing_to_project_is_said_once_and_stepped_by_adamw():
    param, twin = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="none of the 1 trained parameters is a linear weight to project") as told:
        optimizer = FiraAdam([param], rank=2, lr=0.1, eps=1e-8)
    assert len(told) == 1
    torch_adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
    for step in range(3):
        param.grad, twin.grad = torch.full((2, 3), 1.0 + step)
        optimizer.step()
        torch_adamw.step()
    torch.testing.assert_close(param, twin, rtol=1e-5, atol=0.0)
    assert optimizer.state[param].keys() == {"step", "exp_avg", "exp_avg_sq"}
