"""What the ranks of a test pool run under DDP: bases are counted, state dicts go from one process to many and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ds_fira
from ds_fira.sharding import refresher
from tests.distributed.fsdp_jobs import model_of, optimizer_of
from tests.distributed.zero_jobs import batches

SHAPES = [(12, 9), (7, 14), (8, 8), (12, 9)]
SETTINGS = {"rank": 3, "lr": 0.01, "update_proj_gap": 2, "target_modules": ["layers"]}


def steps(model: nn.Module, fira: Any, first: int, last: int) -> None:
    """Train from one step to another, on other data on every rank."""
    data = batches(last, torch.distributed.get_rank())
    for step in range(first, last):
        model(data[step]).backward()
        fira.step()
        fira.zero_grad()


def bases(given: str) -> tuple[int, int]:
    """In four steps, of four matrices with two refreshes: the bases that this rank computed; its collectives."""
    model, count, compute = DistributedDataParallel(model_of("net", SHAPES)), [0], refresher.new_basis
    settings = {key: value for key, value in SETTINGS.items() if given != "params" or key != "target_modules"}
    if given == "params":
        params = [{"params": [layer.weight for layer in model.module.layers], "rank": 3}]
        fira = ds_fira.FiraAdam(params, lr=0.01, update_proj_gap=2)
    elif given == "compiled":
        fira = optimizer_of(torch.compile(model), "model", settings)
    else:
        fira = optimizer_of(model, given, settings)

    def counted(task: Any) -> Any:
        count[0] += 1
        return compute(task)

    refresher.new_basis = counted
    try:
        steps(model, fira, 0, 4)
    finally:
        refresher.new_basis = compute
    return count[0], 0 if fira.communicator is None else fira.communicator.collectives


def to_and_from_one_process() -> bool:
    """Whether three steps of one process, three under DDP and three of one are nine of one, on the same gradients."""
    settings = {**SETTINGS, "record_scaling_factors": 1}
    model = DistributedDataParallel(model_of("net", SHAPES))
    lone, alone = model_of("net", SHAPES), model_of("net", SHAPES)
    under = ds_fira.FiraAdam(model, **settings)
    before, after = (ds_fira.FiraAdam(each, **settings) for each in (lone, alone))
    trainings = [(lone, before), (model.module, under), (alone, after)]
    data = batches(9, torch.distributed.get_rank())
    reference = model_of("net", SHAPES)
    whole = ds_fira.FiraAdam(reference, **settings)
    for step in range(9):
        current, fira = trainings[step // 3]
        if step in (3, 6):
            earlier, saved = trainings[step // 3 - 1]
            current.load_state_dict(earlier.state_dict())
            fira.load_state_dict(saved.state_dict())
        model.module.load_state_dict(current.state_dict())  # DDP gives all of them their gradients
        model(data[step]).backward()
        gradients = [param.grad.clone() for param in model.parameters()]
        for each in (current, reference):
            for param, gradient in zip(each.parameters(), gradients, strict=True):
                param.grad = gradient.clone()
        fira.step()
        whole.step()
        for each in (model, current, reference):
            each.zero_grad()
    same = all(map(torch.equal, alone.parameters(), reference.parameters()))
    factors = [ds_fira.scaling_factors(each) for each in (after, whole)]
    return same and all(
        factors[0][name]["steps"] == one["steps"] == list(range(1, 10)) for name, one in factors[1].items()
    )
