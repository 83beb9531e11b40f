"""Param groups for `FiraAdam`: from a model, from a flat list of parameters, or for a DeepSpeed engine."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from ds_fira.layout import split_by_size, split_evenly
from ds_fira.methods import FIRA_ADAM, KEY, method_of
from ds_fira.selection import find_projected_weights, projected_weights, undecayed_weights
from ds_fira.settings import NOT_OF_GROUPS, check_params
from ds_fira.zero_shapes import numel_of, shape_of

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
            its lr, weight_decay, name and every other key go to both. A group that sets weight_decay keeps it for its
            norms and biases too.
        optimizer: the name of the optimizer that they are for, which says which settings there are.
        **settings: settings of the projected groups, such as `alpha` or `update_proj_gap`. lr, weight_decay and
            those of the base optimizer, such as betas and eps, go to every group.

    Returns:
        Groups in the order: per user group its projected weights, its other weights, its norms and biases. Empty ones
        are left out.

    Raises:
        ValueError: a setting is unknown or out of range, or nothing is to be projected.
    """
    method = method_of({KEY: optimizer})
    given = {**settings, "rank": rank, "target_modules": target_modules}
    checked = check_params(given, "ds_fira.param_groups", method)
    given = {key: checked[key] for key in settings}
    shared = {key: value for key, value in given.items() if key in SHARED or key in method.own_settings}
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
        result += [
            {"params": parts["projected"], **projected_settings, **own},
            {"params": parts["rest"], **shared, **own},
            {"params": parts["undecayed"], **shared, **({} if keeps_decay else {"weight_decay": 0.0}), **own},
        ]
    return [group for group in result if group["params"]]


def _parameters(params: Any) -> list[Parameter]:
    """The parameters of a group, whether given bare, as one, or as (name, parameter) pairs."""
    if isinstance(params, Tensor):
        return [params]
    return [item[1] if isinstance(item, tuple) else item for item in params]


def split_flat_list(
    params: Sequence[Any], rank: int, target_modules: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Groups for a flat list of parameters: the weights that `param_groups` would project, with the rank, and the rest.

    The list does not say which module a parameter belongs to, so the live modules that own them are looked up. Of those
    that no module owns (made by hand), every 2-D parameter is projected.

    Raises:
        ValueError: nothing in the list is to be projected.
    """
    bare = _parameters(params)
    owners = owning_modules(bare)
    owned = {id(param) for owner in owners for param in owner.parameters()}
    projected = {id(param) for param in bare if len(shape_of(param)) == 2 and id(param) not in owned}
    if target_modules is not None and not owners:
        raise ValueError(
            f"FiraAdam: target_modules = {list(target_modules)!r} need the model that owns the parameters, and none is "
            "alive; pass ds_fira.param_groups(model, rank, target_modules) instead."
        )
    for owner in owners:
        projected |= find_projected_weights(owner, target_modules).keys()
    if len(owners) == 1 and not projected:
        projected_weights(owners[0], target_modules)  # says what is wrong
    items = list(zip(params, bare, strict=True))
    with_rank = [item for item, param in items if id(param) in projected]
    rest = [item for item, param in items if id(param) not in projected]
    if not with_rank:
        raise ValueError(
            f"FiraAdam: rank = {rank!r}, but none of the {len(bare)} parameters is a weight to project; remove the "
            "rank or add 2-D weights."
        )
    groups = [{"params": with_rank, "rank": rank}]
    return [*groups, {"params": rest}] if rest else groups


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
    module: nn.Module, model_parameters: Iterable[Any], settings: dict[str, Any], zero_stage: int, dp_size: int
) -> list[dict[str, Any]]:
    """Param groups for a FiraAdam that DeepSpeed builds from its JSON config.

    A user's groups are kept apart, with their keys. If any of them has a rank, those say what is projected; otherwise
    the JSON rank applies to the weights that `projected_weights` names. Under ZeRO-1 and 2 each is then split by
    shape, so that partition boundaries fall between matrices where the number of ranks allows it. Under any ZeRO no
    group's partition is larger than `max_group_bytes`, unless by a single parameter on each rank.

    Args:
        module: the engine's module.
        model_parameters: parameters, (name, parameter) pairs or param groups.
        settings: checked JSON `params`.
        zero_stage: 0 keeps one projected group for each user group.
        dp_size: ranks that ZeRO partitions over.

    Raises:
        ValueError: the rank finds nothing to project.
    """
    given = list(model_parameters)
    user_groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    by_rank_key = any("rank" in group for group in user_groups)
    rank = settings["rank"]
    if by_rank_key and rank is not None:
        warnings.warn(
            f"FiraAdam: rank = {rank!r} in the DeepSpeed config is not used, because the param groups say themselves "
            "what is projected; remove rank and target_modules from the config, or 'rank' from the groups.",
            stacklevel=2,
        )
        rank = None
    projected = {} if rank is None else projected_weights(module, settings["target_modules"])
    groups = []
    for user_group in user_groups:
        own = {key: value for key, value in user_group.items() if key != "params"}
        params = [p for p in _parameters(user_group["params"]) if p.requires_grad and numel_of(p) > 0]
        chosen = [param for param in params if "rank" in own or id(param) in projected]
        chosen_ids = {id(param) for param in chosen}
        rest = [param for param in params if id(param) not in chosen_ids]
        parts, rests = [chosen], [rest]
        # ZeRO makes a float32 copy of the gradients of one group's partition at a time.
        most = settings["max_group_bytes"] // 4
        if zero_stage in (1, 2):
            parts = split_evenly(
                [(shape_of(p), p) for p in chosen], dp_size, lambda shape, most=most: most // math.prod(shape)
            )
        elif zero_stage == 3:  # which cuts every parameter by itself, whatever the groups
            parts = split_by_size([(numel_of(p), p) for p in chosen], most * dp_size)
        if zero_stage > 0:
            rests = split_by_size([(numel_of(p), p) for p in rest], most * dp_size)
        groups += [{"rank": rank, **own, "params": part} for part in parts if part]
        groups += [{**own, "params": part} for part in rests if part]
    if rank is not None and not any("rank" in group for group in groups):
        raise ValueError(
            f"FiraAdam: rank = {rank!r}, but none of the trainable parameters given to DeepSpeed is a weight to "
            "project; remove the rank or train some linear weights."
        )
    return groups
