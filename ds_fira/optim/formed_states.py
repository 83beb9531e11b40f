"""State dicts of an optimizer whose engine gives states another form there (`ds_fira.optim.attachment.StateForm`).

By parameter they have the tensors that one process would have, so they are described as those of one process.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ds_fira.checkpoint.named_state import KEY, SavedState, StateDict, TensorSlices, describe, described
from ds_fira.checkpoint.reconcile import Members, refuse_changed_structure
from ds_fira.checkpoint.restore import refuse_other_states
from ds_fira.checkpoint.slices import state_slices
from ds_fira.core.settings import GroupSettings, ParamGroup
from ds_fira.sharding.geometry import ParamSlice, matrices_of
from ds_fira.sharding.local_matrices import LocalMatrices
from ds_fira.sharding.projection import is_projected

if TYPE_CHECKING:
    from ds_fira.optim.stateful import Resumable


def formed_state_dict(optimizer: Resumable, pack: Callable[[], StateDict]) -> StateDict:
    """The state dict of an optimizer by the form of its states; a collective call.

    Args:
        optimizer: attached, with a form.
        pack: `torch.optim.Optimizer.state_dict` of it.
    """
    stepped, params = optimizer.state, [param for group in optimizer.param_groups for param in group["params"]]
    formed = optimizer.attachment.form.gather()
    optimizer.state = defaultdict(dict, {params[number]: state for number, state in formed.items()})
    try:
        result = pack()
    finally:
        optimizer.state = stepped
    listed = zip(optimizer.param_groups, optimizer.members, strict=True)
    slices = [_alone(name, shape, group) for group, members in listed for name, shape in members]
    states = [formed.get(number, {}) for number in range(len(params))]
    result[KEY] = describe("", optimizer.given, optimizer.members, slices, states, optimizer.algorithm)
    return result


@dataclass(frozen=True)
class FormedInput:
    """A state dict in the order of the optimizer that loads it, and what it says of the run that saved it.

    Attributes:
        state_dict: by the optimizer's own param groups and numbers.
        saved: of the run; None where the state dict does not say, as one of torch's `get_optimizer_state_dict`.
        members: of every param group the names by which `saved` knows its parameters.
    """

    state_dict: StateDict
    saved: SavedState | None = None
    members: list[Members] = field(default_factory=list)


def formed_input(optimizer: Resumable, state_dict: StateDict) -> FormedInput:
    """Check a state dict before it is loaded by the form of states; a collective call.

    It is one of one process, or of an engine whose ranks have all of every parameter. By the names of parameters, which
    may lie in other param groups; without the same names, by position as in torch.

    Raises:
        ValueError: it does not fit, the same on every rank.
    """
    found = _in_order(optimizer, state_dict)
    if found.saved is not None:
        refuse_changed_structure(found.saved.groups, optimizer.param_groups, found.members)
        refuse_other_states(found.saved, optimizer.algorithm)
    optimizer.attachment.form.require_fit(found.state_dict)
    return found


def _in_order(optimizer: Resumable, state_dict: StateDict) -> FormedInput:
    counts = [len(group["params"]) for group in state_dict["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    saved, members = None, []
    if KEY in state_dict:
        plain, saved = described(state_dict), SavedState()
        # Its groups alone: the states are the form's to read.
        saved.add({**state_dict, "state": {}, KEY: {**plain, "states": []}})
        members = [list(group.members.items()) for group in saved.groups]
        places = [TensorSlices.from_plain(place).params for place in plain["places"]]
        if not _whole(places, members):
            raise ValueError(
                "this state dict is a rank's share of a run under ZeRO; load that checkpoint into an engine at stage "
                "0, and take ds_fira.whole_state_dict of it."
            )
        names, wanted = [parts[0].name for parts in places], _names(optimizer.members)
        if sorted(names) == sorted(wanted):
            keys = [key for group in state_dict["param_groups"] for key in group["params"]]
            states = {name: state_dict["state"].get(key, {}) for name, key in zip(names, keys, strict=True)}
            numbers = iter(range(len(wanted)))
            groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in optimizer.param_groups]
            ordered = {**state_dict, "state": dict(enumerate(map(states.get, wanted))), "param_groups": groups}
            return FormedInput(ordered, saved, list(optimizer.members))
    if counts != own:
        raise ValueError(
            f"the state dict has param groups of {counts} parameters, and the optimizer of {own}; build the same "
            "groups as the run that saved, or give both optimizers the model, for the names of its parameters."
        )
    return FormedInput(state_dict, saved, members)


def holds_whole(optimizer: Resumable) -> bool:
    """Whether this process steps every parameter whole: what it saves is what one process would."""
    attachment = optimizer.attachment
    return not attachment.matrices and _whole(attachment.slices.values(), optimizer.members)


def _whole(places: Iterable[Sequence[ParamSlice]], members: Iterable[Members]) -> bool:
    """Whether every stepped tensor is one parameter."""
    shapes = {name: shape for listed in members for name, shape in listed}
    return all(
        len(parts) == 1 and (parts[0].start, parts[0].stop) == (0, math.prod(shapes[parts[0].name])) for parts in places
    )


def _names(members: Iterable[Members]) -> list[str]:
    return [name for listed in members for name, _ in listed]


def _alone(name: str, shape: tuple[int, ...], group: ParamGroup) -> TensorSlices:
    """What one process would hold of a parameter."""
    params = (ParamSlice(name, 0, 0, math.prod(shape)),)
    if not is_projected(shape, group):
        return TensorSlices(params, ())
    shards = tuple(matrices_of("", shape))
    matrices = LocalMatrices(shards, tuple(range(len(shards))), batched=len(shape) == 3, flat=False)
    return TensorSlices(params, tuple(state_slices(matrices, GroupSettings.of(group), name)))
