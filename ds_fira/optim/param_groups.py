"""Param groups for `FiraAdam`: from a model, from a flat list of parameters, or for a DeepSpeed engine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import Parameter

from ds_fira.core.algorithms import FIRA_ADAM, KEY, Algorithm, algorithm_of
from ds_fira.core.selection import (
    find_named_weights,
    find_projected_weights,
    numel_of,
    projected_weights,
    shape_of,
    some_names,
    undecayed_weights,
)
from ds_fira.core.settings import ParamGroup
from ds_fira.optim.settings import NOT_OF_GROUPS, check_params
from ds_fira.sharding.plan import split_by_size, split_evenly
from ds_fira.sharding.projection import is_projected

# Settings that concern what is not projected too.
SHARED = ("lr", "betas", "eps", "weight_decay")
# A parameter, bare or with its name.
Item = Tensor | tuple[str, Tensor]


def param_groups(
    model: nn.Module,
    rank: int,
    target_modules: Sequence[str] | str | None = None,
    *,
    groups: Iterable[ParamGroup] | None = None,
    optimizer: str = FIRA_ADAM.name,
    **settings: object,
) -> list[ParamGroup]:
    """Param groups for `FiraAdam`: projected weights apart from the rest, norms and biases without weight decay.

    Args:
        model: the model whose trainable parameters are grouped.
        rank: subspace rank of the projected weights.
        target_modules: substrings of the names of the modules to project; None for every linear layer but the head.
        groups: the user's own groups of this model's parameters. Each is split into its projected part and the rest;
            its lr, weight_decay, name and every other key but a rank go to both. A group that sets weight_decay keeps
            it for its norms and biases too.
        optimizer: the name of the optimizer that they are for, which says which settings there are.
        **settings: settings of the projected groups, such as `alpha` or `update_proj_gap`. lr, weight_decay and
            those of the base optimizer, such as betas and eps, go to every group.

    Returns:
        Groups in the order: per user group its projected weights, its other weights, its norms and biases. Empty ones
        are left out. What is not projected is stepped by the released code's AdamW, whose eps is not torch's: see
        `FiraAdam`.

    Raises:
        ValueError: a setting is unknown or out of range, or nothing is to be projected.
    """
    algorithm = algorithm_of({KEY: optimizer})
    given = {**settings, "rank": rank, "target_modules": target_modules}
    checked = check_params(given, "ds_fira.param_groups", algorithm)
    given = {key: checked[key] for key in settings}
    shared = {key: value for key, value in given.items() if key in SHARED or key in algorithm.own_settings}
    projected = projected_weights(model, checked["target_modules"], optimizer)
    undecayed = undecayed_weights(model)
    if groups is None:
        groups = [{"params": list(model.parameters())}]
    result = []
    for group in groups:
        own = {key: value for key, value in group.items() if key != "params"}
        unranked = {key: value for key, value in own.items() if key != "rank"}
        trained = [param for param in _parameters(group["params"]) if param.requires_grad]
        chosen, others = _apart(trained, projected)
        norms, rest = _apart(others, undecayed)
        result += [
            {"params": chosen, "rank": checked["rank"], **given, **own},
            {"params": rest, **shared, **unranked},
            {"params": norms, **shared, "weight_decay": 0.0, **unranked},
        ]
    return [group for group in result if group["params"]]


def _items(params: Tensor | Iterable[Item]) -> list[Item]:
    """What a group lists, parameters or (name, parameter) pairs."""
    if isinstance(params, set):
        raise TypeError("parameters have to be in an order that is the same in every run; give a list, not a set.")
    return [params] if isinstance(params, Tensor) else list(params)


def named_parameters(params: Tensor | Iterable[Item]) -> list[tuple[str, Parameter]]:
    """The parameters of a group, given bare, as one, or as (name, parameter) pairs; "" where there is no name."""
    return [item if isinstance(item, tuple) else ("", item) for item in _items(params)]


def _parameters(params: Tensor | Iterable[Item]) -> list[Parameter]:
    return [param for _, param in named_parameters(params)]


def _apart(items: Iterable[Item], ids: Collection[int]) -> tuple[list[Item], list[Item]]:
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
        ValueError: there is no rank, or it finds nothing to project.
    """
    if require_one_rank(groups, rank, "", name) is None:
        return groups
    if model is not None:
        projected = projected_weights(model, target_modules, name)
    else:
        projected = _projected_names(groups, rank, target_modules, name)
    result = []
    for group in groups:
        chosen, rest = _apart(group["params"], () if "rank" in group else projected)
        result += [{**group, "params": chosen, "rank": rank}] if chosen else []
        result += [{**group, "params": rest}] if rest else []
    if not any(group.get("rank") is not None for group in result):
        count = sum(len(group["params"]) for group in groups)
        raise ValueError(
            f"{name}: rank = {rank!r}, but none of the {count} parameters is a weight to project; add 2-D weights, "
            "or train with AdamW."
        )
    return result


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


