"""What ds_fira.param_groups makes of the users' own groups, and what of these survives."""

import pytest
from torch import nn

import ds_fira
from ds_fira import FiraAdam
from ds_fira.core.selection import projected_weights
from ds_fira.optim.param_groups import build_groups
from ds_fira.optim.settings import check_params
from tests.reference.gradients import make_gradients, make_weight
from tests.unit.optim.model_zoo import EXPECTED, LLAMA_LINEAR, RANK, Zoo, decay_of, llama, names_of, projected_names


def test_the_constructors_rank_does_not_leak_into_groups_without_one():
    plain, projected = nn.Parameter(make_weight((8, 12))), nn.Parameter(make_weight((8, 12)))
    late = nn.Parameter(make_weight((8, 12)))
    optimizer = FiraAdam([{"params": [plain]}, {"params": [projected], "rank": 2}], rank=5)
    optimizer.add_param_group({"params": [late]})
    for parameter in (plain, projected, late):
        parameter.grad = make_gradients((8, 12), 1)[0]
    optimizer.step()
    assert set(optimizer.state[plain]) == set(optimizer.state[late]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[projected]["exp_avg"].shape == (2, 12)


@pytest.mark.parametrize("which", EXPECTED)
def test_every_parameter_is_in_one_group_once(which):
    model = EXPECTED[which][0]()
    groups = ds_fira.param_groups(model, RANK, alpha=0.25, weight_decay=0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}
    assert all(group["params"] for group in groups)
    FiraAdam(groups)


def test_settings_reach_the_projected_groups_and_norms_and_biases_are_not_decayed():
    model = Zoo()
    settings = {"alpha": 0.25, "gamma": 1.1, "update_proj_gap": 7, "formulation": "paper", "proj_type": "left"}
    groups = ds_fira.param_groups(model, RANK, weight_decay=0.1, lr=0.03, **settings)
    for group in groups:
        assert group["lr"] == 0.03
        if "rank" in group:
            assert {key: group[key] for key in settings} == settings
    decays = decay_of(model, groups)
    assert decays == {name: 0.0 if name.endswith("bias") or name.startswith("norm") else 0.1 for name in decays}
    assert {n for n, d in decays.items() if d == 0.0} >= {"norm.weight", "norm.bias", "q_proj.bias", "conv.bias"}


def test_llama_norms_are_not_decayed():
    model = llama()
    decays = decay_of(model, ds_fira.param_groups(model, RANK, weight_decay=0.1))
    assert {name for name, decay in decays.items() if decay == 0.0} == {n for n in decays if "norm" in n}


def test_the_users_groups_survive_the_split():
    model = llama()
    first = [p for n, p in model.named_parameters() if "layers.0" in n]
    others = [p for n, p in model.named_parameters() if "layers.0" not in n]
    groups = ds_fira.param_groups(
        model,
        RANK,
        groups=[
            {"params": first, "lr": 0.5, "weight_decay": 0.3, "name": "bottom"},
            {"params": others, "lr": 0.25, "name": "top", "betas": (0.8, 0.9)},
        ],
        alpha=0.5,
    )
    names = names_of(model)
    assert projected_names(model, groups) == LLAMA_LINEAR
    seen = []
    for group in groups:
        in_first = {"layers.0" in names[id(p)] for p in group["params"]}
        assert len(in_first) == 1, "a group mixes two of the user's groups"
        bottom = in_first.pop()
        assert group["name"].startswith("bottom" if bottom else "top")
        assert group["lr"] == (0.5 if bottom else 0.25)
        assert group.get("betas") == (None if bottom else (0.8, 0.9))
        if bottom:
            assert group["weight_decay"] == 0.3
        seen += [id(p) for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in [*first, *others])
    optimizer = FiraAdam(groups, lr=1e-3)
    assert {g["lr"] for g in optimizer.param_groups} == {0.5, 0.25}


def test_a_user_group_may_hold_part_of_the_model():
    model = llama()
    chosen = list(model.model.layers[1].parameters())
    groups = ds_fira.param_groups(model, RANK, groups=[{"params": chosen, "lr": 0.1}])
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in chosen}


def test_a_rank_in_the_config_does_not_leak_into_groups_that_say_it_themselves():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 5))
    groups = [{"params": [model[0].weight], "rank": 2}, {"params": [model[1].weight, *model[2].parameters()]}]
    with pytest.warns(UserWarning, match=r"rank = 3 in the DeepSpeed config is not used.*remove rank"):
        built = build_groups(model, groups, check_params({"rank": 3}), zero_stage=2, dp_size=2)
    assert [group.get("rank") for group in built] == [2, None]
    assert [group.get("rank") for group in build_groups(model, groups, check_params({}), 2, 2)] == [2, None]


def test_no_partition_of_a_group_is_larger_than_the_cap():
    model = llama()
    cap = 4 * max(p.numel() for name, p in model.named_parameters() if "mlp" in name)
    settings = check_params({"rank": RANK, "max_group_bytes": cap})
    for dp_size in (1, 2, 3):
        capped = build_groups(model, model.parameters(), settings, zero_stage=2, dp_size=dp_size)
        free = build_groups(model, model.parameters(), check_params({"rank": RANK}), zero_stage=2, dp_size=dp_size)
        assert len(capped) > len(free)
        for group in capped:
            # What does not divide by the ranks is less than a matrix on each.
            assert 4 * sum(p.numel() for p in group["params"]) <= cap * dp_size or len(group["params"]) <= dp_size
        for groups in (capped, free):
            assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    (together,) = [g for g in build_groups(model, model.parameters(), settings, 0, 2) if "rank" in g]
    assert {id(p) for p in together["params"]} == projected_weights(model).keys()
