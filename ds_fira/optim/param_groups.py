"""Param groups for `FiraAdam`: from a model, from a flat list of parameters, or for a DeepSpeed engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ds_fira.core.algorithms import FIRA_ADAM, KEY, Algorithm, algorithm_of
from ds_fira.core.selection import (
    is_sliced,
    numel_of,
    projected_elsewhere,
    projected_weights,
    shape_of,
    undecayed_weights,
)
from ds_fira.core.settings import ParamGroup
from ds_fira.optim.doors import note_model
from ds_fira.optim.expert_groups import keys_of, ranks_of
from ds_fira.optim.presets import PRESET, preset_mark, projected_matrices, take_mark, values_of
from ds_fira.optim.rank_rule import (
    Item,
    apart,
    grouped,
    parameters_of,
    require_one_rank,
    split_by_rank,
    told_unprojected,
)
from ds_fira.optim.settings import NOT_OF_GROUPS, check_params
from ds_fira.sharding.plan import split_by_size, split_evenly
from ds_fira.sharding.projection import is_projected

# Settings that concern what is not projected too.
SHARED = ("lr", "betas", "eps", "weight_decay", "vector_lr_scale", "capturable")


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
            those of the base optimizer, such as betas and eps, go to every group. A `preset` is noted in every group
            with what it gives for this model, and the optimizer takes that where neither it nor a group says otherwise.

    Returns:
        Groups in the order: per user group its projected weights, its other weights, its norms and biases. Empty ones
        are left out. What is not projected is stepped by the released code's AdamW, whose eps is not torch's: see
        `FiraAdam`.

    Raises:
        ValueError: a setting is unknown or out of range.
    """
    model = note_model(model)
    algorithm = algorithm_of({KEY: optimizer})
    given = {**settings, "rank": rank, "target_modules": target_modules}
    checked = check_params(given, "ds_fira.param_groups", algorithm)
    given = {key: checked[key] for key in settings if key != PRESET}
    shared = {key: value for key, value in given.items() if key in SHARED or key in algorithm.own_settings}
    projected = projected_weights(model, checked["target_modules"], optimizer)
    undecayed = undecayed_weights(model)
    if groups is None:
        groups = [{"params": list(model.parameters())}]
    result = []
    for group in groups:
        own = {key: value for key, value in group.items() if key != "params"}
        unranked = {key: value for key, value in own.items() if key != "rank"}
        trained = [param for param in parameters_of(group["params"]) if param.requires_grad]
        chosen, others = apart(trained, projected)
        norms, rest = apart(others, undecayed)
        result += [
            {"params": chosen, "rank": checked["rank"], **given, **own},
            {"params": rest, **shared, **unranked},
            {"params": norms, **shared, "weight_decay": 0.0, **unranked},
        ]
    elsewhere = projected_elsewhere(model, checked["rank"], checked["target_modules"])
    result = [group for group in result if group["params"]]
    result = told_unprojected(result, checked["rank"], algorithm.name, elsewhere)
    return _marked(result, preset_mark(checked.get(PRESET), projected_matrices(result, projected) + elsewhere))


def _marked(groups: list[ParamGroup], mark: Mapping[str, object]) -> list[ParamGroup]:
    """Groups that say what a preset gives, so that an optimizer takes it for its defaults."""
    return [{**group, PRESET: dict(mark)} for group in groups] if mark else groups


def by_kind(group: ParamGroup, settings: Mapping[str, object], flat: bool = True) -> list[ParamGroup]:
    """A param group, or several: what its rank projects and what not, and of each the experts and the slices apart.

    Norms and biases too, where `vector_lr_scale` gives them a learning rate of their own.

    Args:
        group: with a list of parameters.
        settings: what the group leaves out.
        flat: whether each part becomes one tensor; else every parameter is stepped by itself, and norms may stay.
    """
    params, ranked, own = parameters_of(group["params"]), group.get("rank") is not None, {**settings, **group}
    scaled = flat and not ranked and own.get("vector_lr_scale", 1.0) != 1.0
    kinds = [
        (
            not (ranked and is_projected(shape_of(param), own)),
            tuple(keys_of(param).items()),
            is_sliced(param),
            scaled and len(shape_of(param)) < 2,
        )
        for param in params
    ]
    # torch lists the names apart, parameter by parameter.
    listed = [key for key in ("params", "param_names") if key in group]
    return [
        {
            **group,
            **{key: [item for item, own in zip(group[key], kinds, strict=True) if own == kind] for key in listed},
            **dict(kind[1]),
        }
        for kind in sorted(set(kinds))
    ] or [group]


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
        dp_size: data-parallel ranks.
        algorithm: the optimizer.

    Returns:
        The groups; with a preset, each says what it gives for the model, computed from all that is projected.

    Raises:
        ValueError: there is no rank, or there are two presets.
    """
    user_groups = grouped(model_parameters)
    mark = take_mark(user_groups, settings, algorithm.name)
    rank = require_one_rank(user_groups, settings["rank"], " in the DeepSpeed config", algorithm.name)
    projected = {} if rank is None else projected_weights(module, settings["target_modules"], algorithm.name)
    chosen = [
        {**group, "params": [p for p in parameters_of(group["params"]) if p.requires_grad and numel_of(p) > 0]}
        for group in split_by_rank(user_groups, rank, projected)
    ]
    elsewhere = projected_elsewhere(module, rank, settings["target_modules"])
    if settings.get(PRESET) is not None:
        names = {id(param): name for name, param in module.named_parameters()}
        mark = {**preset_mark(settings[PRESET], projected_matrices(chosen, names) + elsewhere), **mark}
    defaults = {**values_of(mark), **settings, **algorithm.group_values}
    # ZeRO makes a float32 copy of the gradients of one group's partition at a time.
    most = settings["max_group_bytes"] // 4
    groups = []
    for group in chosen:
        own = {key: value for key, value in group.items() if key != "rank" or value is not None}
        for kind in _kinds(own, defaults, zero_stage):
            ranks = ranks_of(kind, dp_size)
            sized, held = [(numel_of(p), p) for p in kind["params"]], [(shape_of(p), p) for p in kind["params"]]
            if zero_stage == 0:
                parts = [kind["params"]]
            elif zero_stage < 3 and "rank" in own:
                parts = split_evenly(held, ranks, lambda shape: most // math.prod(shape))
            else:
                parts = split_by_size(sized, most * ranks)
            groups += [{**kind, "params": part} for part in parts if part]
    return _marked(told_unprojected(groups, rank, algorithm.name, elsewhere), mark)


def _kinds(group: ParamGroup, settings: Mapping[str, object], zero_stage: int) -> list[ParamGroup]:
    """A group with the experts apart, and at stage 3, which cuts every parameter by itself, what is projected too."""
    if zero_stage == 3:
        return by_kind(group, settings)
    unranked = {key: value for key, value in group.items() if key != "rank"}
    return [{**group, **kind} for kind in by_kind(unranked, settings, flat=zero_stage > 0)]
