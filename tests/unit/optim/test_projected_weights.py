"""Which weights ds_fira.param_groups and the constructor's rank project."""

import warnings

import pytest
import torch
from deepspeed.moe.layer import MoE
from torch import nn

import ds_fira
from ds_fira import FiraAdam
from ds_fira.core.selection import find_named_weights, find_projected_weights
from tests.reference.fira_reference import FiraReference
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import drive, run_reference, weight_change_error
from tests.reference.tolerances import FLOAT32_VS_REFERENCE
from tests.unit.optim.model_zoo import (
    EXPECTED,
    GPT2_LINEAR,
    LLAMA_LINEAR,
    RANK,
    Zoo,
    gpt2,
    llama,
    names_of,
    projected_names,
)


@pytest.mark.parametrize("which", EXPECTED)
def test_what_is_projected_by_default(which):
    make, expected = EXPECTED[which]
    model = make()
    groups = ds_fira.param_groups(model, RANK)
    assert projected_names(model, groups) == expected
    assert all(group["rank"] == RANK for group in groups if "rank" in group)


@pytest.mark.parametrize("which", EXPECTED)
def test_a_model_with_a_rank_projects_the_same(which):
    make, expected = EXPECTED[which]
    model = make()
    optimizer = FiraAdam(model, rank=RANK)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    names = names_of(model)
    assert {names[id(p)] for p, state in optimizer.state.items() if "basis" in state} == expected
    assert {names[id(p)] for p in optimizer.state} == set(names.values())


# What only the module says: a bare parameter, and a router that is no linear layer of torch's.
UNKNOWN_BY_NAME = {"zoo": {"table"}, "mixtral_experts": {"model.layers.0.mlp.gate.weight"}}


@pytest.mark.parametrize("which", EXPECTED)
def test_named_parameters_tell_embeddings_heads_and_biases(which):
    make, expected = EXPECTED[which]
    model = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no names")
        optimizer = FiraAdam(model.named_parameters(), rank=RANK)
    expected = expected | UNKNOWN_BY_NAME.get(which, set())
    assert projected_names(model, optimizer.param_groups) == expected
    # Those of a group's own are told in the same way.
    parts = [[(n, p) for n, p in model.named_parameters() if ("embed" in n) is kind] for kind in (True, False)]
    optimizer = FiraAdam([{"params": part} for part in parts if part], rank=RANK)
    assert projected_names(model, optimizer.param_groups) == expected


def test_parameters_without_names_are_all_projected_with_one_warning():
    model = llama()
    with pytest.warns(UserWarning, match="no names") as caught:
        optimizer = FiraAdam(model.parameters(), rank=RANK)
    assert len(caught) == 1
    count = sum(p.ndim == 2 for p in model.parameters())
    assert str(caught[0].message) == (
        f"FiraAdam: these parameters have no names, so all {count} matrices are projected, embeddings and heads too, "
        "if any; pass the model, as in FiraAdam(model, rank=3), or ds_fira.param_groups(model, rank=3), to project "
        "linear layers only."
    )
    assert caught[0].filename == __file__
    projected = [p for group in optimizer.param_groups if "rank" in group for p in group["params"]]
    assert {id(p) for p in projected} == {id(p) for p in model.parameters() if p.ndim == 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FiraAdam(nn.Linear(8, 6).parameters(), rank=RANK)


def test_a_model_does_not_have_to_be_alive_to_be_told_apart():
    """Nothing is looked up but what the constructor is given."""
    weights = [p for p in llama().parameters() if p.ndim == 2]
    model = llama()
    with pytest.warns(UserWarning, match="no names"):
        optimizer = FiraAdam([*weights, *(p for p in model.parameters() if p.ndim == 2)], rank=RANK)
    assert len(optimizer.param_groups) == 1


def test_part_of_a_model():
    model = llama()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    expected = {name for name in LLAMA_LINEAR if ".layers.1." in name}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for given in (model, named):
        optimizer = FiraAdam(given, rank=RANK)
        assert projected_names(model, optimizer.param_groups) == expected
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)


