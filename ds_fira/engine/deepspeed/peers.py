"""DeepSpeed's engine among its peers: agreement before the first collective, and one rank's failure told to all.

Written against DeepSpeed 0.17 to 0.19. What it relies on, in the order of `DeepSpeedEngine.__init__`:
`_do_sanity_check` ends before anything is communicated, and the config is in `engine._config` by then;
`_configure_optimizer` makes the optimizer, and calls `_do_optimizer_sanity_check` with it before it is wrapped.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from ds_fira.engine.deepspeed.agreement import Building, agree, engines_of, foreign, names_ours
from ds_fira.engine.deepspeed.attach import TYPES
from ds_fira.engine.deepspeed.description import describe_config, describe_groups, describe_module, plain
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.settings import check_params
from ds_fira.runtime import lost_peer

_BUILDING = "_ds_fira_building"
_OURS = "_ds_fira_ours"
CONFIG, OPTIMIZER = "config", "optimizer"
# Engines whose building has begun in this process.
_begun = 0


def register_agreement() -> None:
    """Let the engines that train with an optimizer of this package agree, and tell each other of failures.

    Called by `import ds_fira` behind `register`, whose checks come first, and again without effect.
    """
    if hasattr(DeepSpeedEngine.__init__, _OURS):
        return
    init, initialize = DeepSpeedEngine.__init__, deepspeed.initialize
    sanity_check = DeepSpeedEngine._do_sanity_check
    configure = DeepSpeedEngine._configure_optimizer
    check_optimizer = DeepSpeedEngine._do_optimizer_sanity_check

    @functools.wraps(initialize)
    def _initialize(*args: Any, **kwargs: Any) -> Any:
        begun = _begun
        try:
            return initialize(*args, **kwargs)
        except Exception as error:
            if _begun == begun:
                given = inspect.signature(initialize).bind(*args, **kwargs).arguments
                config = given.get("config") or given.get("config_params")
                name = _name_of(given.get("optimizer"), _type_in(config))
                if name is not None:
                    agree(Building(engines_of(given.get("mpu")), name, given), CONFIG, dict, error)
            raise

    @functools.wraps(init)
    def _init(engine: Any, *args: Any, **kwargs: Any) -> None:
        global _begun
        _begun += 1
        bound = inspect.signature(init).bind(engine, *args, **kwargs)
        given, optimizer = bound.arguments, bound.arguments.get("optimizer")
        json_type = getattr(given.get("config_class"), "optimizer_name", None)
        engines, name = engines_of(given.get("mpu")), _name_of(optimizer, json_type)
        building = engine.__dict__[_BUILDING] = Building(engines, name or "FiraAdam", given)
        try:
            if name is None:
                with foreign(engines, _label(optimizer, json_type)):
                    init(*bound.args, **bound.kwargs)
                return
            if isinstance(given.get("model_parameters"), Iterator):  # looked at here, used behind
                given["model_parameters"] = list(given["model_parameters"])
            _build(building, lambda: init(*bound.args, **bound.kwargs))
        finally:
            given.clear()  # or the engine would keep the model and the optimizer alive

    @functools.wraps(sanity_check)
    def _do_sanity_check(engine: Any) -> None:
        sanity_check(engine)
        building = engine.__dict__[_BUILDING]
        if _name_of(engine.client_optimizer, engine.optimizer_name()) is not None:
            agree(building, CONFIG, lambda: _describe(engine, building.given))

    @functools.wraps(configure)
    def _configure_optimizer(engine: Any, client_optimizer: Any, *args: Any, **kwargs: Any) -> None:
        building = engine.__dict__[_BUILDING]
        try:
            configure(engine, client_optimizer, *args, **kwargs)
        except Exception as error:
            if building.number and OPTIMIZER not in building.phases and not isinstance(error, lost_peer.PeerFailed):
                agree(building, OPTIMIZER, dict, error)
            raise

    @functools.wraps(check_optimizer)
    def _do_optimizer_sanity_check(engine: Any, optimizer: Any) -> Any:
        wrapper = check_optimizer(engine, optimizer)
        building = engine.__dict__[_BUILDING]
        if building.number or isinstance(optimizer, LowRankOptimizer):
            agree(building, OPTIMIZER, lambda: _describe(engine, building.given, optimizer))
        return wrapper

    setattr(_init, _OURS, True)
    deepspeed.initialize = _initialize
    DeepSpeedEngine.__init__ = _init
    DeepSpeedEngine._do_sanity_check = _do_sanity_check
    DeepSpeedEngine._configure_optimizer = _configure_optimizer
    DeepSpeedEngine._do_optimizer_sanity_check = _do_optimizer_sanity_check
    for name in ("forward", "backward", "step"):
        setattr(DeepSpeedEngine, name, _among_peers(getattr(DeepSpeedEngine, name), is_step=name == "step"))


def _build(building: Building, init: Callable[[], None]) -> None:
    """Build an engine of ours; what is raised before the ranks agree is agreed on, and what is raised later is told."""
    try:
        init()
    except Exception as error:
        if CONFIG not in building.phases:
            agree(building, CONFIG, dict, error)
        others = None if building.refused else lost_peer.current()
        if others is not None:
            others.settle(error, building.place, "as it built its engine", building.name)
        raise


def _among_peers(method: Any, is_step: bool) -> Any:
    """A method of the engine that raises what another rank published; a step publishes what it raises itself."""

    @functools.wraps(method)
    def call(engine: Any, *args: Any, **kwargs: Any) -> Any:
        building = engine.__dict__.get(_BUILDING)
        others = lost_peer.current() if building is not None and building.number else None
        if others is None:
            return method(engine, *args, **kwargs)
        number = engine.global_steps + 1
        place = f"{building.place}, step {number}" if is_step else None
        others.check(place)
        try:
            return method(engine, *args, **kwargs)
        except Exception as error:
            others.settle(error, place, f"in step {number}", building.name)
            raise

    return call


def _name_of(optimizer: Any, json_type: str | None) -> str | None:
    """Which of our optimizers an engine trains with, as far as is known before a function makes it; None for others."""
    if optimizer is None:
        return json_type if json_type in TYPES else None
    if isinstance(optimizer, LowRankOptimizer):
        return type(optimizer).__name__
    return "FiraAdam" if callable(optimizer) and names_ours(optimizer, list(TYPES)) else None


def _label(optimizer: Any, json_type: str | None) -> str:
    if optimizer is None:
        return json_type or "no optimizer"
    return "an optimizer that a function makes" if inspect.isroutine(optimizer) else type(optimizer).__name__


def _type_in(config: Any) -> str | None:
    """The type of the optimizer in a config, or in the file that it names."""
    try:
        if not isinstance(config, dict):
            import hjson

            with open(config) as file:
                config = hjson.load(file, object_pairs_hook=dict_raise_error_on_duplicate_keys)
        return config["optimizer"]["type"]
    except Exception:  # what is wrong with it is said by the error that is being raised
        return None


def _describe(engine: Any, given: dict[str, Any], optimizer: Any = None) -> dict[str, Any]:
    """What this rank was given; `optimizer` once it is there.

    Args:
        engine: that is being built.
        given: the arguments of its constructor.
        optimizer: that it will train with.
    """
    chosen = engine.client_optimizer if optimizer is None else optimizer
    module: nn.Module = given["model"]
    settings: dict[str, Any] = {"optimizer.type": _kind(chosen, engine)}
    if chosen is None:
        name = engine.optimizer_name()
        params = check_params(engine.optimizer_params() or {}, f"{name} in the DeepSpeed config", TYPES[name].algorithm)
        settings |= {f"optimizer.params.{key}": value for key, value in params.items()}
    settings |= describe_config(engine._config)
    scheduler = engine.client_lr_scheduler
    settings["lr_scheduler"] = None if scheduler is None else type(scheduler).__name__
    items, groups = given.get("model_parameters"), []
    if isinstance(chosen, torch.optim.Optimizer):
        items = chosen.param_groups
        recorder = getattr(chosen, "recorder", None)
        settings["check_sync_every"] = getattr(chosen, "check_sync_every", 0)
        settings["record_scaling_factors"] = getattr(recorder, "every", 0)
    if items is not None:
        found, groups = describe_groups(module, items)
        settings |= found
    return {
        "settings": {name: plain(value) for name, value in settings.items()},
        "parameters": describe_module(module),
        "groups": groups,
    }


def _kind(optimizer: Any, engine: Any) -> str:
    if optimizer is None:
        return str(engine.optimizer_name())
    return type(optimizer).__name__ if isinstance(optimizer, torch.optim.Optimizer) else "a function"
