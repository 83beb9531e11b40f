"""Where a rank applies: one rule for what a constructor, a config and param groups say of it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, nn
from torch.nn import Parameter

from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.selection import (
    find_named_weights,
    find_projected_weights,
    projected_elsewhere,
    projected_weights,
    some_names,
)
from ds_fira.core.settings import ParamGroup
from ds_fira.sharding.comm import is_first_process

# Noted in param groups whose rank found nothing to project, until an optimizer is made of them.
NOTHING = "nothing_to_project"
# A parameter, bare or with its name.
Item = Tensor | tuple[str, Tensor]


def _items(params: Tensor | Iterable[Item]) -> list[Item]:
    """What a group lists, parameters or (name, parameter) pairs."""
    if isinstance(params, set):
        raise TypeError("parameters have to be in an order that is the same in every run; give a list, not a set.")
    return [params] if isinstance(params, Tensor) else list(params)


def named_parameters(params: Tensor | Iterable[Item]) -> list[tuple[str, Parameter]]:
    """The parameters of a group, given bare, as one, or as (name, parameter) pairs; "" where there is no name."""
    return [item if isinstance(item, tuple) else ("", item) for item in _items(params)]


def parameters_of(params: Tensor | Iterable[Item]) -> list[Parameter]:
    """The parameters of a group, without their names."""
    return [param for _, param in named_parameters(params)]


def apart(items: Iterable[Item], ids: Collection[int]) -> tuple[list[Item], list[Item]]:
    """The items whose parameters are among those of these identities, and the others."""
    parts: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        parts[id(item[1] if isinstance(item, tuple) else item) not in ids].append(item)
    return parts


def grouped(params: Iterable[Item | ParamGroup]) -> list[ParamGroup]:
    """Param groups as given, or one of parameters that are given without; each with a list of what it holds."""
    params = list(params)
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    return [{**group, "params": _items(group["params"])} for group in groups]


def linear_weights(
    groups: Iterable[ParamGroup], model: nn.Module | None = None
) -> tuple[dict[int, str], Collection[int]]:
    """What a recorder of scaling factors has to know of the parameters: names, and which are of linear layers.

    Args:
        groups: of parameters or (name, parameter) pairs.
        model: whose parameters they are, where it is known.

    Returns:
        Names by `id` of the parameter, in the given order, without those that have none; the ids of linear weights.
    """
    named = [item for group in groups for item in named_parameters(group["params"])]
    found = find_named_weights(named) if model is None else find_projected_weights(model)
    return {id(param): name for name, param in named if name}, found.keys()


def split_by_rank(groups: Iterable[ParamGroup], rank: int | None, projected: Collection[int]) -> list[ParamGroup]:
    """Groups of one kind: a group without a rank of its own is split into what is projected at `rank`, and the rest."""
    result = []
    for group in groups:
        chosen, rest = apart(group["params"], () if "rank" in group else projected)
        result += [{**group, "params": chosen, "rank": rank}] if chosen else []
        result += [{**group, "params": rest}] if rest else []
    return result


def ranked_groups(
    groups: list[ParamGroup],
    rank: int | None,
    target_modules: Sequence[str] | None = None,
    name: str = FIRA_ADAM.name,
    model: nn.Module | None = None,
) -> list[ParamGroup]:
    """Param groups of which some have a rank, from what a constructor was given: one rule for all of its forms.

    Groups that have a rank of their own say what is projected. Where none has, the constructor's rank applies to the
    weights of all groups that `param_groups` would project; each group is split into these and the rest, and both keep
    its keys. A group that says `rank = None` stays as it is.

    Where the model is not given, (name, parameter) pairs tell embeddings and heads by their names
    (`find_named_weights`). Of parameters without names every 2-D one is projected, with a warning.

    Args:
        groups: the user's, of parameters or (name, parameter) pairs.
        rank: the constructor's.
        target_modules: substrings of the names of the modules to project.
        name: of the optimizer.
        model: whose parameters they are, where it is known.

    Raises:
        ValueError: there is no rank.
    """
    if require_one_rank(groups, rank, "", name) is None:
        return _without_note(groups)
    if model is not None:
        projected = projected_weights(model, target_modules, name)
    else:
        projected = _projected_names(groups, rank, target_modules, name)
    groups = split_by_rank(groups, rank, projected)
    elsewhere = projected_elsewhere(model, rank, target_modules)
    return _without_note(told_unprojected(groups, rank, name, elsewhere))


def _without_note(groups: list[ParamGroup]) -> list[ParamGroup]:
    return [{key: value for key, value in group.items() if key != NOTHING} for group in groups]


def told_unprojected(
    groups: list[ParamGroup], rank: int | None, name: str, elsewhere: Collection[object] = ()
) -> list[ParamGroup]:
    """Groups as they are; where a rank found nothing to project, with a warning and a note in each.

    Args:
        groups: split by `split_by_rank`.
        rank: of the constructor or the JSON config.
        name: of the optimizer.
        elsewhere: what other stages of a pipeline project; then there is nothing to warn of.
    """
    if rank is None or any(group.get("rank") is not None for group in groups):
        return groups
    if is_first_process() and not elsewhere:
        count = sum(len(group["params"]) for group in groups)
        warnings.warn(
            f"{name}: rank = {rank!r}, but none of the {count} trained parameters is a linear weight to project, so "
            "all of them take AdamW's step; give param groups with a rank to project others.",
            stacklevel=4,
        )
    return [{**group, NOTHING: True} for group in groups]


def _projected_names(
    groups: list[ParamGroup], rank: int | None, target_modules: Sequence[str] | None, name: str
) -> dict[int, str]:
    """The parameters to project where the model is not known."""
    named = [item for group in groups for item in named_parameters(group["params"])]
    projected = find_named_weights(named, target_modules)
    remedy = f"pass the model, as in {name}(model, rank={rank}), or ds_fira.param_groups(model, rank={rank})"
    if not any(key for key, _ in named):
        if target_modules is not None:
            raise ValueError(
                f"{name}: target_modules = {list(target_modules)!r} need names, and these parameters have none; "
                f"{remedy}, with the same target_modules."
            )
        if len(projected) > 1:
            warnings.warn(
                f"{name}: these parameters have no names, so all {len(projected)} matrices are projected, embeddings "
                f"and heads too, if any; {remedy}, to project linear layers only.",
                stacklevel=4,
            )
    elif target_modules is not None and not projected:
        modules = [key.rpartition(".")[0] for key in find_named_weights(named).values()]
        raise ValueError(
            f"{name}: target_modules = {list(target_modules)!r} match the module of no weight to project; use parts of "
            f"names such as {some_names(modules)}."
        )
    return projected


def require_one_rank(groups: Sequence[ParamGroup], rank: int | None, where: str, name: str) -> int | None:
    """The rank that applies to param groups without one of their own; None where the groups say what is projected.

    Args:
        groups: as the user gave them.
        rank: of the constructor or the JSON config.
        where: it stands, for a message: "" for the constructor.
        name: of the optimizer.

    Raises:
        ValueError: there is no rank, neither there nor in a group.
    """
    if any(NOTHING in group for group in groups):
        return None
    own = any(group.get("rank") is not None for group in groups)
    if not own and rank is None:
        raise ValueError(
            f"{name}: rank = None{where}, and no param group has one, so nothing would be projected; set a rank, such "
            "as 128, or train with AdamW."
        )
    if not own and all("rank" in group for group in groups):
        raise ValueError(
            f"{name}: rank = {rank!r}{where}, but every param group says rank = None, so nothing would be projected; "
            "leave rank out of a group, or train with AdamW."
        )
    if own and rank is not None:
        warnings.warn(
            f"{name}: rank = {rank!r}{where} is not used, because the param groups say themselves what is projected; "
            "remove rank and target_modules there, or 'rank' from the groups.",
            stacklevel=4,
        )
    return None if own else rank
