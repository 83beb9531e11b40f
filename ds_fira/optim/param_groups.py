"""Param groups for `FiraAdam`: from a model, from a flat list of parameters, or for a DeepSpeed engine."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from ds_fira.core.algorithms import FIRA_ADAM, KEY, Algorithm, algorithm_of
from ds_fira.core.param_shape import numel_of, shape_of
from ds_fira.core.selection import find_projected_weights, projected_weights, undecayed_weights
from ds_fira.optim.settings import NOT_OF_GROUPS, check_params
from ds_fira.sharding.plan import split_by_size, split_evenly
from ds_fira.sharding.projection import is_projected

# Settings that concern what is not projected too.
SHARED = ("lr", "betas", "eps", "weight_decay")


def param_groups(
    model: nn.Module,
    rank: int,
    target_modules: Sequence[str] | str | None = None,
    *,
    groups: Iterable[dict[str, Any]] | None = None,
    optimizer: str = FIRA_ADAM.name,
    **settings: Any,
) -> list[dict[str, Any]]:
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
    projected_settings = {"rank": checked["rank"], **given}
    projected = projected_weights(model, checked["target_modules"])
    undecayed = undecayed_weights(model)
    if groups is None:
        groups = [{"params": list(model.parameters())}]
    result = []
    for group in groups:
        own = {key: value for key, value in group.items() if key != "params"}
        parts: dict[str, list[Parameter]] = {"projected": [], "rest": [], "undecayed": []}
        for param in _parameters(group["params"]):
            if not param.requires_grad:
                continue
            kind = "projected" if id(param) in projected else "undecayed" if id(param) in undecayed else "rest"
            parts[kind].append(param)
        keeps_decay = "weight_decay" in own
        unranked = {key: value for key, value in own.items() if key != "rank"}
        result += [
            {"params": parts["projected"], **projected_settings, **own},
            {"params": parts["rest"], **shared, **unranked},
            {"params": parts["undecayed"], **shared, **({} if keeps_decay else {"weight_decay": 0.0}), **unranked},
        ]
    return [group for group in result if group["params"]]


def _items(params: Any) -> list[Any]:
    """What a group lists, parameters or (name, parameter) pairs."""
    if isinstance(params, set):
        raise TypeError("parameters have to be in an order that is the same in every run; give a list, not a set.")
    return [params] if isinstance(params, Tensor) else list(params)


def _parameters(params: Any) -> list[Parameter]:
    """The parameters of a group, whether given bare, as one, or as (name, parameter) pairs."""
    return [item[1] if isinstance(item, tuple) else item for item in _items(params)]


def ranked_groups(
    params: Sequence[Any], rank: int | None, target_modules: Sequence[str] | None = None, name: str = FIRA_ADAM.name
) -> list[dict[str, Any]]:
    """Param groups of which some have a rank, from what a constructor was given: one rule for all of its forms.

    Groups that have a rank of their own say what is projected. Where none has, the constructor's rank applies to the
    weights of all groups that `param_groups` would project; each group is split into these and the rest, and both keep
    its keys. A group that says `rank = None` stays as it is.

    A list of parameters does not say which module they belong to, so the live modules that own them are looked up. Of
    those that no module owns (made by hand), every 2-D parameter is projected.

    Args:
        params: parameters, (name, parameter) pairs, or param groups; at least one.
        rank: the constructor's.
        target_modules: substrings of the names of the modules to project.
        name: of the optimizer.

    Raises:
        ValueError: there is no rank, or it finds nothing to project.
    """
    groups = list(params) if isinstance(params[0], dict) else [{"params": params}]
    if require_one_rank(groups, rank, "", name) is None:
        return groups
    bare = [param for group in groups for param in _parameters(group["params"])]
    owners = owning_modules(bare)
    owned = {id(param) for owner in owners for param in owner.parameters()}
    projected = {id(param) for param in bare if len(shape_of(param)) == 2 and id(param) not in owned}
    if target_modules is not None and not owners:
        raise ValueError(
            f"{name}: target_modules = {list(target_modules)!r} need the model that owns the parameters, and none is "
            "alive; pass ds_fira.param_groups(model, rank, target_modules) instead."
        )
    for owner in owners:
        projected |= find_projected_weights(owner, target_modules).keys()
    if len(owners) == 1 and not projected:
        projected_weights(owners[0], target_modules)  # says what is wrong
    result = []
    for group in groups:
        items = _items(group["params"])
        chosen = set() if "rank" in group else projected & {id(param) for param in _parameters(items)}
        parts = [[item for item in items if (id(_parameters([item])[0]) in chosen) is kind] for kind in (True, False)]
        result += [{**group, "params": part, "rank": rank} for part in parts[:1] if part]
        result += [{**group, "params": part} for part in parts[1:] if part]
    if not any(group.get("rank") is not None for group in result):
        raise ValueError(
            f"{name}: rank = {rank!r}, but none of the {len(bare)} parameters is a weight to project; add 2-D weights, "
            "or train with AdamW."
        )
    return result


def require_one_rank(groups: Iterable[dict[str, Any]], rank: int | None, where: str, name: str) -> int | None:
    """The rank that applies to param groups without one of their own; None where the groups say what is projected.

    Args:
        groups: as the user gave them.
        rank: of the constructor or the JSON config.
        where: it stands, for a message: "" for the constructor.
        name: of the optimizer.

    Raises:
        ValueError: there is no rank, neither there nor in a group.
    """
    groups = list(groups)
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
            stacklevel=5,
        )
    return None if own else rank


def by_kind(group: dict[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
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


def owning_modules(params: Sequence[Tensor]) -> list[nn.Module]:
    """The live modules that own the parameters: as few as will do, the smallest of those that own as many."""
    missing = {id(param) for param in params}
    candidates = []
    # issubclass of the type, not isinstance: lazy proxies answer isinstance by importing what they stand for.
    for module in [item for item in gc.get_objects() if issubclass(type(item), nn.Module)]:
        try:
            owned = {id(param) for param in module.parameters()}
        except AttributeError:  # a module whose __init__ has not run yet
            continue
        if owned & missing:
            candidates.append((len(owned & missing), -len(owned), owned, module))
    candidates.sort(key=lambda candidate: candidate[:2], reverse=True)
    owners = []
    for _, _, owned, module in candidates:
        if owned & missing:
            owners.append(module)
            missing -= owned
    return owners


def group_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a param group without its own values takes; `rank` is never among them."""
    return {name: value for name, value in settings.items() if name not in (*NOT_OF_GROUPS, "rank")}