def test_a_model_and_its_named_parameters_resume_a_run_of_either():
    """Both have the groups that a flat list had: what is projected, then the rest, weight decay for both."""
    model, twin = llama(), llama()
    first, second = FiraAdam(model, rank=RANK, weight_decay=0.1), FiraAdam(twin.named_parameters(), rank=RANK)
    assert [group["param_names"] for group in first.param_groups] == [g["param_names"] for g in second.param_groups]
    assert {group["weight_decay"] for group in first.param_groups} == {0.1}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    second.load_state_dict(first.state_dict())
    assert len(second.state) == len(list(model.parameters()))
    with pytest.warns(UserWarning, match="no names"):
        unnamed = FiraAdam(twin.parameters(), rank=RANK)
    with pytest.raises(ValueError, match=r"FiraAdam: .*pass the model, as in FiraAdam\(model, rank=\.\.\.\)"):
        unnamed.load_state_dict(first.state_dict())


def test_a_bare_matrix_is_projected():
    matrix, vector = nn.Parameter(make_weight((8, 12))), nn.Parameter(make_weight((5,)))
    optimizer, start = FiraAdam([matrix, vector], rank=RANK, update_proj_gap=4), matrix.detach().clone()
    gradients = make_gradients((8, 12), 9)
    vector.grad = torch.ones(5)
    drive(optimizer, matrix, gradients)
    expected = run_reference(FiraReference(start, rank=RANK, update_proj_gap=4), gradients)
    assert weight_change_error(start, matrix.detach(), expected) <= FLOAT32_VS_REFERENCE
    assert "basis" not in optimizer.state[vector]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], {n for n in LLAMA_LINEAR if "q_proj" in n}),
        (
            ["mlp", "layers.0.self_attn.o"],
            {n for n in LLAMA_LINEAR if "mlp" in n} | {"model.layers.0.self_attn.o_proj.weight"},
        ),
        (["lm_head"], {"lm_head.weight"}),
        ("v_proj", {n for n in LLAMA_LINEAR if "v_proj" in n}),
    ],
    ids=["one name", "names and paths", "the head", "a string"],
)
def test_target_modules(targets, expected):
    model = llama()
    assert projected_names(model, ds_fira.param_groups(model, RANK, targets)) == expected
    for given in (model, model.named_parameters()):
        optimizer = FiraAdam(given, rank=RANK, target_modules=targets)
        assert projected_names(model, optimizer.param_groups) == expected
    with pytest.raises(
        ValueError, match=r"target_modules = .* need names.*pass the model, as in FiraAdam\(model, rank=3"
    ):
        FiraAdam(model.parameters(), rank=RANK, target_modules=targets)


def test_target_modules_pick_conv1d_and_experts_but_nothing_else():
    model = gpt2()
    assert projected_names(model, ds_fira.param_groups(model, RANK, ["attn", "wte", "ln_"])) == {
        n for n in GPT2_LINEAR if "attn" in n
    }
    zoo = Zoo()
    experts = {"experts.up_proj", "experts.down_proj"}
    targets = ["experts", "norm", "embed"]
    assert projected_names(zoo, ds_fira.param_groups(zoo, RANK, targets)) == experts
    named = FiraAdam(zoo.named_parameters(), rank=RANK, target_modules=targets)
    assert projected_names(zoo, named.param_groups) == experts


def test_a_head_of_any_name_is_known_by_its_place_and_shape():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(30, 8)
            self.positions = nn.Embedding(8, 8)  # of the shape of the square layer, which is no head
            self.square = nn.Linear(8, 8, bias=False)
            self.to_vocabulary = nn.Linear(8, 30, bias=False)

    model = Model()
    projected = ds_fira.param_groups(model, rank=2)[0]["params"]
    assert len(projected) == 1
    assert projected[0] is model.square.weight


def test_the_router_of_an_moe_layer_is_projected_only_where_it_is_named() -> None:
    """DeepSpeed's, a linear layer, by its class or by its name; `target_modules` can ask for it."""
    moe = MoE(8, nn.Linear(8, 12), num_experts=6)
    router, (expert, *_) = moe.deepspeed_moe.gate.wg.weight, moe.deepspeed_moe.experts.deepspeed_experts
    for found, find in ((moe, find_projected_weights), (list(moe.named_parameters()), find_named_weights)):
        assert id(expert.weight) in find(found)
        assert id(router) not in find(found)
        assert id(router) in find(found, ["gate"])
