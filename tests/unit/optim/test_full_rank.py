"""A rank that saves nothing: such a matrix is stepped unprojected, said once, and a setting keeps the released way."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import ds_fira
from ds_fira import FiraAdam, FiraRMSProp, GaLoreAdam
from ds_fira.checkpoint.reconcile import SavedGroup, saved_projection
from ds_fira.optim.settings import check_params
from ds_fira.optim.state_size import adamw_bytes, state_bytes
from ds_fira.sharding.projection import is_projected
from ds_fira.tools.estimate import Setup, estimate
from tests.distributed.full_rank_jobs import SHAPES
from tests.reference import tolerances
from tests.reference.fira_reference import AdamWReference
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import drive, run_optimizer, run_reference, weight_change_error

LR = 1e-2
PLAIN = {"step", "exp_avg", "exp_avg_sq"}


def llama(width: int, intermediate: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def step_all(optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def readme() -> tuple[nn.Module, list[nn.Parameter]]:
    """README's rank of 128 on a LLaMA of 128."""
    model = llama(128, 344)
    return model, list(model.parameters())


def lora() -> tuple[nn.Module, list[nn.Parameter]]:
    """A rank of 128 on adapters of rank 16."""
    model = peft.get_peft_model(llama(64, 96), peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    return model, [param for param in model.parameters() if param.requires_grad]


@pytest.mark.parametrize("make", [readme, lora])
@pytest.mark.parametrize("kind", [FiraAdam, GaLoreAdam])
def test_states_are_no_larger_than_adamws_and_it_is_said_once(make, kind):
    model, trained = make()
    with pytest.warns(
        UserWarning, match=rf"{kind.__name__}: rank = 128 of \d+ matrices .*stepped unprojected"
    ) as caught:
        optimizer = kind(model, lr=LR, rank=128, alpha=0.25, weight_decay=0.1)
    assert len([one for one in caught if "rank" in str(one.message)]) == 1
    assert "give a smaller rank" in str(caught[0].message)
    assert "project_full_rank" in str(caught[0].message)
    other = copy.deepcopy(model)
    step_all(optimizer)
    assert all(set(optimizer.state[param]) == PLAIN for param in trained)
    counters = 8 * len(trained)
    assert state_bytes(optimizer) - counters == adamw_bytes(optimizer.inventory) == 8 * sum(p.numel() for p in trained)
    report = ds_fira.memory_report(optimizer)
    assert report["paper_formula_bytes"] == report["adamw_bytes"]
    # The paper's states are larger, as the released code has them.
    theirs = kind(other, lr=LR, rank=128, project_full_rank=True)
    step_all(theirs)
    assert state_bytes(theirs) > state_bytes(optimizer)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(12, 20), (16, 16), (2, 9, 7)], ids=str)
def test_the_step_is_adamws_with_lr_times_alpha(shape, weight_decay):
    """Weight decay stays lr x wd: the learning rate it goes by is not the step's."""
    weight, gradients = make_weight(shape), make_gradients(shape, 7)
    group = {"rank": 50, "alpha": 0.25, "weight_decay": weight_decay}
    ours, state = run_optimizer(lambda groups: FiraAdam(groups, lr=LR), weight, gradients, **group)
    assert set(state) == PLAIN
    reference = AdamWReference(weight, lr=0.25 * LR, weight_decay=4 * weight_decay)
    assert weight_change_error(weight, ours, run_reference(reference, gradients)) <= tolerances.FLOAT32_VS_REFERENCE


def test_a_group_without_a_rank_has_no_alpha():
    """The constructor's alpha is of projected groups."""
    param, other = nn.Parameter(make_weight((9,))), nn.Parameter(make_weight((6, 8)))
    optimizer = FiraAdam([{"params": [other], "rank": 2}, {"params": [param]}], lr=LR, alpha=0.25)
    start, gradients = param.detach().clone(), [g[0] for g in make_gradients((1, 9), 5)]
    drive(optimizer, param, gradients)
    expected = run_reference(AdamWReference(start, lr=LR), gradients)
    assert weight_change_error(start, param.detach(), expected) <= tolerances.FLOAT32_VS_REFERENCE


def test_a_rule_is_stepped_so_too():
    weight, gradients = make_weight((12, 12)), make_gradients((12, 12), 5)
    group = {"rank": 12, "alpha": 0.25}
    ours, state = run_optimizer(lambda groups: FiraRMSProp(groups, lr=LR), weight, gradients, **group)
    assert set(state) == {"step", "square_avg"}
    param = nn.Parameter(weight.clone())
    theirs = drive(torch.optim.RMSprop([param], lr=0.25 * LR, alpha=0.99, eps=1e-8), param, gradients)
    assert weight_change_error(weight, ours, theirs) <= tolerances.FLOAT32_VS_REFERENCE


@pytest.mark.parametrize(
    ("shape", "settings", "projected"),
    [
        ((16, 40), {"rank": 15}, True),
        ((16, 40), {"rank": 16}, False),
        ((16, 40), {"rank": 99}, False),
        ((40, 16), {"rank": 16}, False),
        ((3, 16, 40), {"rank": 16}, False),
        ((16, 16), {"rank": 16, "formulation": "paper"}, False),
        # On the larger side both moments are small: (16 x 40) + 2 x 16 x 16 + 1 of 2 x 16 x 40.
        ((16, 40), {"rank": 16, "proj_type": "reverse_std"}, True),
        ((16, 40), {"rank": 16, "proj_type": "right"}, True),
        ((16, 30), {"rank": 16, "proj_type": "reverse_std"}, False),
        # One moment: (16 x 40) + 16 x 16 + 1 of 16 x 40.
        ((16, 40), {"rank": 16, "proj_type": "reverse_std", "method": "FiraRMSProp"}, False),
        ((16, 40), {"rank": 16, "project_full_rank": True}, True),
        ((16, 40), {}, False),
        ((16, 0), {"rank": 4, "project_full_rank": True}, False),
    ],
)
def test_what_is_projected(shape, settings, projected):
    assert is_projected(shape, settings) is projected