def build_groups(
    module: nn.Module,
    model_parameters: Iterable[Any],
    settings: dict[str, Any],
    zero_stage: int,
    dp_size: int,
    algorithm: Algorithm = FIRA_ADAM,
) -> list[dict[str, Any]]:
    """Param groups for a FiraAdam that DeepSpeed builds from its JSON config.

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
    given = list(model_parameters)
    user_groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    rank = require_one_rank(user_groups, settings["rank"], " in the DeepSpeed config", algorithm.name)
    projected = {} if rank is None else projected_weights(module, settings["target_modules"])
    groups = []
    for user_group in user_groups:
        own = {key: value for key, value in user_group.items() if key not in ("params", "rank")}
        own_rank = user_group.get("rank", rank)
        params = [p for p in _parameters(user_group["params"]) if p.requires_grad and numel_of(p) > 0]
        chosen = [p for p in params if own_rank is not None and ("rank" in user_group or id(p) in projected)]
        chosen_ids = {id(param) for param in chosen}
        rests = [[param for param in params if id(param) not in chosen_ids]]
        ranked = {**own, "rank": own_rank}
        parts = [chosen]
        # ZeRO makes a float32 copy of the gradients of one group's partition at a time.
        most = settings["max_group_bytes"] // 4
        if zero_stage in (1, 2):
            parts = split_evenly(
                [(shape_of(p), p) for p in chosen], dp_size, lambda shape, most=most: most // math.prod(shape)
            )
        elif zero_stage == 3:  # which cuts every parameter by itself, whatever the groups
            kinds = by_kind({**ranked, "params": chosen}, {**settings, **algorithm.group_values})
            parts = [
                part
                for kind in kinds
                for part in split_by_size([(numel_of(p), p) for p in kind["params"]], most * dp_size)
            ]
        if zero_stage > 0:
            rests = split_by_size([(numel_of(p), p) for p in rests[0]], most * dp_size)
        groups += [{**ranked, "params": part} for part in parts if part]
        groups += [{**own, "params": part} for part in rests if part]
    if rank is not None and not any("rank" in group for group in groups):
        raise ValueError(
            f"{algorithm.name}: rank = {rank!r}, but none of the trainable parameters given to DeepSpeed is a weight "
            "to project; train some linear weights, or train with AdamW."
        )
    return groups