def by_kind(group: ParamGroup, settings: Mapping[str, object]) -> list[ParamGroup]:
    """A param group, or two of the same keys where it has a rank that projects some of its parameters only.

    Args:
        group: with a list of parameters.
        settings: what the group leaves out.
    """
    kinds = [is_projected(shape_of(param), {**settings, **group}) for param in _parameters(group["params"])]
    if group.get("rank") is None or len(set(kinds)) < 2:
        return [group]
    # torch lists the names apart, parameter by parameter.
    listed = [key for key in ("params", "param_names") if key in group]
    return [
        {**group, **{key: [item for item, own in zip(group[key], kinds, strict=True) if own is kind] for key in listed}}
        for kind in (True, False)
    ]


def group_defaults(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that a param group without its own values takes; `rank` is never among them."""
    return {name: value for name, value in settings.items() if name not in (*NOT_OF_GROUPS, "rank")}


def build_groups(
    module: nn.Module,
    model_parameters: Iterable[Item | ParamGroup],
    settings: Mapping[str, object],
    zero_stage: int,
    dp_size: int,
    algorithm: Algorithm = FIRA_ADAM,
) -> list[ParamGroup]:
    """Param groups for an optimizer that DeepSpeed builds from its JSON config.

    A user's groups are kept apart, with their keys. If any of them has a rank, those say what is projected; otherwise
    the JSON rank applies to the weights that `projected_weights` names, but in groups that say `rank = None`. Under
    ZeRO-1 and 2 each is then split by shape, so that partition boundaries fall between matrices where the number of
    ranks allows it; at stage 3 what is projected is split from what a rank leaves unprojected. Under any ZeRO no
    group's partition is larger than `max_group_bytes`, unless by a single parameter on each rank.

    Args:
        module: the engine's module.
        model_parameters: parameters, (name, parameter) pairs or param groups.
        settings: checked JSON `params`.
        zero_stage: 0 keeps one projected group for each user group.
        dp_size: ranks that ZeRO partitions over.
        algorithm: the optimizer.

    Raises:
        ValueError: there is no rank, or it finds nothing to project.
    """
    user_groups = grouped(model_parameters)
    rank = require_one_rank(user_groups, settings["rank"], " in the DeepSpeed config", algorithm.name)
    projected = {} if rank is None else projected_weights(module, settings["target_modules"], algorithm.name)
    # ZeRO makes a float32 copy of the gradients of one group's partition at a time.
    most = settings["max_group_bytes"] // 4
    groups = []
    for user_group in user_groups:
        own = {key: value for key, value in user_group.items() if key not in ("params", "rank")}
        ranked = {**own, "rank": user_group.get("rank", rank)}
        params = [p for p in _parameters(user_group["params"]) if p.requires_grad and numel_of(p) > 0]
        all_or_found = map(id, params) if "rank" in user_group else projected
        chosen, rest = _apart(params, set() if ranked["rank"] is None else set(all_or_found))
        parts, rests = [chosen], [rest]
        if zero_stage in (1, 2):
            parts = split_evenly([(shape_of(p), p) for p in chosen], dp_size, lambda shape: most // math.prod(shape))
        elif zero_stage == 3:  # which cuts every parameter by itself, whatever the groups
            kinds = by_kind({**ranked, "params": chosen}, {**settings, **algorithm.group_values})
            parts = [
                part
                for kind in kinds
                for part in split_by_size([(numel_of(p), p) for p in kind["params"]], most * dp_size)
            ]
        if zero_stage > 0:
            rests = split_by_size([(numel_of(p), p) for p in rest], most * dp_size)
        groups += [{**ranked, "params": part} for part in parts if part]
        groups += [{**own, "params": part} for part in rests if part]
    if rank is not None and not any("rank" in group for group in groups):
        raise ValueError(
            f"{algorithm.name}: rank = {rank!r}, but none of the trainable parameters given to DeepSpeed is a weight "
            "to project; train some linear weights, or train with AdamW."
        )
    return groups