def test_the_setting_of_a_group_and_its_check():
    weights = [nn.Parameter(make_weight((8, 12))) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = FiraAdam([{"params": [w], "rank": 8, "project_full_rank": i == 1} for i, w in enumerate(weights)])
    step_all(optimizer)
    assert ["basis" in optimizer.state[weight] for weight in weights] == [False, True]
    with pytest.raises(ValueError, match=r"project_full_rank = 1 is not legal; give true or false"):
        check_params({"rank": 8, "project_full_rank": 1})
    groups = ds_fira.param_groups(llama(16, 24), 16, project_full_rank=True)
    assert [group.get("project_full_rank") for group in groups if "rank" in group] == [True]


def test_a_smaller_rank_that_costs_more_is_said():
    """M r + 2 n r + 1 of 128 x 128 at rank 100 are 38,401 elements, of 32,768."""
    param, wide = nn.Parameter(make_weight((128, 128))), nn.Parameter(make_weight((64, 512)))
    with pytest.warns(
        UserWarning, match=r"rank = 100 of 1 matrices \(1 of 128 x 128\), takes 153,604 bytes .* 131,072"
    ):
        optimizer = FiraAdam([{"params": [param], "rank": 100}, {"params": [wide], "rank": 32}])
    step_all(optimizer)
    assert "basis" in optimizer.state[param]
    assert state_bytes(optimizer) > adamw_bytes(optimizer.inventory) - 4 * wide.numel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FiraAdam([{"params": [wide], "rank": 32}])


@pytest.mark.parametrize("old", [False, True], ids=["setting", "version 0.1.0"])
def test_a_run_alone_goes_on_as_it_was_saved(old):
    """A checkpoint says what its states are of; version 0.1.0 had no setting, and projected."""

    def make(**settings):
        torch.manual_seed(0)
        weights = [nn.Parameter(0.02 * torch.randn(shape)) for shape in SHAPES]
        groups = [{"params": weights, "rank": 8, "update_proj_gap": 2}]
        return weights, FiraAdam(groups, lr=LR, **settings)

    weights, optimizer = make(project_full_rank=True)
    for seed in range(3):
        step_all(optimizer, seed)
    saved = copy.deepcopy(optimizer.state_dict())
    if old:
        for plain in (saved["param_groups"], saved["fira"]["settings"]):
            for group in plain:
                del group["project_full_rank"]
    resumed_weights, resumed = make()
    step_all(resumed)  # what it has learned by then is forgotten
    with torch.no_grad():
        for own, weight in zip(resumed_weights, weights, strict=True):
            own.copy_(weight)
    with pytest.warns(UserWarning, match="project_full_rank goes on from the checkpoint's True, not from False"):
        resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["project_full_rank"] is True
    for seed in range(3, 6):
        step_all(optimizer, seed)
        step_all(resumed, seed)
    for own, weight in zip(resumed_weights, weights, strict=True):
        assert torch.equal(own, weight)
        assert "basis" in resumed.state[own]
        for key, value in optimizer.state[weight].items():
            assert torch.equal(resumed.state[own][key], value), key
    # And back: what was saved unprojected stays so.
    plain_weights, plain = make()
    step_all(plain)
    other_weights, other = make(project_full_rank=True)
    other.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert other.param_groups[0]["project_full_rank"] is False
    step_all(plain, 1)
    step_all(other, 1)
    assert ["basis" in other.state[weight] for weight in other_weights] == [False] * 4 + [True]
    for own, weight in zip(other_weights, plain_weights, strict=True):
        assert all(torch.equal(other.state[own][key], value) for key, value in plain.state[weight].items())


def test_a_group_of_what_was_saved_both_ways_is_refused():
    saved = [
        SavedGroup({"a": (6, 8)}, {}, {"rank": 8, "project_full_rank": True}),
        SavedGroup({"b": (6, 8)}, {}, {"rank": 8, "project_full_rank": False}),
    ]
    listed = [("a", (6, 8)), ("b", (6, 8))]
    with pytest.raises(ValueError, match=r"true for a and false for b .*groups of their own"):
        saved_projection(saved, {"rank": 8}, listed)
    assert saved_projection(saved, {"rank": 4}, listed) is None


@pytest.mark.parametrize("stage", [0, 2])
def test_the_estimate_has_the_same_rule(stage):
    model = llama(16, 24)
    found = estimate(model, Setup(gpus=2, zero_stage=stage, seq_length=8), ["Fira", "AdamW"], rank=16)
    assert found.projected_matrices == 0
    assert found.saving == 0.0
    assert any("weights are stepped unprojected" in note for note in found.notes)
    if stage == 0:
        step_counts = 4 * len(list(model.parameters()))  # int64 of ours, float32 of torch's
        states = [found.methods[name].largest.device.optimizer_states for name in ("Fira", "AdamW")]
        assert states[0] == states[1] + step_counts
    kept = estimate(model, Setup(gpus=2, zero_stage=stage), ["Fira"], rank=16, project_full_rank=True)
    assert kept.projected_matrices == 7
    assert kept.saving < 0.0
    assert not any("unprojected" in note for note in kept.notes)
