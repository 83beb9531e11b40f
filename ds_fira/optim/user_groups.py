"""The param groups as the user gave them, over the parts into which this package splits them.

What is projected is apart from the rest, and inside an engine matrices of one shape are apart from those of another.
Schedulers, and whoever reads or sets a learning rate by hand, count the user's groups: `UserGroups` is the optimizer
with those.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ds_fira.core.settings import ParamGroup
from ds_fira.optim.rank_rule import parameters_of

# Listed parameter by parameter: those of a user's group are those of its parts, one after the other.
LISTED = ("params", "param_names")


class GroupView(MutableMapping[str, object]):
    """One group of the user's: reads what its first part says, writes to all of them."""

    def __init__(self, parts: Sequence[ParamGroup]) -> None:
        """Keep the parts, which stay the optimizer's.

        Args:
            parts: at least one.
        """
        self._parts = parts

    def __getitem__(self, key: str) -> Any:
        having = self._having(key)
        if not having:
            raise KeyError(key)
        if key in LISTED:
            return [item for part in having for item in part[key]]
        value = having[0][key]
        if isinstance(value, Tensor):  # a rate that is a tensor is changed where it is, so the parts share one
            for part in having:
                part[key] = value
        return value

    def __setitem__(self, key: str, value: object) -> None:
        if key in LISTED:
            raise ValueError(
                f"param_groups: {key!r} of a group cannot be set, because the group is stepped in {len(self._parts)} "
                "parts; give the optimizer other parameters when it is made."
            )
        # A part without a rank is not projected, and stays so.
        for part in self._having(key) or self._parts:
            part[key] = value

    def __delitem__(self, key: str) -> None:
        having = self._having(key)
        if not having:
            raise KeyError(key)
        for part in having:
            del part[key]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key for part in self._parts for key in part))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return repr(dict(self))

    def _having(self, key: str) -> list[ParamGroup]:
        return [part for part in self._parts if key in part]


class GivenGroups(Optimizer):
    """The part of an optimizer that knows which of its param groups are parts of one group of the user's.

    Attributes:
        origins: of every param group, the number of the user's group that it is a part of.
        idle: by number, groups of the user's of which nothing is trained; they hold what a scheduler sets.
        given: of every param group, the settings it was made with.
    """

    given: list[ParamGroup]
    origins: list[int]
    idle: dict[int, ParamGroup]
    _view: UserGroups | None

    def _forget_given_groups(self) -> None:
        self.origins, self.idle, self._view = [], {}, None

    @property
    def itself(self) -> GivenGroups:
        """This optimizer, also where it is asked for through `user_groups`."""
        return self

    @property
    def user_groups(self) -> UserGroups:
        """This optimizer with the param groups that the user gave: what to build a scheduler of.

        A scheduler with one value for each group takes as many as were given, as with torch's AdamW, however many
        `param_groups` the optimizer made of them. Reading takes what the parts have in common; writing goes to all.
        """
        if self._view is None:
            self._view = UserGroups(self)
        return self._view

    def note_given(self, groups: Iterable[ParamGroup]) -> None:
        """Say which groups the user gave; each param group is a part of the one that has its first parameter.

        Args:
            groups: of parameters or (name, parameter) pairs, before they were split.
        """
        given = [{**group, "params": parameters_of(group["params"])} for group in groups]
        number = {id(param): index for index, group in enumerate(given) for param in group["params"]}
        numbers = enumerate(self.param_groups, len(given))  # of a group without parameters, one of its own
        self.origins = [number[id(group["params"][0])] if group["params"] else other for other, group in numbers]
        self.idle = {
            index: {**self.defaults, **group}
            for index, group in enumerate(given)
            if group["params"] and index not in self.origins
        }

    def tell_of_parts(self, given: int, name: str) -> None:
        """Say what a scheduler of torch's is to be made of, which counts `param_groups` and would not say why.

        Args:
            given: how many groups the user gave.
            name: of the optimizer.
        """
        if given > 1 and len(self.param_groups) != given:
            warnings.warn(
                f"{name}: your {given} param groups are stepped in {len(self.param_groups)} parts, which are its "
                "param_groups; make a scheduler that has a value for each of yours of optimizer.user_groups, as in "
                "LambdaLR(optimizer.user_groups, [f, g]).",
                stacklevel=4,
            )

    def drop_empty(self) -> None:
        """Remove param groups without parameters, as an engine does, with what is kept of them elsewhere."""
        kept = [bool(group["params"]) for group in self.param_groups]
        for listed in (self.param_groups, self.given, self.origins):
            listed[:] = list(itertools.compress(listed, kept))

    def shown_groups(self) -> Sequence[MutableMapping[str, Any]]:
        """The user's groups; the param groups themselves where each is one, and in the midst of an engine's step."""
        groups = self.param_groups
        # ZeRO puts one group at a time in their place while it steps.
        if len(self.origins) != len(groups) or (not self.idle and len(set(self.origins)) == len(groups)):
            return groups
        parts = {number: [group] for number, group in self.idle.items()}
        for number, group in zip(self.origins, groups, strict=True):
            parts.setdefault(number, []).append(group)
        return [GroupView(parts[number]) for number in sorted(parts)]

    def of_user_groups(self, per_group: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """What belongs to every param group, put together for every group of the user's.

        Args:
            per_group: a list for every param group.
        """
        found: dict[int, list[Any]] = {number: [] for number in (*self.origins, *self.idle)}
        for number, items in zip(self.origins, per_group, strict=True):
            found[number] += items
        return [found[number] for number in sorted(found)]


class UserGroups:
    """An optimizer with the groups that its user gave; all else is the optimizer's own, its class too.

    A scheduler of torch's marks the `step` of the optimizer that it is given. Here that is this object's, which an
    engine does not call; the optimizer says when it has stepped.
    """

    _OWN = ("step", "_opt_called", "_optimizer")

    def __init__(self, optimizer: GivenGroups) -> None:
        self._optimizer = optimizer
        own = weakref.ref(self)

        def note_step(*_: object) -> None:
            if own() is not None:
                own()._opt_called = True

        optimizer.register_step_post_hook(note_step)

    @property
    def __class__(self) -> type:
        return type(self._optimizer)

    @property
    def param_groups(self) -> Sequence[MutableMapping[str, Any]]:
        """The user's groups, as `GivenGroups.shown_groups` gives them."""
        return self._optimizer.shown_groups()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As the optimizer's."""
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        if name in UserGroups._OWN:
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in UserGroups._OWN:
            object.__setattr__(self, name, value)
        elif name == "param_groups":
            raise AttributeError("user_groups.param_groups cannot be set; change the values of the groups.")
        else:
            setattr(self._optimizer, name, value)

    def __reduce__(self) -> tuple[object, ...]:
        return _view_of, (self._optimizer,)

    def __repr__(self) -> str:
        return Optimizer.__repr__(self)


def _view_of(optimizer: GivenGroups) -> UserGroups:
    return optimizer.user_groups
