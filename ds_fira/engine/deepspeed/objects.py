"""Optimizer objects: the engine trains with the one that its user made, or stops.

Written against DeepSpeed 0.17 to 0.19, accelerate 1 and transformers 5. What it relies on:

- Under offload `_configure_optimizer` refuses objects other than DeepSpeed's own, unless
  `zero_force_ds_cpu_optimizer()` is false. The reason it gives is speed: torch's Adam is slow on a CPU.
- Under offload `accelerate.Accelerator.prepare` makes a DeepSpeed optimizer of an object's `param_groups` and hands
  that over; the dicts of the groups stay the same ones.
- The Trainer sets its `optimizer` to None before it builds an engine, and takes the config's, or an AdamW of its own:
  an object in `Trainer(optimizers=...)` makes no step, and nothing is said. Its callbacks have the object till then.
"""

from __future__ import annotations

import gc
import inspect
import sys

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from ds_fira.core.algorithms import algorithm_of
from ds_fira.optim.base import MADE, LowRankOptimizer

# Of the classes that accelerate takes; they make no step here.
DEEPSPEEDS_OWN = "deepspeed.ops."


class RefusedOptimizer(ValueError, ZeRORuntimeException):
    """An optimizer object that would not be the one that trains; DeepSpeed's own class for that, and ours."""


def object_given(optimizer: object) -> object:
    """The optimizer object of the user's, where an engine is given one that DeepSpeed made of its param groups.

    Args:
        optimizer: an object, what makes one, or None.
    """
    groups = getattr(optimizer, "param_groups", None)
    if not groups or not type(optimizer).__module__.startswith(DEEPSPEEDS_OWN):
        return optimizer
    for made in MADE:
        if [id(group) for group in made.param_groups] == [id(group) for group in groups]:
            for group in groups:  # without what the other one has put there
                for name in optimizer.defaults.keys() - made.defaults.keys():
                    group.pop(name, None)
            return made
    return optimizer


def accept_object(engine: DeepSpeedEngine) -> None:
    """Let an engine train with an object of this package under offload too: its step runs where the tensors are.

    Args:
        engine: that is being built; only this asks for the setting.
    """
    engine._config.zero_force_ds_cpu_optimizer = False


def refuse_copied_groups(optimizer: object) -> None:
    """Stop before an engine trains with another optimizer that was made of the param groups of one of this package.

    Args:
        optimizer: the object that an engine is to train with.

    Raises:
        RefusedOptimizer: it was.
    """
    groups = [group for group in getattr(optimizer, "param_groups", ()) if "update_proj_gap" in group]
    if groups and not isinstance(optimizer, LowRankOptimizer):
        name = algorithm_of(groups[0]).name
        raise RefusedOptimizer(
            f"{name}: {type(optimizer).__name__} took the param groups of a {name} and would train without a "
            f'projection; give the {name} itself, or "type": "{name}" in the DeepSpeed config.'
        )


def refuse_forgotten(engine: DeepSpeedEngine, optimizer: object) -> None:
    """Stop before the Trainer of transformers trains with another optimizer than the object that its user gave it.

    Args:
        engine: with its module.
        optimizer: the object that the engine was given; None for the one that its config names.

    Raises:
        RefusedOptimizer: a Trainer builds the engine, and an object lives that has some of the module's parameters, no
            state and no engine.
    """
    if isinstance(optimizer, LowRankOptimizer) or not _called_by_trainer():
        return
    trained = {id(param) for param in engine.module.parameters()}
    if _forgotten(trained):
        gc.collect()  # what nobody has any more may still be in a cycle
    for name in _forgotten(trained):
        other = engine.optimizer_name() if optimizer is None else type(optimizer).__name__
        raise RefusedOptimizer(
            f"{name}: under DeepSpeed the Trainer drops the {name} object of Trainer(optimizers=...), and would train "
            f'with {other}; give it as "type": "{name}" in the DeepSpeed config, and no object.'
        )


def _called_by_trainer() -> bool:
    """Whether this is called, by way of accelerate, from a Trainer of transformers."""
    trainers = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame = inspect.currentframe() if trainers else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), trainers):
            return True
        frame = frame.f_back
    return False


def _forgotten(trained: set[int]) -> list[str]:
    """The names of the objects that have made no step and have no engine, of those that have such parameters."""
    return [
        made.algorithm.name
        for made in MADE
        if not (made.state or made.members or made.suspended)
        and any(id(param) in trained for group in made.param_groups for param in group["params"])
    ]
