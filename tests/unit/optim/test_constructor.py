"""What is made from the fields of the settings: signatures, docstrings, copies of an optimizer, a table of the docs."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from ds_fira import ApolloAdam, FiraAdam, FiraRMSProp, GaLoreAdam
from ds_fira.optim.constructor import settings_table
from ds_fira.optim.settings import LEGAL, TORCH_OPTIONS, check_params
from tests.reference.gradients import make_weight

KINDS = [FiraAdam, GaLoreAdam, ApolloAdam, FiraRMSProp]
PAGE = Path(__file__).resolve().parents[3] / "docs" / "configs.md"


@pytest.mark.parametrize("kind", KINDS)
def test_the_signature_has_every_setting_with_its_default_and_its_type(kind):
    found = inspect.signature(kind).parameters
    settings = check_params({}, algorithm=kind.algorithm)
    del settings["max_group_bytes"]
    assert set(found) == {"params", *settings, *TORCH_OPTIONS}
    assert {name: found[name].default for name in settings} == settings
    assert all(found[name].annotation is not inspect.Parameter.empty for name in settings)
    by_place = [name for name, one in found.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert by_place == ["params"] if kind is FiraRMSProp else ["params", "lr", "betas", "eps", "weight_decay"]
    assert all(f"        {name}: " in kind.__doc__ for name in settings)


def test_a_subclass_with_a_constructor_of_its_own_has_its_signature():
    class Own(FiraAdam):
        def __init__(self, params, rank, gap=3):
            super().__init__(params, 0.1, rank=rank, update_proj_gap=gap)

    assert list(inspect.signature(Own).parameters) == ["params", "rank", "gap"]
    (group,) = Own([nn.Parameter(make_weight((6, 8)))], 2).param_groups
    assert (group["lr"], group["update_proj_gap"]) == (0.1, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_go_on(kind):
    model = nn.Linear(8, 6)
    optimizer = kind(model, rank=2, lr=0.1)
    model(torch.ones(3, 8)).square().mean().backward()
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is kind
        (weight, *_) = other.param_groups[0]["params"]
        weight.grad = torch.ones_like(weight)
        other.step()
        assert other.param_groups[0]["rank"] == 2
        assert int(other.state[weight]["step"]) == 2


def test_the_page_of_the_docs_says_what_the_fields_say():
    page = PAGE.read_text()
    _, found = page.split("<!-- settings: made by ")
    found = found.partition("-->\n")[2].partition("\n<!-- end of settings -->")[0]
    assert found == settings_table(), "run the command that the page names, and put what it prints there"
    assert all(f"| `{name}` |" in found for name in LEGAL)
