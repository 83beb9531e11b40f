"""Optimizer objects: the engine trains with the one that its user made, or stops.

Written against DeepSpeed 0.17 to 0.19, accelerate 1 and transformers 5. What it relies on:

- Under offload `_configure_optimizer` refuses objects other than DeepSpeed's own, unless
  `zero_force_ds_cpu_optimizer()` is false. The reason it gives is speed: torch's Adam is slow on a CPU.
- Under offload `accelerate.Accelerator.prepare` makes a DeepSpeed optimizer of an object's `param_groups` and hands
  that over; the dicts of the groups stay the same ones.
- Where a config names an optimizer, transformers' Trainer lets it win over `Trainer(optimizers=...)`, and says nothing.
"""

from __future__ import annotations

import gc

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


def refuse_forgotten(engine: DeepSpeedEngine) -> None:
    """Stop before an engine trains with its config's optimizer, if an object of this package was made to do so.

    Args:
        engine: with its module; no optimizer object was given to it.

    Raises:
        RefusedOptimizer: an object lives that has some of the module's parameters, no state and no engine.
    """
    trained = {id(param) for param in engine.module.parameters()}
    forgotten = _forgotten(trained)
    if forgotten is not None:
        del forgotten
        gc.collect()  # what nobody has any more may still be in a cycle
        forgotten = _forgotten(trained)
    if forgotten is not None:
        name, own = forgotten.algorithm.name, engine.optimizer_name()
        raise RefusedOptimizer(
            f"{name}: the DeepSpeed config names {own}, so the {name} object that was made of the same parameters "
            'would make no step, as an object in Trainer(optimizers=...) makes none; take "optimizer" out of the '
            "config, or delete the object."
        )


def _forgotten(trained: set[int]) -> LowRankOptimizer | None:
    for made in MADE:
        if made.state or made.members or made.suspended:
            continue
        if any(id(param) in trained for group in made.param_groups for param in group["params"]):
            return made
    return None
