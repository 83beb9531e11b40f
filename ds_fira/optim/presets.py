"""Named presets: what stands in for the settings that a user leaves out, some of it computed from the model.

A preset is one row of `PRESETS`: settings that are the same for every model, and laws that give a setting for the size
of a model. `check_params` leaves out what a preset has yet to give; once it is known what is projected, `preset_mark`
gives it, the same on every rank, ZeRO stage and number of ranks. A user's own value wins wherever it stands.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ds_fira.checkpoint.reconcile import SavedGroup
from ds_fira.core.selection import shape_of
from ds_fira.core.settings import GroupSettings, ParamGroup
from ds_fira.optim.rank_rule import named_parameters

# The setting; and in a param group what the preset gave it: {"name": "recommended", "lr": ..., "residual_scale": ...}.
PRESET = "preset"
NAME = "name"
# The laws, by the model that they were tuned on: 128 wide, 2 layers deep, rank 32.
BASE_ALPHA, BASE_RANK_DEPTH = 0.25, 64
BASE_STEP, BASE_WIDTH = 0.3, 128
WARMUP_PER_LAYER = 50
# The number of an expert that is a module of its own: all experts of a layer count as one.
_EXPERT = re.compile(r"(expert[^.]*)\.\d+(?=\.|$)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What laws know of a model.

    Attributes:
        width: inputs of most projected matrices, the hidden width.
        depth: layers.
        rank: the subspace rank of most projected matrices.
    """

    width: int
    depth: int
    rank: int


def transferred_alpha(size: ModelSize) -> float:
    """The alpha with which one lr is the best at every rank and depth (docs/transfer.md).

    The low-rank part of the update, P N, has about sqrt(rank) times the norm of one direction, in every layer; it is
    kept from growing beyond what trains best with the published alpha. A smaller one gains nothing by a larger alpha.
    """
    return BASE_ALPHA * min(1.0, BASE_RANK_DEPTH / (size.rank * size.depth)) ** 0.5


def transferred_scale(size: ModelSize) -> float:
    """The residual_scale that belongs to `transferred_alpha`, so that alpha x residual_scale goes by the width.

    An element of a normalized residual moves W by lr x alpha x residual_scale in a step. What keeps the outputs' change
    is 1 / fan_in, as in the maximal-update parametrisation (arXiv 2203.03466).
    """
    return BASE_STEP * BASE_WIDTH / size.width / transferred_alpha(size)


def transferred_warmup(size: ModelSize) -> int:
    """The steps over which the residual grows to that size: noise keeps a deeper model from starting for longer.

    The residual has no momentum that averages its noise. Without a warm-up of its own a model of 4 layers bears half
    the residual that one of 2 bears; with it, the same (docs/transfer.md).
    """
    return WARMUP_PER_LAYER * size.depth


@dataclass(frozen=True)
class Preset:
    """One preset.

    Attributes:
        settings: names and values that are the same for every model.
        laws: of further settings, what gives the value for a model.
    """

    settings: Mapping[str, object]
    laws: Mapping[str, Callable[[ModelSize], object]] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[str, ...]:
        """The names of all settings that it gives."""
        return (*self.settings, *self.laws)


PRESETS: Mapping[str, Preset] = {
    "recommended": Preset(
        settings={
            "lr": 0.01,
            "residual": "normalized",
            "residual_beta": 0.0,
            # At the rate of embeddings, norms cost 3 to 4% of perplexity at width 128 (docs/transfer.md).
            "vector_lr_scale": 0.1,
        },
        laws={
            "alpha": transferred_alpha,
            "residual_scale": transferred_scale,
            "residual_warmup": transferred_warmup,
        },
    ),
}
# A projected parameter: its name, "" where there is none; its shape, (m, n), or (experts, m, n), which counts as one
# matrix; its rank.
Projected = tuple[str, Sequence[int], int]
PresetName = Literal[tuple(PRESETS)]


def preset_rows(name: object) -> tuple[str, ...]:
    """The names of the settings that a preset gives; none for None, and for a name that there is not."""
    return PRESETS[name].rows if isinstance(name, str) and name in PRESETS else ()


def size_of(matrices: Iterable[Projected]) -> ModelSize:
    """Width, depth and rank of a model, from the matrices that are projected in it.

    The width is their commonest number of inputs, their second dimension; of two that are as common, the smaller. The
    depth is the largest number of matrices whose names are equal but for the numbers between dots, as those of
    `layers.0.mlp.up_proj.weight` to `layers.11.mlp.up_proj.weight`. Where some have no name, or no name has a number,
    it is the smallest number of matrices that share a shape. The rank is that of most of them.

    Args:
        matrices: all of them.

    Raises:
        ValueError: there is none.
    """
    matrices = [(name, tuple(shape), rank) for name, shape, rank in matrices if len(shape) > 1 and 0 not in shape]
    found = [(name, shape[-2:]) for name, shape, _ in matrices]
    if not found:
        raise ValueError("there is no projected matrix whose size a preset could go by; give a rank.")
    inputs = Counter(shape[1] for _, shape in found)
    width = max(inputs, key=lambda count: (inputs[count], -count))
    rank = Counter(rank for _, _, rank in matrices).most_common(1)[0][0]
    names = {_EXPERT.sub(r"\1", name) for name, _ in found}
    if all(name for name, _ in found) and any(map(_NUMBER.search, names)):
        return ModelSize(width, max(Counter(_NUMBER.sub("*", name) for name in names).values()), rank)
    return ModelSize(width, min(Counter(shape for _, shape in found).values()), rank)


