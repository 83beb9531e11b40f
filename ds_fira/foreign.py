"""Continue a run of the released code, PyPI `fira` (1.0.2) and `galore-torch` (1.0), in FiraAdam and GaLoreAdam.

Both keep, per projected weight, a pickled projector with an `ortho_matrix` beside Adam's moments; `fira` also the norm
of the last residual, under "scaling_grad". Neither says which parameter a state belongs to but by its position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ds_fira.carry_over import SavedGroup, refuse_changed_structure
from ds_fira.checkpoint import SavedMoments, SavedState
from ds_fira.compression import VALUES
from ds_fira.methods import ADAM_STATES, FIRA_ADAM, GALORE_ADAM, KEY
from ds_fira.optimizer import LowRankOptimizer
from ds_fira.places import MatrixPlace, Piece
from ds_fira.state import MatrixState
from ds_fira.subspace import Side, basis_shape, effective_rank, projection_side
from ds_fira.zero import fira_of
from ds_fira.zero_check import agree
from ds_fira.zero_checkpoint import stepped_params
from ds_fira.zero_files import normalized


def load_released_state(
    engine_or_optimizer: Any, state_dict: Mapping[str, Any], groups: Iterable[Any], model: nn.Module | None = None
) -> None:
    """Go on where an optimizer of `fira` or `galore-torch` stopped: basis, moments, step counts and the limiter.

    Weights are not touched: load them into the model first. Learning rate and schedule are the caller's.

    Args:
        engine_or_optimizer: a DeepSpeed engine that trains with FiraAdam or GaLoreAdam at any stage, or one of these
            optimizers; its rank, proj_type and gap as in the run that saved. After GaLore, GaLoreAdam goes on as
            GaLore, and with FiraAdam the run becomes Fira.
        state_dict: what that optimizer's `state_dict()` gave, the same on every rank.
        groups: its param groups in their order: dicts with "params", or sequences of parameters of the model, or of
            their names.
        model: the model whose parameters `groups` holds; None for the engine's module, or for names.

    Raises:
        ValueError: the groups do not fit the state dict or the model, or the state was made with another rank or side;
            the same on every rank.
    """
    optimizer = fira_of(engine_or_optimizer)
    if model is None:
        model = getattr(engine_or_optimizer, "module", None)
    error = None
    try:
        members = optimizer._members()
        saved = released_state(state_dict, _names(groups, model, optimizer), dict(chain.from_iterable(members)))
        if optimizer.method in (FIRA_ADAM, GALORE_ADAM):  # whose states are alike
            for group in saved.groups:
                group.values.update({KEY: optimizer.method.name})
        refuse_changed_structure(saved.groups, optimizer.param_groups, members)
        with stepped_params(engine_or_optimizer):
            optimizer.restore(saved, weights=False)
    except Exception as raised:
        error = raised
    if optimizer.channel is not None:
        agree(optimizer.channel, error, optimizer.method.name)
    elif error is not None:
        raise error


def _names(groups: Iterable[Any], model: nn.Module | None, optimizer: LowRankOptimizer) -> list[list[str]]:
    """The names of the parameters of every group."""
    known = {id(param): name for name, param in normalized(dict(model.named_parameters())).items()} if model else {}
    if not optimizer.members:  # alone, where FiraAdam knows its parameters by their numbers
        listed = zip(optimizer.param_groups, optimizer._members(), strict=True)
        known = {id(p): name for group, names in listed for p, (name, _) in zip(group["params"], names, strict=True)}
    found = []
    for group in groups:
        params = group["params"] if isinstance(group, Mapping) else group
        params = [params] if isinstance(params, Tensor) else list(params)
        strangers = [p for p in params if not isinstance(p, str) and id(p) not in known]
        if strangers:
            raise ValueError(
                f"FiraAdam: groups hold a parameter of shape {tuple(strangers[0].shape)} that is none of the model's; "
                "build them from the model given to DeepSpeed, or give names."
            )
        found.append([p if isinstance(p, str) else known[id(p)] for p in params])
    return found


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
    sizes, given = [len(group["params"]) for group in listed], [len(group) for group in names]
    if sizes != given:
        raise ValueError(
            f"FiraAdam: the state dict has groups of {sizes} parameters, and groups of {given} were named; give the "
            "groups as they were given to the optimizer that saved it."
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
    step = torch.tensor(int(state["step"]))
    if group["rank"] is None:
        found = tuple(state["exp_avg"].shape)
        if found != shape:
            raise ValueError(
                f"FiraAdam: {name} has shape {shape} and its moments in the state dict {found}; "
                "give the groups in the order in which the optimizer that saved it got them."
            )
        moments = SavedMoments(step, {key: _flat(state[key]) for key in ADAM_STATES})
        saved.moments[name].append((Piece(name, 0, 0, state["exp_avg"].numel()), moments))
        return
    matrix = (shape[-2], shape[-1])
    side = projection_side(matrix, group["proj_type"], "released")
    rank = effective_rank(matrix, group["rank"])
    basis = _basis(name, state.get("projector"), side, basis_shape(matrix, group["rank"], side))
    place = MatrixPlace(
        name, matrix, side, rank, "", None, range(len(basis)), range(matrix[1] if side == "left" else matrix[0])
    )
    # The released code refreshes before steps whose number, from 0, is a multiple of the gap.
    last = (int(step) - 1) // group["update_proj_gap"] * group["update_proj_gap"]
    norm = torch.as_tensor(state.get("scaling_grad", 0.0)).detach().float().reshape(())
    moments = {key: {VALUES: state[key].detach().float()} for key in ADAM_STATES}
    saved.matrices[name].append((place, MatrixState(side, step, torch.tensor(last), basis, moments, norm)))


def _basis(name: str, projector: Any, side: Side, shape: tuple[int, int]) -> Tensor:
    """P of a projector, (m, r) or (n, r); the released code keeps its transpose on the right."""
    matrix = getattr(projector, "ortho_matrix", None)
    if isinstance(matrix, Tensor):
        matrix = matrix.detach().float()
        matrix = matrix if side == "left" else matrix.mT
    if not isinstance(matrix, Tensor) or tuple(matrix.shape) != shape:
        found = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(
            f"FiraAdam: the projector of {name} holds {found} where its rank and proj_type give a basis of shape "
            f"{shape}; only proj_type 'std', 'reverse_std', 'left' and 'right' can be continued."
        )
    return matrix.contiguous()


def _flat(moment: Tensor) -> dict[str, Tensor]:
    return {VALUES: moment.detach().float().reshape(-1)}
