"""The groups that the user gave, over the parts that the optimizer makes of them; without an engine."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import ds_fira
from ds_fira import FiraAdam
from ds_fira.optim.registry import fira_of

# What `test_what_a_scheduler_with_a_value_for_each_group_takes` asks for.
pytestmark = pytest.mark.filterwarnings("ignore:FiraAdam. your 2 param groups are stepped in")


class Layers(nn.Module):
    """Two linear layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The outputs."""
        return self.second(self.first(inputs))


def optimizer_of_two() -> FiraAdam:
    """A group for each layer, of which the second has a rate of its own; each is stepped in two parts."""
    model = Layers()
    groups = [
        {"params": list(model.first.named_parameters("first"))},
        {"params": list(model.second.named_parameters("second")), "lr": 0.5, "name": "second"},
    ]
    return FiraAdam(groups, lr=0.1, rank=2)


def rates(optimizer: FiraAdam) -> list[float]:
    """Of every part."""
    return [group["lr"] for group in optimizer.param_groups]


def test_what_a_scheduler_with_a_value_for_each_group_takes() -> None:
    """Torch says only that it counts other groups; so the optimizer says it when it is made, where there are parts."""
    with pytest.warns(UserWarning, match="your 2 param groups are stepped in 4 parts, .* optimizer.user_groups"):
        optimizer = optimizer_of_two()
    with pytest.raises(ValueError, match="Expected 4 lr_lambdas, but got 2"):
        LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.5])
    LambdaLR(optimizer.user_groups, [lambda _: 1.0, lambda _: 0.5])
    assert rates(optimizer) == [0.1, 0.1, 0.25, 0.25]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Layers()
        FiraAdam(model, lr=0.1, rank=2)  # one group
        FiraAdam(ds_fira.param_groups(model, rank=2), lr=0.1)  # those that are stepped


def test_a_group_is_all_of_its_parts() -> None:
    optimizer = optimizer_of_two()
    assert rates(optimizer) == [0.1, 0.1, 0.5, 0.5]
    first, second = optimizer.user_groups.param_groups
    assert [tuple(param.shape) for param in second["params"]] == [(6, 8), (6,)]
    assert second["param_names"] == ["second.weight", "second.bias"]
    assert (first["lr"], second["lr"], second["rank"], second["name"]) == (0.1, 0.5, 2, "second")
    second["lr"] = 0.25
    second.setdefault("initial_lr", 0.5)
    second["rank"] = 3
    assert rates(optimizer) == [0.1, 0.1, 0.25, 0.25]
    assert [group.get("initial_lr") for group in optimizer.param_groups] == [None, None, 0.5, 0.5]
    # A part that is not projected stays so.
    assert [group.get("rank") for group in optimizer.param_groups] == [2, None, 3, None]
    assert {**second} == dict(second)
    assert len(second) == len(set(second))
    del second["initial_lr"]
    assert "initial_lr" not in second
    for missing in (lambda: second["initial_lr"], lambda: second.pop("initial_lr")):
        with pytest.raises(KeyError):
            missing()
    with pytest.raises(ValueError, match="'params' of a group cannot be set, because the group is stepped in 2 parts"):
        second["params"] = []


def test_a_scheduler_of_torchs_takes_a_value_a_group() -> None:
    """And is told that the optimizer has stepped."""
    optimizer = optimizer_of_two()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = LambdaLR(optimizer.user_groups, [lambda step: 0.5**step, lambda step: 0.1**step])
        for _ in range(2):
            optimizer.step()
            scheduler.step()
    assert rates(optimizer) == pytest.approx([0.025, 0.025, 0.005, 0.005])
    assert scheduler.get_last_lr() == pytest.approx([0.025, 0.005])
    plateau = ReduceLROnPlateau(optimizer.user_groups, patience=0, min_lr=[0.02, 0.0])
    for _ in range(3):
        plateau.step(1.0)
    assert rates(optimizer) == pytest.approx([0.02, 0.02, 0.00005, 0.00005])


def test_a_rate_that_is_a_tensor_is_that_of_all_parts() -> None:
    """Also where each part has come to have one of its own."""
    optimizer = optimizer_of_two()
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    scheduler = LambdaLR(optimizer.user_groups, [lambda step: 0.5**step, lambda step: 0.1**step])
    optimizer.step()
    scheduler.step()
    assert [float(lr) for lr in rates(optimizer)] == pytest.approx([0.05, 0.05, 0.05, 0.05])
    assert rates(optimizer)[0] is rates(optimizer)[1]


def test_too_early_a_step_of_the_scheduler_is_still_said() -> None:
    optimizer = optimizer_of_two()
    scheduler = LambdaLR(optimizer.user_groups, [lambda step: 1.0, lambda step: 1.0])
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()


def test_it_is_the_optimizer_in_all_else() -> None:
    optimizer = optimizer_of_two()
    view = optimizer.user_groups
    assert isinstance(view, FiraAdam)
    assert isinstance(view, torch.optim.Optimizer)
    assert fira_of(view) is optimizer
    assert view is optimizer.user_groups
    assert view.state is optimizer.state
    assert view.defaults is optimizer.defaults
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    before = view.param_groups[0]["params"][0].detach().clone()
    view.step()
    assert not torch.equal(before, view.param_groups[0]["params"][0])
    with pytest.raises(AttributeError, match="param_groups cannot be set"):
        view.param_groups = []
    view.check_sync_every = 7
    assert optimizer.check_sync_every == 7
    view.zero_grad()
    assert all(param.grad is None for group in optimizer.param_groups for param in group["params"])
    assert len(view.state_dict()["param_groups"]) == 4
    view.load_state_dict(view.state_dict())
    assert [group["lr"] for group in view.param_groups] == [0.1, 0.5]
    assert "Parameter Group 1" in repr(view)
    assert "Parameter Group 2" not in repr(view)
    assert ds_fira.metrics(view)["matrix_steps"] == 2


def test_copies_have_groups_of_their_own() -> None:
    optimizer = optimizer_of_two()
    for other in (copy.deepcopy(optimizer.user_groups), pickle.loads(pickle.dumps(optimizer.user_groups))):
        assert fira_of(other) is not optimizer
        other.param_groups[0]["lr"] = 0.7
        assert rates(optimizer) == [0.1, 0.1, 0.5, 0.5]


def test_where_nothing_was_split_the_groups_are_the_optimizers() -> None:
    model = Layers()
    optimizer = FiraAdam(ds_fira.param_groups(model, rank=2))
    assert optimizer.user_groups.param_groups is optimizer.param_groups
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert optimizer.user_groups.param_groups is optimizer.param_groups
    split = optimizer_of_two()
    split.add_param_group({"params": [("third", nn.Parameter(torch.zeros(3)))], "lr": 0.3})
    assert [group["lr"] for group in split.user_groups.param_groups] == [0.1, 0.5, 0.3]
