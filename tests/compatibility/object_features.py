"""Optimizer objects in the place of the config's optimizer, for the features of `feature_jobs.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.ops.op_builder import CPUAdamBuilder

import ds_fira
from tests.compatibility.engines import make_net, trained
from tests.compatibility.option_jobs import PARAMS


def fira_object(ds_config: dict[str, Any]) -> dict[str, Any]:
    """A FiraAdam object in place of the JSON's optimizer."""
    plain = make_net().bfloat16()
    optimizer = ds_fira.FiraAdam(ds_fira.param_groups(plain, **PARAMS))
    return trained(without_optimizer(ds_config), plain=plain, optimizer=optimizer)


def object_of_accelerate(ds_config: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's Adam, made of a FiraAdam's groups by the call that accelerate makes, in the place of the FiraAdam."""
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

    plain = make_net().bfloat16()
    made = ds_fira.FiraAdam(ds_fira.param_groups(plain, **PARAMS))
    with without_compiled_adam():
        replaced = map_pytorch_optim_to_deepspeed(made)
    return trained(without_optimizer(ds_config), plain=plain, optimizer=replaced)


def replaced_object(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Another optimizer that took a FiraAdam's groups."""
    plain = make_net().bfloat16()
    made = ds_fira.FiraAdam(ds_fira.param_groups(plain, **PARAMS))
    return trained(without_optimizer(ds_config), plain=plain, optimizer=torch.optim.Adam(made.param_groups, lr=0.01))


@contextmanager
def without_compiled_adam() -> Iterator[None]:
    """DeepSpeed's Adam for the CPU without its compiled operator, which is asked for no step here."""
    found = CPUAdamBuilder.load
    CPUAdamBuilder.load = lambda *_: SimpleNamespace(create_adam=lambda *_: 0, destroy_adam=lambda *_: 0)
    try:
        yield
    finally:
        CPUAdamBuilder.load = found


def without_optimizer(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The config without its optimizer."""
    return {key: value for key, value in ds_config.items() if key != "optimizer"}
