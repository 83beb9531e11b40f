"""The files and states of the released code, PyPI `fira` (1.0.2) and `galore-torch` (1.0), by name.

Both keep, per projected weight, a pickled projector with an `ortho_matrix` beside Adam's moments; `fira` also the norm
of the last residual, under "scaling_grad". Files are read without importing either package.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_fira.checkpoint import safe_load
from ds_fira.checkpoint.named_state import SavedMoments, SavedState
from ds_fira.checkpoint.reconcile import SavedGroup
from ds_fira.checkpoint.slices import Piece, StateSlice
from ds_fira.core.algorithms import ADAM_STATES
from ds_fira.core.quantization import VALUES
from ds_fira.core.state import MatrixState
from ds_fira.core.subspace import Side, basis_shape, effective_rank, low_rank_shape, projection_side

PROJECTORS = tuple(
    safe_load.stand_in(origin, tensors=True)
    for origin in ("fira.gradient_projection.GradientProjector", "galore_torch.galore_projector.GaLoreProjector")
)
PROJ_TYPES = ("std", "reverse_std", "left", "right")
# The largest element of P'P - I: 1e-6 as an SVD in float32 leaves it, up to 0.02 after rounding to bfloat16.
NOT_ORTHONORMAL = 0.1
_ANOTHER = "load another checkpoint of that run"
_REMEDY = (
    "save the optimizer alone, where the code that made it is trusted: torch.save(optimizer.state_dict(), file), and "
    "give that file"
)


def read_released_state(path: str | os.PathLike[str]) -> Any:
    """What a file of a released run holds, read without importing `fira` or `galore_torch` or running anything.

    Args:
        path: of a file of `torch.save` with the `state_dict()` of an optimizer of theirs, alone or among other things.

    Returns:
        The content, for `load_released_state`; in place of a projector an object with its attributes.

    Raises:
        ValueError: it cannot be read so; one sentence with the file, the class that it would import, the remedy.
        OSError: it cannot be opened.
    """
    return safe_load.read(path, PROJECTORS, _REMEDY)


def optimizer_part(content: Any) -> Mapping[str, Any]:
    """The state dict of the optimizer in what was given to `load_released_state`.

    Raises:
        ValueError: there is none.
    """
    if isinstance(content, str | os.PathLike):
        content = read_released_state(content)
    if isinstance(content, Mapping) and "param_groups" not in content and isinstance(content.get("optimizer"), Mapping):
        content = content["optimizer"]
    for key, kind in (("param_groups", list), ("state", Mapping)):
        if not isinstance(content, Mapping) or not isinstance(content.get(key), kind):
            raise ValueError(
                f"FiraAdam: what was given as the state of a released run has no {key}; give what its "
                "optimizer.state_dict() gave, or a file with it."
            )
    return content


def released_state(
    state_dict: Mapping[str, Any], names: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]]
) -> SavedState:
    """A state dict of the released code by the names of its parameters.

    Args:
        state_dict: of `fira.FiraAdamW` or `galore_torch.GaLoreAdamW`.
        names: of the parameters of every group, in order.
        shapes: of all parameters, by name.

    Raises:
        ValueError: it does not fit the names, or is of a kind that FiraAdam has no place for.
    """
    listed = state_dict["param_groups"]
    _require_groups(listed)
    sizes, given = [len(group["params"]) for group in listed], [len(group) for group in names]
    if sizes != given:
        raise ValueError(
            f"FiraAdam: the state dict has groups of {sizes} parameters, and groups of {given} were named; give the "
            "groups as they were given to the optimizer that saved it."
        )
    known = {number for group in listed for number in group["params"]}
    strangers = [number for number in state_dict["state"] if number not in known]
    if strangers:
        raise ValueError(
            f"FiraAdam: the state dict holds a state of parameter {strangers[0]!r}, which none of its groups has; "
            f"{_ANOTHER}."
        )
    saved = SavedState()
    for group, members in zip(listed, names, strict=True):
        unknown = [name for name in members if name not in shapes]
        if unknown:
            raise ValueError(
                f"FiraAdam: groups name {unknown[0]}, which FiraAdam does not train; train the same parameters."
            )
        values = {"rank": group.get("rank"), "proj_type": group.get("proj_type", "std"), "formulation": "released"}
        saved.groups.append(SavedGroup({name: tuple(shapes[name]) for name in members}, {}, values))
        for name, number in zip(members, group["params"], strict=True):
            state = state_dict["state"].get(number)
            if state:
                _add(saved, name, tuple(shapes[name]), state, {**group, **values})
    return saved


def _add(saved: SavedState, name: str, shape: tuple[int, ...], state: Mapping[str, Any], group: dict[str, Any]) -> None:
    for key in ADAM_STATES:
        if not isinstance(state.get(key), Tensor):
            raise ValueError(
                f"FiraAdam: the state of {name} has no tensor {key}, as Adafactor and 8-bit Adam have none; only the "
                "AdamW of fira and galore-torch can be continued."
            )
    count = _count(name, state.get("step"))
    if group["rank"] is None:
        _require_moments(name, state, shape)
        moments = SavedMoments(torch.tensor(count), {key: _flat(state[key]) for key in ADAM_STATES})
        saved.moments[name].append((Piece(name, 0, 0, state["exp_avg"].numel()), moments))
        return
    if len(shape) != 2:
        raise ValueError(
            f"FiraAdam: {name} has shape {shape}, and the released code projects matrices only; give the groups in the "
            "order in which the optimizer that saved it got them."
        )
    side = projection_side(shape, group["proj_type"], "released")
    rank = effective_rank(shape, group["rank"])
    basis = _basis(name, state.get("projector"), side, basis_shape(shape, group["rank"], side))
    _require_moments(name, state, low_rank_shape(shape, group["rank"], side))
    place = StateSlice(
        name, shape, side, rank, "", None, range(len(basis)), range(shape[1] if side == "left" else shape[0])
    )
    # The released code refreshes before steps whose number, from 0, is a multiple of the gap.
    gap = group["update_proj_gap"]
    last = (count - 1) // gap * gap
    moments = {key: {VALUES: state[key].detach().float()} for key in ADAM_STATES}
    if "scaling_grad" not in state and type(state["projector"]).__name__ == "GradientProjector":
        raise ValueError(f"FiraAdam: the state of {name} has no scaling_grad, which fira keeps; {_ANOTHER}.")
    norm = _norm(name, state.get("scaling_grad", 0.0))
    saved.matrices[name].append(
        (place, MatrixState(side, torch.tensor(count), torch.tensor(last), basis, moments, norm))
    )


def _require_groups(listed: Any) -> None:
    """Stop if a param group says what no run of the released code can have had."""
    for number, group in enumerate(listed):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(f"FiraAdam: param group {number} of the state dict has no list of params; {_ANOTHER}.")
        if group.get("proj_type", "std") not in PROJ_TYPES:
            raise ValueError(
                f"FiraAdam: param group {number} of the state dict has proj_type = {group['proj_type']!r}; only "
                f"{', '.join(map(repr, PROJ_TYPES))} can be continued."
            )
        rank, gap = group.get("rank"), group.get("update_proj_gap")
        for setting, value in (("rank", rank), ("update_proj_gap", gap)):
            if rank is not None and not (type(value) is int and value >= 1):
                raise ValueError(
                    f"FiraAdam: param group {number} of the state dict has {setting} = {value!r}, which is no whole "
                    f"number of at least 1; {_ANOTHER}."
                )


def _count(name: str, step: Any) -> int:
    """The steps made, which the released code keeps as a number."""
    value = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise ValueError(f"FiraAdam: the state of {name} has step = {value!r}, which is no whole number; {_ANOTHER}.")
    if value < 1:
        raise ValueError(f"FiraAdam: the state of {name} has step = {value!r}, which is below 1; {_ANOTHER}.")
    return int(value)


def _require_moments(name: str, state: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    for key, kind in ADAM_STATES.items():
        moment = state[key]
        if tuple(moment.shape) != tuple(shape):
            raise ValueError(
                f"FiraAdam: the moment {key} of {name} has shape {tuple(moment.shape)} in the state dict where "
                f"{tuple(shape)} belongs; give the groups in the order in which the optimizer that saved it got them."
            )
        if not moment.is_floating_point():
            raise ValueError(f"FiraAdam: the moment {key} of {name} is of dtype {moment.dtype}; {_ANOTHER}.")
        if not bool(torch.isfinite(moment.float()).all()):
            raise ValueError(f"FiraAdam: the moment {key} of {name} is not finite; {_ANOTHER}.")
        if kind == "second" and bool((moment < 0).any()):
            raise ValueError(
                f"FiraAdam: the moment {key} of {name}, a mean of squares, has negative elements; {_ANOTHER}."
            )


def _norm(name: str, value: Any) -> Tensor:
    norm = torch.as_tensor(value).detach()
    if norm.numel() != 1 or not bool(torch.isfinite(norm).all()) or float(norm) < 0:
        found = f"of shape {tuple(norm.shape)}" if norm.numel() != 1 else repr(float(norm))
        raise ValueError(
            f"FiraAdam: scaling_grad of {name} is {found}, which is no finite norm of a residual; {_ANOTHER}."
        )
    return norm.float().reshape(())


def _basis(name: str, projector: Any, side: Side, shape: tuple[int, int]) -> Tensor:
    """P of a projector, (m, r) or (n, r); the released code keeps its transpose on the right."""
    matrix = getattr(projector, "ortho_matrix", None)
    if isinstance(matrix, Tensor) and matrix.ndim == 2:
        matrix = matrix.detach().float()
        matrix = matrix if side == "left" else matrix.mT
    if not isinstance(matrix, Tensor) or tuple(matrix.shape) != shape:
        found = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(
            f"FiraAdam: the projector of {name} holds {found} where its rank and proj_type give a basis of shape "
            f"{shape}; only proj_type 'std', 'reverse_std', 'left' and 'right' can be continued."
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"FiraAdam: the basis of {name} in its projector is not finite; {_ANOTHER}.")
    away = float((matrix.mT @ matrix - torch.eye(shape[1], device=matrix.device)).abs().max())
    if away > NOT_ORTHONORMAL:
        raise ValueError(
            f"FiraAdam: the columns of the basis of {name} in its projector are not orthonormal (off by {away:.2g}); "
            f"{_ANOTHER}."
        )
    return matrix.contiguous()


def _flat(moment: Tensor) -> dict[str, Tensor]:
    return {VALUES: moment.detach().float().reshape(-1)}
