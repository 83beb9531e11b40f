"""Wrong settings and parameters stop at once, with a message that names the key, the value and a way out."""

import math
import re
import warnings

import pytest
import torch
from torch import nn

import ds_fira
from ds_fira import FiraAdam
from ds_fira.optim import settings
from ds_fira.optim.settings import check_params
from tests.reference.gradients import make_weight
from tests.reference.harness import with_a_rank

WRONG_VALUES = [
    ("rank", 0),
    ("rank", -3),
    ("rank", 2.5),
    ("rank", "many"),
    ("update_proj_gap", 0),
    ("update_proj_gap", -1),
    ("update_proj_gap", 1.5),
    ("gamma", 1.0),
    ("gamma", 0.5),
    ("gamma", math.nan),
    ("lr", -1e-3),
    ("lr", math.nan),
    ("lr", math.inf),
    ("eps", -1e-8),
    ("weight_decay", -0.1),
    ("betas", (1.0, 0.999)),
    ("betas", (0.9, 1.0)),
    ("betas", (-0.1, 0.9)),
    ("betas", (0.9,)),
    ("betas", 0.9),
    ("proj_type", "full"),
    ("proj_type", "diagonal"),
    ("scaling", "row"),
    ("limiter", "clip"),
    ("formulation", "published"),
    ("subspace", "magic"),
    ("refresh_moments", "forget"),
    ("refresh_limiter", "none"),
    ("stagger", 1),
    ("state_dtype", "float16"),
    ("state_dtype", "int4"),
    ("matmul_precision", "high"),
    ("exact_cuts", "yes"),
    ("capturable", "yes"),
    ("alpha", math.nan),
    ("residual_scale", math.nan),
]
ids = [f"{key}={value}" for key, value in WRONG_VALUES]


def assert_names(error, key, value):
    """The message holds the key, the value as written, and goes on with what to do instead."""
    message = str(error.value)
    assert key in message, message
    assert repr(value) in message or str(value) in message, message
    remedy = message.split(str(value) if repr(value) not in message else repr(value), 1)[1]
    assert len(re.findall(r"[A-Za-z]+", remedy)) >= 4, f"no remedy in: {message}"
    assert "\n" not in message, "one sentence, not a validation dump"


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=ids)
def test_json_params(key, value):
    with pytest.raises(ValueError, match=key) as error:
        check_params({"rank": 4, key: value})
    assert_names(error, key, value)


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=ids)
def test_constructor(key, value):
    with pytest.raises(ValueError, match=key) as error:
        FiraAdam([nn.Parameter(make_weight((6, 8)))], **{"rank": 4, key: value})
    assert_names(error, key, value)


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=ids)
@pytest.mark.parametrize("when", ["in_the_constructor", "add_param_group"])
def test_param_group(key, value, when):
    group = {"params": [nn.Parameter(make_weight((6, 8)))], "rank": 4, key: value}
    optimizer = FiraAdam([nn.Parameter(make_weight((6, 8)))], rank=4)
    with pytest.raises(ValueError, match=key) as error:
        FiraAdam([group]) if when == "in_the_constructor" else optimizer.add_param_group(group)
    assert_names(error, key, value)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=ids)
def test_param_groups_helper(key, value):
    with pytest.raises(ValueError, match=key) as error:
        ds_fira.param_groups(nn.Sequential(nn.Linear(6, 8)), **{"rank": 4, key: value})
    assert_names(error, key, value)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("rnak", "rank"),
        ("update_gap", "update_proj_gap"),
        ("proj", "proj_type"),
        ("weight_deacy", "weight_decay"),
        ("target_module", "target_modules"),
        ("learning_rate", "lr"),
        ("Alpha", "alpha"),
        ("residual_scaling", "residual_scale"),
    ],
)
def test_an_unknown_setting_names_the_nearest_legal_one(typo, meant):
    with pytest.raises(ValueError, match="unknown") as error:
        check_params({"rank": 4, typo: 3})
    message = str(error.value).split("Legal")[0]
    assert repr(typo) in message, message
    assert repr(meant) in message, message