def projected_matrices(groups: Iterable[ParamGroup], names: Mapping[int, str] | None = None) -> list[Projected]:
    """For `size_of`, the parameters in all groups with a rank.

    Args:
        groups: of parameters or (name, parameter) pairs.
        names: by `id` of the parameter, over those of the pairs.
    """
    return [
        ((names or {}).get(id(param), name), shape_of(param), group["rank"])
        for group in groups
        if group.get("rank") is not None
        for name, param in named_parameters(group["params"])
    ]


def preset_mark(name: str | None, matrices: Iterable[Projected]) -> dict[str, object]:
    """What a preset gives for a model, with the preset's name; nothing without one; no laws where nothing is projected.

    Args:
        name: of the preset, checked.
        matrices: all that is projected in the model, as in `size_of`.
    """
    if name is None:
        return {}
    preset, matrices = PRESETS[name], list(matrices)
    if not matrices:
        return {NAME: name, **preset.settings}
    size = size_of(matrices)
    return {NAME: name, **preset.settings, **{setting: law(size) for setting, law in preset.laws.items()}}


def values_of(mark: Mapping[str, object]) -> dict[str, object]:
    """The settings in a mark."""
    return {setting: value for setting, value in mark.items() if setting != NAME}


def preset_in(groups: Iterable[ParamGroup]) -> dict[str, str]:
    """The setting `preset` as `ds_fira.param_groups` noted it in param groups; empty where it noted none."""
    marks = [group[PRESET] for group in groups if isinstance(group.get(PRESET), dict)]
    return {PRESET: marks[0][NAME]} if marks else {}


def given_by_user(
    groups: Iterable[ParamGroup],
    given: Iterable[Mapping[str, object]],
    members: Iterable[Sequence[tuple[str, object]]],
    saved: Mapping[str, Mapping[str, object]],
) -> list[dict[str, object]]:
    """Of resumed param groups, the settings they were given, without those that a preset gave them then as now.

    So a run that a preset began goes on with its own values, also where the preset has come to give others, or to give
    a setting that there was not, whose default `with_later_defaults` has put there.

    Args:
        groups: the param groups.
        given: the settings each was made with.
        members: of each, the parameters, named as in `saved`.
        saved: by parameter, the values of the group that it was saved in.
    """
    result = []
    for group, own, listed in zip(groups, given, members, strict=True):
        before = [saved.get(name, {}).get(PRESET, {}) for name, _ in listed]
        both = {setting for setting in group.get(PRESET, {}) if all(setting in mark for mark in before)}
        result.append({setting: value for setting, value in own.items() if setting not in both})
    return result


def with_later_defaults(group: SavedGroup) -> SavedGroup:
    """A saved param group with the defaults of settings that its preset has come to give since.

    They are in its mark too, as if the preset had given them; a group without a preset stays as it is.
    """
    mark = group.values.get(PRESET)
    if not mark:
        return group
    rows = (name for name in preset_rows(mark[NAME]) if name not in group.values)
    later = {name: GroupSettings.model_fields[name].default for name in rows}
    return replace(group, given={**later, **group.given}, values={**group.values, **later, PRESET: {**mark, **later}})


def take_mark(groups: Sequence[ParamGroup], given: Mapping[str, object], where: str) -> dict[str, object]:
    """Remove from param groups what was noted there of a preset, by `ds_fira.param_groups` or `build_groups`.

    Args:
        groups: as they were made; changed.
        given: the settings beside them.
        where: what a message begins with.

    Returns:
        What was noted; empty where it was nothing.

    Raises:
        ValueError: a group names a preset for itself, or there are two presets; one sentence.
    """
    found: dict[str, object] = {}
    for mark in [group.pop(PRESET) for group in groups if group.get(PRESET) is not None]:
        if not isinstance(mark, dict):
            raise ValueError(
                f"{where}: preset = {mark!r} in a param group is a setting of the whole training; give it beside the "
                "groups, to the constructor or in the config's params."
            )
        if any(found.get(key, value) != value for key, value in mark.items()):
            raise ValueError(
                f"{where}: preset = {found} in one param group and {mark} in another, and a training has one; make all "
                "groups with one call of ds_fira.param_groups."
            )
        found |= mark
    if found and given.get(PRESET) not in (None, found[NAME]):
        raise ValueError(
            f"{where}: preset = {given[PRESET]!r} beside param groups that were made with {found[NAME]!r}; name it in "
            "ds_fira.param_groups alone."
        )
    return found
