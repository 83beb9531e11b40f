"""State dicts of an optimizer whose engine gives states another form there (`ds_fira.optim.attachment.StateForm`).

By parameter they have the tensors that one process would have, so they are described as those of one process.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

from ds_fira.checkpoint.named_state import KEY, SavedState, StateDict, TensorSlices, describe, described
from ds_fira.checkpoint.reconcile import refuse_changed_structure
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


def require_formed(optimizer: Resumable, state_dict: StateDict) -> SavedState | None:
    """Check a state dict before it is loaded by the form of states; a collective call.

    Returns:
        What it says of the run that saved it; None where it says nothing, as one that torch's
        `get_optimizer_state_dict` gave.

    Raises:
        ValueError: it does not fit, the same on every rank.
    """
    counts = [len(group["params"]) for group in state_dict["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if counts != own:
        raise ValueError(
            f"the state dict has param groups of {counts} parameters, and the optimizer of {own}; build the same "
            "groups as the run that saved."
        )
    saved = None
    if KEY in state_dict:
        saved, plain = SavedState(), described(state_dict)
        # Its groups alone: the states are the form's to read.
        saved.add({**state_dict, "state": {}, KEY: {**plain, "states": []}})
        members = [list(group.members.items()) for group in saved.groups]
        refuse_changed_structure(saved.groups, optimizer.param_groups, members)
        refuse_other_states(saved, optimizer.algorithm)
    optimizer.attachment.form.require_fit(state_dict)
    return saved


def _alone(name: str, shape: tuple[int, ...], group: ParamGroup) -> TensorSlices:
    """What one process would hold of a parameter."""
    params = (ParamSlice(name, 0, 0, math.prod(shape)),)
    if not is_projected(shape, group):
        return TensorSlices(params, ())
    shards = tuple(matrices_of("", shape))
    matrices = LocalMatrices(shards, tuple(range(len(shards))), batched=len(shape) == 3, flat=False)
    return TensorSlices(params, tuple(state_slices(matrices, GroupSettings.of(group), name)))
