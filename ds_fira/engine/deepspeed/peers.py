"""DeepSpeed's engine among its peers: agreement before the first collective, and one rank's failure told to all.

Written against DeepSpeed 0.17 to 0.19. What it relies on, in the order of `DeepSpeedEngine.__init__`:
`_do_sanity_check` ends before anything is communicated, and the config is in `engine._config` by then;
`_configure_optimizer` makes the optimizer, and calls `_do_optimizer_sanity_check` with it before it is wrapped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule

from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.kernels import VARIABLE
from ds_fira.engine.deepspeed.agreement import Building, agree, engines_of, foreign
from ds_fira.engine.deepspeed.chosen import checked_params, label, our_name, type_in
from ds_fira.engine.deepspeed.description import Description, describe_config, describe_groups, describe_module, plain
from ds_fira.engine.deepspeed.objects import object_given
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.settings import SaveSettings
from ds_fira.runtime import lost_peer

T = TypeVar("T")
_BUILDING = "_ds_fira_building"
CONFIG, OPTIMIZER = "config", "optimizer"
# Engines whose building has begun in this process.
_begun = 0


def agree_on_failed_start(initialize: Callable[..., T], *args: object, **kwargs: object) -> T:
    """`deepspeed.initialize`: an error before any engine is begun ends every rank."""
    begun = _begun
    try:
        return initialize(*args, **kwargs)
    except Exception as error:
        if _begun == begun:
            given = inspect.signature(initialize).bind(*args, **kwargs).arguments
            config = given.get("config") or given.get("config_params")
            name = our_name(given.get("optimizer"), type_in(config))
            if name is not None:
                agree(Building(engines_of(given.get("mpu")), name, given), CONFIG, error=error)
        raise


def build_among_peers(init: Callable[..., None], engine: DeepSpeedEngine, *args: object, **kwargs: object) -> None:
    """`__init__`: an error before the ranks agree is agreed on, a later one is told; other engines leave a note."""
    global _begun
    _begun += 1
    bound = inspect.signature(init).bind(engine, *args, **kwargs)
    given = bound.arguments
    optimizer = given["optimizer"] = object_given(given.get("optimizer"))
    json_type = getattr(given.get("config_class"), "optimizer_name", None)
    engines, name = engines_of(given.get("mpu")), our_name(optimizer, json_type)
    building = vars(engine)[_BUILDING] = Building(engines, name or FIRA_ADAM.name, given)
    try:
        if name is None:
            with foreign(engines, label(optimizer, json_type)):
                init(*bound.args, **bound.kwargs)
            return
        if isinstance(given.get("model_parameters"), Iterator):  # read here first, then by DeepSpeed
            given["model_parameters"] = list(given["model_parameters"])
        init(*bound.args, **bound.kwargs)
    except Exception as error:
        if name is None:
            raise
        if CONFIG not in building.phases:
            agree(building, CONFIG, error=error)
        others = None if building.refused else lost_peer.current()
        if others is not None:
            others.settle(error, building.place, "as it built its engine", building.name)
        raise
    finally:
        given.clear()  # or the engine would keep the model and the optimizer alive


def agree_on_config(check: Callable[..., None], engine: DeepSpeedEngine) -> None:
    """`_do_sanity_check`: all ranks have the same config, model and parameters."""
    check(engine)
    building: Building = vars(engine)[_BUILDING]
    if our_name(engine.client_optimizer, engine.optimizer_name()) is not None:
        agree(building, CONFIG, lambda: _describe(engine, building.given))


def agree_on_refusal(
    configure: Callable[..., None], engine: DeepSpeedEngine, client_optimizer: object, *args: object, **kwargs: object
) -> None:
    """`_configure_optimizer`: an error before the optimizer is agreed on ends every rank."""
    building: Building = vars(engine)[_BUILDING]
    try:
        configure(engine, client_optimizer, *args, **kwargs)
    except Exception as error:
        if building.number and OPTIMIZER not in building.phases and not isinstance(error, lost_peer.PeerFailed):
            agree(building, OPTIMIZER, error=error)
        raise


def agree_on_optimizer(check: Callable[..., T], engine: DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> T:
    """`_do_optimizer_sanity_check`: all ranks have made the same optimizer, for the same parameters."""
    wrapper = check(engine, optimizer)
    building: Building = vars(engine)[_BUILDING]
    if building.number or isinstance(optimizer, LowRankOptimizer):
        agree(building, OPTIMIZER, lambda: _describe(engine, building.given, optimizer))
    return wrapper


def call_among_peers(method: Callable[..., T], engine: DeepSpeedEngine, *args: object, **kwargs: object) -> T:
    """`forward` and `backward`: raise what another rank has published."""
    with _among_peers(engine, publishes=False):
        return method(engine, *args, **kwargs)


def step_among_peers(step: Callable[..., T], engine: DeepSpeedEngine, *args: object, **kwargs: object) -> T:
    """`step`: raises what another rank has published, and publishes what it raises itself."""
    with _among_peers(engine, publishes=True):
        return step(engine, *args, **kwargs)


@contextmanager
def _among_peers(engine: DeepSpeedEngine, publishes: bool) -> Iterator[None]:
    """Raise what another rank has published, and settle an error of what is called meanwhile."""
    building: Building | None = vars(engine).get(_BUILDING)
    others = lost_peer.current() if building is not None and building.number else None
    if others is None:
        yield
        return
    number = engine.global_steps + 1
    place = f"{building.place}, step {number}" if publishes else None
    others.check(place)
    try:
        yield
    except Exception as error:
        others.settle(error, place, f"in step {number}", building.name)
        raise


def _describe(
    engine: DeepSpeedEngine, given: dict[str, object], optimizer: torch.optim.Optimizer | None = None
) -> Description:
    """What this rank was given; `optimizer` once it is there.

    Args:
        engine: that is being built.
        given: the arguments of its constructor.
        optimizer: that it will train with.
    """
    chosen = engine.client_optimizer if optimizer is None else optimizer
    made = isinstance(chosen, torch.optim.Optimizer)
    kind = engine.optimizer_name() if chosen is None else type(chosen).__name__ if made else "a function"
    settings: dict[str, object] = {"optimizer.type": str(kind)}
    if chosen is None:
        settings |= {f"optimizer.params.{key}": value for key, value in checked_params(engine).items()}
    settings |= describe_config(engine._config)
    settings["lr_scheduler"] = engine.client_lr_scheduler
    items, groups, group_settings = given.get("model_parameters"), [], {}
    if made:
        items = chosen.param_groups
        settings["check_sync_every"] = getattr(chosen, "check_sync_every", 0)
        settings |= getattr(chosen, "saving", SaveSettings())._asdict()
        settings[f"kernels ({VARIABLE})"] = getattr(chosen, "kernels", "auto")
        settings["record_scaling_factors"] = getattr(getattr(chosen, "recorder", None), "every", 0)
    if items is not None:
        group_settings, groups = describe_groups(given["model"], items)
    return {
        "settings": {name: plain(value) for name, value in settings.items()},
        "stage": getattr(given["model"], "stage_id", 0) if isinstance(given["model"], PipelineModule) else 0,
        "group_settings": group_settings,
        "parameters": describe_module(given["model"]),
        "groups": groups,
    }
