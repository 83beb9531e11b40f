"""Which optimizer a DeepSpeed engine is given: by its JSON type, as an object, or by a function that makes one.

Written against DeepSpeed 0.17 to 0.19. What it relies on: `DeepSpeedEngine.client_optimizer` is the object or the
function, None for the JSON type `optimizer_name()`, whose settings are `optimizer_params()`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_fira.core.settings import ParamGroup
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.presets import preset_in
from ds_fira.optim.registry import TYPES
from ds_fira.optim.settings import check_params


def our_name(optimizer: object, json_type: str | None) -> str | None:
    """Which optimizer of this package an engine will train with, as far as that is known; None for others.

    Args:
        optimizer: the object, or what makes it, which is known by the names in its code; None for the JSON type.
        json_type: in the config.
    """
    if optimizer is None:
        return json_type if json_type in TYPES else None
    if isinstance(optimizer, torch.optim.Optimizer):
        return type(optimizer).__name__ if isinstance(optimizer, LowRankOptimizer) else None
    maker = getattr(optimizer, "func", optimizer)  # functools.partial
    code = getattr(maker, "__code__", None)
    used = (maker.__name__,) if inspect.isclass(maker) else () if code is None else (*code.co_names, *code.co_freevars)
    return next((name for name in TYPES if name in used), None)


def trains_ours(engine: DeepSpeedEngine) -> bool:
    """Whether an engine that is built trains with an optimizer of this package."""
    return isinstance(engine.basic_optimizer, LowRankOptimizer)


def label(optimizer: object, json_type: str | None) -> str:
    """Another optimizer, for a message."""
    if optimizer is None:
        return json_type or "no optimizer"
    return "an optimizer that a function makes" if inspect.isroutine(optimizer) else type(optimizer).__name__


def checked_params(engine: DeepSpeedEngine, groups: Sequence[ParamGroup] = ()) -> dict[str, Any]:
    """The settings under `optimizer.params` in the config, checked, with the defaults of those that are not given.

    Args:
        engine: with the config.
        groups: param groups, which may name the preset in its place.

    Raises:
        ValueError: a setting is unknown or out of range.
    """
    name = engine.optimizer_name()
    params = {**preset_in(groups), **(engine.optimizer_params() or {})}
    return check_params(params, f"{name} in the DeepSpeed config", TYPES[name].algorithm)


def type_in(config: object) -> str | None:
    """The type of the optimizer in a config, or in the file that it names; None where there is none, or no config."""
    try:
        if not isinstance(config, Mapping):
            import hjson

            with open(config) as file:
                config = hjson.load(file, object_pairs_hook=dict_raise_error_on_duplicate_keys)
        return config["optimizer"]["type"]
    except Exception:  # the caller has an error in hand that says what is wrong with the config
        return None