def test_a_deprecated_setting_is_said_once(monkeypatch):
    """Wherever it stands, and only where it makes a difference; it still works."""
    sentence = (
        r"^FiraAdam: refresh_limiter = 'reset' is deprecated, because it has no effect on perplexity "
        r"\(docs/reproduction\.md\); remove it\.$"
    )
    reset = {"refresh_limiter": "reset"}

    def weight():
        return nn.Parameter(make_weight((6, 8)))

    ways = [
        lambda: FiraAdam([weight()], rank=2, **reset),
        lambda: FiraAdam([{"params": [weight()], "rank": 2, **reset}]),
        lambda: FiraAdam([weight()], rank=2).add_param_group({"params": [weight()], "rank": 2, **reset}),
    ]
    for way in ways:
        monkeypatch.setattr(settings, "_said", set())
        with pytest.warns(DeprecationWarning, match=sentence) as said:
            way()
        assert len(said) == 1
        assert said[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            way()
            FiraAdam([weight()], rank=2, refresh_limiter="keep")


def test_an_unknown_keyword_of_the_constructor():
    """A wrong call, as in Python, with the sentence of a wrong setting."""
    for kind in (FiraAdam, ds_fira.GaLoreAdam, ds_fira.ApolloAdam, ds_fira.FiraRMSProp):
        for error in (TypeError, ValueError):
            with pytest.raises(error, match=rf"^{kind.__name__}: unknown setting 'rnak' = 4; did you mean 'rank'\?"):
                kind([nn.Parameter(make_weight((6, 8)))], rnak=4)


def test_positional_arguments_are_torchs():
    weights = [nn.Parameter(make_weight((6, 8)))]
    (group,) = FiraAdam(weights, 0.1, (0.8, 0.9), 1e-4, 0.2, rank=4).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.9), 1e-4, 0.2)
    with pytest.raises(TypeError, match="too many positional"):
        FiraAdam(weights, 0.1, (0.8, 0.9), 1e-4, 0.2, 4)
    with pytest.raises(TypeError, match="'lr'"):
        FiraAdam(weights, 0.1, lr=0.1, rank=4)
    with pytest.raises(ValueError, match=r"FiraAdam: max_group_bytes = 8 is a setting of DeepSpeed configs"):
        FiraAdam(weights, rank=4, max_group_bytes=8)


def test_good_settings_come_back_filled_in():
    checked = check_params({"lr": 0.02, "betas": [0.9, 0.95], "rank": 8})
    assert checked["lr"] == 0.02
    assert tuple(checked["betas"]) == (0.9, 0.95)
    assert checked["rank"] == 8
    assert (checked["eps"], checked["gamma"], checked["update_proj_gap"]) == (1e-6, 1.01, 200)
    assert (checked["alpha"], checked["proj_type"], checked["formulation"]) == (1.0, "std", "released")
    assert check_params({})["rank"] is None


def test_target_modules_without_rank():
    with pytest.raises(ValueError, match=r"target_modules.*rank"):
        check_params({"target_modules": ["mlp"]})
    model = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ValueError, match=r"target_modules.*rank"):
        FiraAdam(model.parameters(), target_modules=["0"])


@pytest.mark.parametrize("targets", [["no_such_module"], [], [""], ["1"]], ids=str)
def test_target_modules_that_match_nothing(targets):
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    with pytest.raises(ValueError, match="target_modules") as error:
        ds_fira.param_groups(model, 4, targets)
    assert repr(targets) in str(error.value)
    for given in (model, model.named_parameters()):
        with pytest.raises(ValueError, match="target_modules"):
            FiraAdam(given, rank=4, target_modules=targets)


def test_a_model_with_nothing_to_project():
    with pytest.warns(UserWarning, match="rank = 4, but none of the 2 trained parameters is a linear weight"):
        groups = ds_fira.param_groups(nn.Sequential(nn.LayerNorm(8)), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FiraAdam(groups)


@pytest.mark.parametrize("group", [{"rank": 4}, {}], ids=["projected", "adamw"])
def test_sparse_gradients(group):
    embedding = nn.Embedding(8, 6, sparse=True)
    optimizer = FiraAdam(with_a_rank({"params": [embedding.weight], **group}))
    embedding(torch.tensor([1, 2])).sum().backward()
    assert embedding.weight.grad.is_sparse
    with pytest.raises(ValueError, match="sparse") as error:
        optimizer.step()
    assert len(str(error.value).split()) >= 6, "no remedy"


@pytest.mark.parametrize("group", [{"rank": 4}, {}], ids=["projected", "adamw"])
def test_complex_parameters(group):
    parameter = nn.Parameter(torch.zeros(6, 8, dtype=torch.complex64))
    with pytest.raises(ValueError, match="complex"):
        FiraAdam(with_a_rank({"params": [parameter], **group}))


@pytest.mark.parametrize("shape", [(6,), (), (2, 3, 4, 5)], ids=str)
def test_only_matrices_and_experts_take_a_rank(shape):
    with pytest.raises(ValueError, match="rank") as error:
        FiraAdam([{"params": [nn.Parameter(torch.zeros(shape))], "rank": 4}])
    assert str(tuple(shape)) in str(error.value), "the message must give the shape"
    optimizer = FiraAdam([nn.Parameter(make_weight((6, 8)))], rank=4)
    with pytest.raises(ValueError, match="rank"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(shape))], "rank": 4})


def test_an_empty_parameter_list():
    with pytest.raises(ValueError, match="empty"):
        FiraAdam([])
