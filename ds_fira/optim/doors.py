"""Who holds an optimizer's parameters, where no engine has told it: a table of doors, each for one way to hold them.

DeepSpeed builds the optimizer, or is given it, and hands it an `EngineAttachment`. Other ways to train on several ranks
never see it: DDP's ranks hold the same parameters, FSDP2's hold shards of them. So the optimizer asks before its first
step. The wing `engine` adds the doors, which import `optim` and not the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from ds_fira.optim.base import LowRankOptimizer


class Door(Protocol):
    """One way to hold parameters."""

    def attach(self, optimizer: LowRankOptimizer) -> None:
        """Tell an optimizer what lies where; a collective call of the ranks that hold the parameters.

        Raises:
            ValueError: something is not supported, the same on every rank.
        """


class Doors(Protocol):
    """Finds the doors of one way to hold parameters."""

    def of_model(self, model: nn.Module) -> tuple[Door, nn.Module] | None:
        """The door to the parameters of a model, and the module that gives them their names; None for another way."""

    def of_params(self, params: Sequence[Tensor]) -> Door | None:
        """The door to parameters that show by themselves how they are held; None for others."""


_DOORS: list[Doors] = []
# By parameter the door of the model that it was taken from: parameters of DDP do not show it.
_NOTED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def add_doors(doors: Doors) -> None:
    """Add a way to hold parameters; those added first are asked first."""
    _DOORS.append(doors)


def note_model(model: nn.Module) -> nn.Module:
    """Remember who holds the parameters of a model, for optimizers that are given its parameters alone.

    Returns:
        The module that gives them their names: the model, or what it wraps.
    """
    for doors in _DOORS:
        found = doors.of_model(model)
        if found is not None:
            door, module = found
            for param in module.parameters():
                _NOTED[param] = door
            return module
    return model


def door_of_param(param: Tensor) -> Door | None:
    """The door that was noted for a parameter."""
    return _NOTED.get(param)


def door_of(params: Iterable[Tensor]) -> Door | None:
    """The door to parameters; None for parameters of one process, and for those that say nothing."""
    params = list(params)
    shown = next(filter(None, (doors.of_params(params) for doors in _DOORS)), None)
    return shown or next(filter(None, map(door_of_param, params)), None)
