"""The loading of a state dict as `torch.optim` does it, with its hooks, but every state as it was saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from ds_fira.checkpoint.named_state import StateDict
from ds_fira.core.state import STEP, host_key

if TYPE_CHECKING:
    from ds_fira.optim.stateful import Resumable


def load_as_saved(
    optimizer: Resumable, load: Callable[[StateDict], None], state_dict: StateDict, *, states: bool
) -> None:
    """Load a state dict; every state is copied once, in the dtype it has.

    torch by itself casts them all to the parameter's dtype first, 8-bit ones to four times their size.

    Args:
        optimizer: gets them.
        load: `load_state_dict` of torch's base class.
        state_dict: has been checked.
        states: whether states are loaded, or the values of param groups alone.
    """
    kept: dict[int, dict[str, Tensor]] = {}

    def take(_: Optimizer, given: StateDict) -> StateDict:
        kept.update(given["state"] if states else {})
        return {**given, "state": {}}

    def put(_: Optimizer) -> None:
        owners = [(param, group) for group in optimizer.param_groups for param in group["params"]]
        for saved_id, (param, group) in zip(saved_ids, owners, strict=True):
            for key, value in kept.get(saved_id, {}).items():
                # AdamW counts every step, so its count is the host's.
                on_host = host_key(key) or (key == STEP and not optimizer._projects(param, group))
                optimizer.state[param][key] = value.detach().to("cpu" if on_host else param.device, copy=True)

    saved_ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
    # The last before torch's own work, and the first after it.
    hooks = [optimizer.register_load_state_dict_pre_hook(take)]
    hooks.append(optimizer.register_load_state_dict_post_hook(put, prepend=True))
    try:
        load(state_dict)
    finally:
        for hook in hooks:
            hook.remove()
