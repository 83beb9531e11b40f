"""Which weights ds_fira.param_groups and the constructor's rank project."""

import pytest
import torch
from torch import nn

import ds_fira
from ds_fira import FiraAdam
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
def test_a_flat_list_with_a_rank_projects_the_same(which):
    make, expected = EXPECTED[which]
    model = make()
    optimizer = FiraAdam(model.parameters(), rank=RANK)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    names = names_of(model)
    assert {names[id(p)] for p, state in optimizer.state.items() if "basis" in state} == expected
    assert {names[id(p)] for p in optimizer.state} == set(names.values())


def test_two_models_in_one_flat_list_keep_their_embeddings_unprojected():
    first, second, bare = Zoo(), llama(), nn.Parameter(torch.zeros(3))
    optimizer = FiraAdam([*first.parameters(), *second.parameters(), bare], rank=RANK)
    projected = {id(p) for group in optimizer.param_groups if group.get("rank") for p in group["params"]}
    expected = {id(dict(first.named_parameters())[name]) for name in EXPECTED["zoo"][1]}
    expected |= {id(dict(second.named_parameters())[name]) for name in LLAMA_LINEAR}
    assert projected == expected


def test_part_of_a_model_in_a_flat_list():
    model = llama()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    optimizer = FiraAdam([p for p in model.parameters() if p.requires_grad], rank=RANK)
    assert projected_names(model, [g for g in optimizer.param_groups if g.get("rank")]) == {
        name for name in LLAMA_LINEAR if ".layers.1." in name
    }


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
    optimizer = FiraAdam(model.parameters(), rank=RANK, target_modules=targets)
    assert projected_names(model, [g for g in optimizer.param_groups if g.get("rank")]) == expected


def test_target_modules_pick_conv1d_and_experts_but_nothing_else():
    model = gpt2()
    assert projected_names(model, ds_fira.param_groups(model, RANK, ["attn", "wte", "ln_"])) == {
        n for n in GPT2_LINEAR if "attn" in n
    }
    zoo = Zoo()
    assert projected_names(zoo, ds_fira.param_groups(zoo, RANK, ["experts", "norm", "embed"])) == {
        "experts.up_proj",
        "experts.down_proj",
    }


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
