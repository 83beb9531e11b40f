"""A step of FiraAdam beside fira's and the reference's, and gradients with one fault."""

import math

import torch
from fira import FiraAdamW
from torch import nn

from ds_fira import FiraAdam
from tests.reference.fira_reference import FiraReference
from tests.reference.gradients import low_rank_gradient, make_weight

LR = 1e-2


SHAPE, EXPERTS = (10, 14), (3, 10, 14)


GROUP = {"rank": 4, "update_proj_gap": 4}


FORMULATIONS = ["released", "paper"]


def make_ours(groups, **settings):
    return FiraAdam(groups, lr=LR, **settings)


def make_fira(groups, **settings):
    return FiraAdamW(groups, lr=LR, no_deprecation_warning=True, **settings)


def ours_and_reference(**changed):
    group = {**GROUP, **changed}
    parameter = nn.Parameter(make_weight(SHAPE))
    return make_ours([{"params": [parameter], **group}]), parameter, FiraReference(parameter, lr=LR, **group)


def spoil(gradient, kind):
    """A copy of ``gradient`` with one fault in it."""
    gradient = gradient.clone()
    if kind == "zero":
        return torch.zeros_like(gradient)
    if kind == "low_rank":
        return low_rank_gradient(gradient.shape, true_rank=4, seed=int(gradient[0, 0].abs() * 1e6))
    if kind != "normal":
        gradient[3, 5] = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf}[kind]
    return gradient


def snapshot(optimizer, parameter):
    return {key: value.clone() for key, value in optimizer.state[parameter].items()}


def assert_same(state, before, keys=None):
    assert set(state) == set(before)
    for key in keys or before:
        assert torch.equal(state[key], before[key]), key
