"""Edges of what torch allows: eps = 0, empty parameters, a learning rate in a tensor, options of torch's optimizers."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import nn

import ds_fira
from ds_fira import ApolloAdam, FiraAdam, FiraRMSProp, GaLoreAdam
from ds_fira.optim.settings import TORCH_OPTIONS, check_params
from tests.distributed.edge_jobs import Convolved, tokens_of
from tests.reference.fira_reference import AdamWReference
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import drive, run_reference, weight_change_error, with_a_rank
from tests.reference.tolerances import FLOAT32_VS_REFERENCE

LR = 0.01
PROJECTED = {"rank": 3, "update_proj_gap": 2}


@pytest.mark.parametrize("kernel", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("eps", [0.0, 1e-50], ids=str)
@pytest.mark.parametrize("group", [PROJECTED, {}], ids=["projected", "adamw"])
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)], ids=str)
def test_eps_of_zero_with_nothing_in_a_row_and_a_column(shape, group, eps, kernel, kernels_allowed):
    """0 / 0 is 0: what has never had a gradient stays, but for weight decay; 1e-50 is zero in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    param = nn.Parameter(make_weight(shape).to(device))
    start, found = param.detach().clone(), []
    groups = with_a_rank({"params": [param], "eps": eps, "weight_decay": 0.1, **group})
    optimizer = FiraAdam(groups, lr=LR, kernels="auto" if kernel else "off")
    for gradient in make_gradients(shape, 5):
        gradient[2], gradient[:, 4] = 0.0, 0.0
        found.append(gradient.to(device))
    drive(optimizer, param, found)
    kept = start * (1 - LR * 0.1) ** 5
    assert torch.isfinite(param).all()
    assert all(torch.isfinite(value).all() for value in optimizer.state[param].values())
    if not group:
        torch.testing.assert_close(param[2], kept[2])
        torch.testing.assert_close(param[:, 4], kept[:, 4])
    assert (param[0, :3] - kept[0, :3]).abs().min() > 1e-4


def test_what_had_no_gradient_takes_up_its_first_one():
    """With eps = 0 a first step is that of Adam from then on."""
    param = nn.Parameter(make_weight((6, 5)))
    start, gradients = param.detach().clone(), make_gradients((6, 5), 6)
    for gradient in gradients[:3]:
        gradient[1, 1] = 0.0
    optimizer = FiraAdam(with_a_rank({"params": [param], "eps": 0.0}), lr=LR)
    drive(optimizer, param, gradients)
    reference = AdamWReference(start, lr=LR, eps=1e-30)
    assert weight_change_error(start, param.detach(), run_reference(reference, gradients)) <= FLOAT32_VS_REFERENCE


@pytest.mark.parametrize("group", [PROJECTED, {}], ids=["projected", "plain"])
def test_eps_of_zero_in_rmsprop(group):
    param = nn.Parameter(make_weight((8, 12)))
    optimizer = FiraRMSProp(with_a_rank({"params": [param], "eps": 0.0, **group}), lr=LR)
    gradients = make_gradients((8, 12), 3)
    for gradient in gradients:
        gradient[2], gradient[:, 4] = 0.0, 0.0
    assert torch.isfinite(drive(optimizer, param, gradients)).all()


def test_scaling_factors_with_eps_of_zero():
    param = nn.Parameter(make_weight((8, 12)))
    optimizer = FiraAdam(with_a_rank({"params": [param], "eps": 0.0}), lr=LR, record_scaling_factors=1)
    gradients = make_gradients((8, 12), 3)
    for gradient in gradients:
        gradient[:, 4] = 0.0
    drive(optimizer, param, gradients)
    (one,) = ds_fira.scaling_factors(optimizer).values()
    assert one["steps"] == [1, 2, 3]
    assert one["matrix"].isfinite().all()


@pytest.mark.parametrize(
    ("shape", "rank"),
    [*itertools.product([(0, 6), (6, 0), (2, 0, 6)], [None, 3]), ((0,), None)],
    ids=str,
)
def test_an_empty_parameter_is_nothing_to_do(shape, rank):
    """Alone, beside a matrix, in a group with a rank or without; saved and loaded."""

    def make():
        empty, matrix = nn.Parameter(torch.zeros(shape)), nn.Parameter(make_weight((6, 8)))
        groups = [{"params": [matrix], "rank": 3}, {"params": [empty], "rank": rank}]
        return empty, matrix, FiraAdam(groups, lr=LR, record_scaling_factors=1)

    empty, matrix, optimizer = make()
    gradients = make_gradients((6, 8), 4)
    for gradient in gradients[:2]:
        matrix.grad, empty.grad = gradient.clone(), torch.zeros(shape)
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other_empty, other, resumed = make()
    with torch.no_grad():
        other.copy_(matrix)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for gradient in gradients[2:]:
        for one, own, whole in ((optimizer, empty, matrix), (resumed, other_empty, other)):
            whole.grad, own.grad = gradient.clone(), torch.zeros(shape)
            one.step()
    assert torch.equal(other, matrix)
    report = ds_fira.memory_report(optimizer)
    assert report["adamw_bytes"] == 8 * 48
    assert list(ds_fira.scaling_factors(optimizer)) == ["parameter 0"]


def test_an_empty_weight_in_a_flat_list_and_in_engines(ranks):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 0))
    optimizer = FiraAdam(model.parameters(), rank=2)
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    results = ranks.run(2, "train_with_an_empty_weight", "tests.distributed.edge_jobs", stages=[0, 2])
    for rank, losses in enumerate(results):
        assert all(len(listed) == 3 for listed in losses), rank


