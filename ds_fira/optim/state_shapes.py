"""Compare the tensors of a state dict with those that an optimizer would have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ds_fira.checkpoint.named_state import StateDict
from ds_fira.core.algorithms import ADAM_STATES
from ds_fira.core.settings import ParamGroup
from ds_fira.core.state import STEP, UNPROJECTED

# Gives the new state of a parameter of a group, in tensors that suit another one.
Allocate = Callable[[Tensor, ParamGroup, Tensor], dict[str, Tensor]]


def require_states(state_dict: StateDict, groups: Iterable[ParamGroup], allocate: Allocate) -> None:
    """Stop unless every state that there is has the tensors, of the shapes, that these groups would give it.

    Args:
        state_dict: with as many tensors in each group as `groups` have.
        groups: the param groups as they will be.
        allocate: gives the state of a tensor.

    Raises:
        ValueError: with the first that differs, and the remedy.
    """
    ids = [number for group in state_dict["param_groups"] for number in group["params"]]
    params = [(param, group) for group in groups for param in group["params"]]
    for position, (number, (param, group)) in enumerate(zip(ids, params, strict=True)):
        state = state_dict["state"].get(number)
        if not state:
            continue
        found, wanted = _shapes(state), _shapes(allocate(param, group, torch.empty_like(param, device="meta")))
        if found != wanted:
            key = min(key for key, _ in found.items() ^ wanted.items())
            raise ValueError(
                f"the state of parameter {position} of shape {tuple(param.shape)} has {key} of shape "
                f"{found.get(key)} where {wanted.get(key)} belongs; load the state that this model and these "
                "settings made."
            )


def refuse_adam(state_dict: StateDict) -> None:
    """Stop where a state dict is that of another package's Adam: its moments are of whole parameters.

    Raises:
        ValueError: with the way to go on.
    """
    found = {key for state in state_dict["state"].values() for key in state}
    if found and {*ADAM_STATES} <= found <= {STEP, *ADAM_STATES, "max_exp_avg_sq"}:
        raise ValueError(
            "the state dict was made by another Adam, such as torch's AdamW, whose moments are of whole matrices; a "
            "DeepSpeed engine's load_checkpoint takes such a checkpoint over (docs/migrate.md), and without an engine "
            "load the model's weights and start the optimizer anew."
        )


def _shapes(state: Mapping[str, object]) -> dict[str, tuple[object, ...]]:
    """Without moments that wait for a first basis, which are there for a while only."""
    shapes = {key: tuple(getattr(value, "shape", ("no tensor",))) for key, value in state.items()}
    return {key: shape for key, shape in shapes.items() if UNPROJECTED not in key}
