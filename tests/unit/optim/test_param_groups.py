"""What ds_fira.param_groups and the constructor's rank project, and what of the user's own groups survives."""

import warnings

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import ds_fira
from ds_fira import FiraAdam
from ds_fira.core.selection import projected_weights
from ds_fira.optim.param_groups import build_groups
from ds_fira.optim.settings import check_params
from tests.reference.fira_reference import FiraReference
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import drive, run_reference, weight_change_error
from tests.reference.tolerances import FLOAT32_VS_REFERENCE

RANK = 3


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(2, 8, 12))
        self.gate_bias = nn.Parameter(torch.zeros(2, 12))


class Zoo(nn.Module):
    """One layer of each kind that matters here."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 8)
        self.embed_positions = nn.Embedding(8, 8)
        self.q_proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.experts = Experts()
        self.table = nn.Parameter(torch.randn(4, 8))
        self.lm_head = nn.Linear(8, 30, bias=False)


def llama(tied=False):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=30,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )


def names_of(model):
    return {id(p): name for name, p in model.named_parameters()}


def projected_names(model, groups):
    names = names_of(model)
    return {names[id(p)] for group in groups if "rank" in group for p in group["params"]}


def decay_of(model, groups):
    names = names_of(model)
    return {names[id(p)]: group.get("weight_decay") for group in groups for p in group["params"]}


LLAMA_LINEAR = {
    f"model.layers.{i}.{name}.weight"
    for i in range(2)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
}
GPT2_LINEAR = {f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
MIXTRAL_LINEAR = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"} | {
    f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
}
EXPECTED = {
    "zoo": (Zoo, {"q_proj.weight", "experts.up_proj", "experts.down_proj"}),
    "llama": (llama, LLAMA_LINEAR),
    "llama_tied_head": (lambda: llama(tied=True), LLAMA_LINEAR),
    "gpt2_conv1d_tied_head": (gpt2, GPT2_LINEAR),
    "mixtral_experts": (mixtral, MIXTRAL_LINEAR),
}


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
    ids=str,
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