@pytest.mark.parametrize("preset", [None, "recommended"])
def test_a_model_without_linear_weights_takes_adamws_steps(ranks, preset):
    """At every stage as in one process with the whole batch; one rank says once that nothing is projected."""
    first, second = ranks.run(
        2, "train_without_linear_weights", "tests.distributed.edge_jobs", stages=[0, 1, 2, 3], preset=preset
    )
    torch.manual_seed(0)
    model = Convolved()
    with pytest.warns(
        UserWarning, match="rank = 2, but none of the 5 trained parameters is a linear weight to project"
    ):
        optimizer = FiraAdam(model, rank=2, **({"preset": preset} if preset else {"lr": 0.01}))
    start = [param.detach().clone() for param in model.parameters()]
    for step in range(3):
        (sum(model(tokens_of(step, rank)) for rank in range(2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (told, weights), (other, _) in zip(first, second, strict=True):
        assert len(told) == 1
        assert not other
        for before, expected, weight in zip(start, model.parameters(), weights, strict=True):
            assert not torch.equal(before, weight)
            torch.testing.assert_close(weight, expected.detach(), rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("where", ["constructor", "group", "param_groups"])
def test_a_learning_rate_in_a_tensor_is_read_in_every_step(where):
    """As in torch: whoever holds the tensor changes the learning rate in place."""
    lr, model = torch.tensor(LR), nn.Linear(8, 6)
    twin = copy.deepcopy(model)
    if where == "constructor":
        optimizer = FiraAdam(model.parameters(), lr=lr, rank=2)
    elif where == "group":
        optimizer = FiraAdam([{"params": list(model.parameters()), "lr": lr}], rank=2)
    else:
        optimizer = FiraAdam(ds_fira.param_groups(model, 2, lr=lr))
    assert all(group["lr"] is lr for group in optimizer.param_groups)
    other = FiraAdam(twin.parameters(), lr=LR, rank=2)
    for step, gradient in enumerate(make_gradients((6, 8), 4)):
        lr.fill_(LR / (1 + step))
        for group in other.param_groups:
            group["lr"] = float(lr)
        for one in (model, twin):
            one.weight.grad, one.bias.grad = gradient.clone(), gradient[:, 0].clone()
        optimizer.step()
        other.step()
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(model.bias, twin.bias)
    # A resume sets the tensor, which a scheduler or the user goes on changing.
    saved = optimizer.state_dict()
    assert torch.equal(saved["param_groups"][0]["lr"], lr)
    again = torch.tensor(0.5)
    fresh = FiraAdam(nn.Linear(8, 6).parameters(), lr=again, rank=2)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["lr"] is again
    assert float(again) == float(lr)
    plain = FiraAdam(nn.Linear(8, 6).parameters(), lr=0.5, rank=2)
    plain.load_state_dict(saved)
    assert plain.param_groups[0]["lr"] == float(lr)
    assert isinstance(plain.param_groups[0]["lr"], float)


def test_a_scheduler_changes_a_learning_rate_in_a_tensor():
    lr = torch.tensor(LR)
    optimizer = FiraAdam([nn.Parameter(make_weight((6, 8)))], lr=lr, rank=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert float(lr) == pytest.approx(LR / 2)


@pytest.mark.parametrize("lr", [torch.tensor([0.1, 0.2]), torch.tensor(-1.0), torch.tensor(float("nan"))], ids=str)
def test_a_tensor_that_is_no_learning_rate(lr):
    with pytest.raises(ValueError, match=r"lr = tensor\(.* is not legal; give a learning rate of at least 0"):
        FiraAdam([nn.Parameter(make_weight((6, 8)))], lr=lr, rank=2)


@pytest.mark.parametrize("name", TORCH_OPTIONS)
@pytest.mark.parametrize("kind", [FiraAdam, GaLoreAdam, ApolloAdam, FiraRMSProp])
def test_options_of_torch_that_are_off_pass_and_others_are_refused(kind, name):
    """In the constructor, in a group, in a JSON config."""
    for value in (None, False):
        group = {"params": [nn.Parameter(make_weight((6, 8)))], name: value}
        assert len(kind([group], rank=2, **{name: value}).param_groups) == 1
        assert name not in check_params({"rank": 2, name: value}, algorithm=kind.algorithm)
    refused = rf"{kind.__name__}.*: {name} = True is not supported; remove it, .*"
    with pytest.raises(ValueError, match=refused):
        kind([nn.Parameter(make_weight((6, 8)))], rank=2, **{name: True})
    with pytest.raises(ValueError, match=refused):
        kind([{"params": [nn.Parameter(make_weight((6, 8)))], name: True}], rank=2)
    with pytest.raises(ValueError, match=refused):
        check_params({"rank": 2, name: True}, algorithm=kind.algorithm)


def test_a_layer_thawed_in_an_engine_stops_every_rank(ranks):
    """No optimizer steps it at any stage of ZeRO; what is frozen throughout is no hindrance."""
    told = ranks.run(2, "thaw", "tests.distributed.edge_jobs", stages=[0, 1, 2, 3], thawed=True)
    assert told[0] == told[1]
    for sentence in told[0]:
        assert "NAME had requires_grad = False when deepspeed.initialize was called" in sentence, told
    assert ranks.run(2, "thaw", "tests.distributed.edge_jobs", stages=[0, 3], thawed=False) == [["trained"] * 2] * 2
