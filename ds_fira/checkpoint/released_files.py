"""Read the files and states of the released code, PyPI `fira` (1.0.2) and `galore-torch` (1.0), by name.

Both keep, per projected weight, a pickled projector with an `ortho_matrix` beside Adam's moments; `fira` also the norm
of the last residual, under "scaling_grad". Files are read without importing either package.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_fira.checkpoint import safe_load
from ds_fira.checkpoint.named_state import SavedMoments, SavedState
from ds_fira.checkpoint.reconcile import SavedGroup
from ds_fira.checkpoint.slices import StateSlice
from ds_fira.core.algorithms import ADAM_STATES
from ds_fira.core.quantization import VALUES
from ds_fira.core.state import MatrixState
from ds_fira.core.subspace import Side, basis_shape, effective_rank, low_rank_shape, projection_side
from ds_fira.sharding.geometry import ParamSlice

PROJECTORS = tuple(
    safe_load.stand_in(origin, tensors=True)
    for origin in ("fira.gradient_projection.GradientProjector", "galore_torch.galore_projector.GaLoreProjector")
)
PROJ_TYPES = ("std", "reverse_std", "left", "right")
# The largest element of P'P - I: 1e-6 as an SVD in float32 leaves it, up to 0.02 after rounding to bfloat16.
NOT_ORTHONORMAL = 0.1
_ANOTHER = "load another checkpoint of that run"
_ORDER = "give the groups in the order in which the optimizer that saved it got them"
_REMEDY = (
    "save the optimizer alone, where the code that made it is trusted: torch.save(optimizer.state_dict(), file), and "
    "give that file"
)


def read_released_state(path: str | os.PathLike[str]) -> object:
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


def optimizer_part(content: object) -> Mapping[str, object]:
    """The state dict of the optimizer in what was given to `load_released_state`.

    Raises:
        ValueError: there is none.
    """
    if isinstance(content, str | os.PathLike):
        content = read_released_state(content)
    if isinstance(content, Mapping) and "param_groups" not in content and isinstance(content.get("optimizer"), Mapping):
        content = content["optimizer"]
    for key, kind in (("param_groups", list), ("state", Mapping)):
        _require(
            isinstance(content, Mapping) and isinstance(content.get(key), kind),
            f"what was given as the state of a released run has no {key}",
            "give what its optimizer.state_dict() gave, or a file with it",
        )
    return content


def _require(holds: bool, fault: str, remedy: str = _ANOTHER) -> None:
    if not holds:
        raise ValueError(f"{fault}; {remedy}.")


def released_state(
    state_dict: Mapping[str, object], names: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]]
) -> SavedState:
    """A state dict of the released code by the names of its parameters.

    Args:
        state_dict: of `fira.FiraAdamW` or `galore_torch.GaLoreAdamW`.
        names: of the parameters of every group, in order.
        shapes: of all parameters, by name.

    Raises:
        ValueError: it does not fit the names, or is of a kind that this package cannot continue.
    """
    listed = state_dict["param_groups"]
    _require_groups(listed)
    sizes, given = [len(group["params"]) for group in listed], [len(group) for group in names]
    _require(
        sizes == given,
        f"the state dict has groups of {sizes} parameters, and groups of {given} were named",
        "give the groups as they were given to the optimizer that saved it",
    )
    known = {number for group in listed for number in group["params"]}
    for number in state_dict["state"]:
        _require(number in known, f"the state dict holds a state of parameter {number!r}, which none of its groups has")
    saved = SavedState()
    for group, members in zip(listed, names, strict=True):
        for name in members:
            _require(name in shapes, f"groups name {name}, which is not trained now", "train the same parameters")
        values = {"rank": group.get("rank"), "proj_type": group.get("proj_type", "std"), "formulation": "released"}
        saved.groups.append(SavedGroup({name: tuple(shapes[name]) for name in members}, {}, values))
        for name, number in zip(members, group["params"], strict=True):
            state = state_dict["state"].get(number)
            if state:
                _add(saved, name, tuple(shapes[name]), state, {**group, **values})
    return saved


def _add(
    saved: SavedState, name: str, shape: tuple[int, ...], state: Mapping[str, object], group: Mapping[str, object]
) -> None:
    for key in ADAM_STATES:
        _require(
            isinstance(state.get(key), Tensor),
            f"the state of {name} has no tensor {key}, as Adafactor and 8-bit Adam have none",
            "only the AdamW of fira and galore-torch can be continued",
        )
    count, rank = _count(name, state.get("step")), group["rank"]
    if rank is None:
        _require_moments(name, state, shape)
        moments = {key: {VALUES: state[key].detach().float().reshape(-1)} for key in ADAM_STATES}
        held = ParamSlice(name, 0, 0, state["exp_avg"].numel())
        saved.moments[name].append((held, SavedMoments(torch.tensor(count), moments)))
        return
    _require(len(shape) == 2, f"{name} has shape {shape}, and the released code projects matrices only", _ORDER)
    side = projection_side(shape, group["proj_type"], "released")
    basis = _basis(name, state.get("projector"), side, basis_shape(shape, rank, side))
    _require_moments(name, state, low_rank_shape(shape, rank, side))
    kept = range(shape[1] if side == "left" else shape[0])
    held = StateSlice(name, shape, side, effective_rank(shape, rank), "", None, range(len(basis)), kept)
    # The released code refreshes before steps whose number, from 0, is a multiple of the gap.
    last = (count - 1) // group["update_proj_gap"] * group["update_proj_gap"]
    moments = {key: {VALUES: state[key].detach().float()} for key in ADAM_STATES}
    _require(
        "scaling_grad" in state or type(state["projector"]).__name__ != "GradientProjector",
        f"the state of {name} has no scaling_grad, which fira keeps",
    )
    norm = _norm(name, state.get("scaling_grad", 0.0))
    found = MatrixState(side, torch.tensor(count), torch.tensor(last), basis, moments, norm)
    saved.matrices[name].append((held, found))


def _require_groups(listed: Sequence[object]) -> None:
    """Stop if a param group says what no run of the released code can have had."""
    for number, group in enumerate(listed):
        whose = f"param group {number} of the state dict has"
        _require(
            isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple), f"{whose} no list of params"
        )
        proj_type, rank = group.get("proj_type", "std"), group.get("rank")
        only = f"only {', '.join(map(repr, PROJ_TYPES))} can be continued"
        _require(proj_type in PROJ_TYPES, f"{whose} proj_type = {proj_type!r}", only)
        for setting in ("rank", "update_proj_gap") if rank is not None else ():
            value = group.get(setting)
            whole = type(value) is int and value >= 1
            _require(whole, f"{whose} {setting} = {value!r}, which is no whole number of at least 1")


def _count(name: str, step: object) -> int:
    """The steps made, which the released code keeps as a number."""
    value = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = number and math.isfinite(value) and value == int(value)
    _require(whole, f"the state of {name} has step = {value!r}, which is no whole number")
    _require(value >= 1, f"the state of {name} has step = {value!r}, which is below 1")
    return int(value)


def _require_moments(name: str, state: Mapping[str, object], shape: tuple[int, ...]) -> None:
    for key, kind in ADAM_STATES.items():
        moment, which = state[key], f"the moment {key} of {name}"
        found = f"{which} has shape {tuple(moment.shape)} in the state dict where {tuple(shape)} belongs"
        _require(tuple(moment.shape) == tuple(shape), found, _ORDER)
        _require(moment.is_floating_point(), f"{which} is of dtype {moment.dtype}")
        _require(bool(torch.isfinite(moment.float()).all()), f"{which} is not finite")
        negative = kind == "second" and bool((moment < 0).any())
        _require(not negative, f"{which}, a mean of squares, has negative elements")


def _norm(name: str, value: object) -> Tensor:
    norm = torch.as_tensor(value).detach()
    one = norm.numel() == 1
    found = repr(float(norm)) if one else f"of shape {tuple(norm.shape)}"
    legal = one and bool(torch.isfinite(norm).all()) and float(norm) >= 0
    _require(legal, f"scaling_grad of {name} is {found}, which is no finite norm of a residual")
    return norm.float().reshape(())


def _basis(name: str, projector: object, side: Side, shape: tuple[int, int]) -> Tensor:
    """P of a projector, (m, r) or (n, r); the released code keeps its transpose on the right."""
    matrix = getattr(projector, "ortho_matrix", None)
    if isinstance(matrix, Tensor) and matrix.ndim == 2:
        matrix = matrix.detach().float()
        matrix = matrix if side == "left" else matrix.mT
    found = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
    _require(
        found == shape,
        f"the projector of {name} holds {found} where its rank and proj_type give a basis of shape {shape}",
        "only proj_type 'std', 'reverse_std', 'left' and 'right' can be continued",
    )
    _require(bool(torch.isfinite(matrix).all()), f"the basis of {name} in its projector is not finite")
    away = float((matrix.mT @ matrix - torch.eye(shape[1], device=matrix.device)).abs().max())
    _require(
        away <= NOT_ORTHONORMAL,
        f"the columns of the basis of {name} in its projector are not orthonormal (off by {away:.2g})",
    )
    return matrix.contiguous()
