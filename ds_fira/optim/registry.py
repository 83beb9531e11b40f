"""The optimizers of this package by name, and the one that an engine trains with."""

from __future__ import annotations

import torch

from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.fira_adam import ApolloAdam, FiraAdam, GaLoreAdam
from ds_fira.optim.plug import FiraRMSProp

# By the type in an engine's config.
KINDS = (FiraAdam, GaLoreAdam, ApolloAdam, FiraRMSProp)
TYPES: dict[str, type[LowRankOptimizer]] = {kind.__name__: kind for kind in KINDS}


def add_types(*types: type[LowRankOptimizer]) -> None:
    """Add optimizers, each by its class's name, and put all of them where engines look a type up: in `torch.optim`."""
    TYPES.update({kind.__name__: kind for kind in types})
    for name, kind in TYPES.items():
        setattr(torch.optim, name, kind)


def fira_of(engine_or_optimizer: object) -> LowRankOptimizer:
    """The optimizer of this package that was given, or that is inside an engine or an optimizer wrapper.

    Raises:
        ValueError: there is none.
    """
    found = getattr(engine_or_optimizer, "basic_optimizer", None) or engine_or_optimizer
    # accelerate wraps the engine's wrapper once more, and the Trainer's optimizer may be wrapped twice.
    while not isinstance(found, LowRankOptimizer) and getattr(found, "optimizer", None) is not None:
        found = found.optimizer
    if not isinstance(found, LowRankOptimizer):
        raise ValueError(
            f"ds_fira: {type(engine_or_optimizer).__name__} trains with no optimizer of this package; set "
            f"optimizer.type to {' or '.join(map(repr, TYPES))} in its DeepSpeed config."
        )
    return found.itself
