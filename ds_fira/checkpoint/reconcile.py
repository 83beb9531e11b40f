"""Decide, group by group, what a resumed run takes from the checkpoint and what from its own config.

Settings that shape the state (rank, side) have to agree. Values of param groups come from the checkpoint, as in
`torch.optim`, so that whatever a scheduler or the user made of them goes on; but a setting that the user *gave* the new
run otherwise than the old one keeps the new value, and is said. The learning rate is the scheduler's and is not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ds_fira.core.algorithms import FIRA_ADAM, KEY, algorithm_of
from ds_fira.core.subspace import effective_rank, projection_side
from ds_fira.sharding.projection import PROJECT_FULL_RANK, hangs_on_full_rank, is_projected


@dataclass(frozen=True, slots=True)
class SavedGroup:
    """A param group of the run that saved.

    Attributes:
        members: names and shapes of its parameters, over all ranks.
        given: the settings it was made with.
        values: its settings when it was saved, and what else it carried.
        origin: the number of the user's group that it was a part of; None where it was one by itself.
        made_by: an optimizer of another package; None for one of this package.
    """

    members: dict[str, tuple[int, ...]]
    given: dict[str, object]
    values: dict[str, object]
    origin: int | None = None
    made_by: str | None = None

    @property
    def projects_full_rank(self) -> bool:
        """Whether it projected matrices at full rank; version 0.1.0, which had no such setting, did."""
        return self.values.get("rank") is not None and self.values.get(PROJECT_FULL_RANK, True)


Members = Sequence[tuple[str, tuple[int, ...]]]


def without(saved: Sequence[SavedGroup], names: Collection[str]) -> list[SavedGroup]:
    """Saved groups as if some parameters had not been among them; a group that is left empty stays."""
    return [replace(group, members={n: s for n, s in group.members.items() if n not in names}) for group in saved]


def refuse_changed_structure(
    saved: Sequence[SavedGroup], groups: Sequence[Mapping[str, object]], members: Sequence[Members]
) -> None:
    """Stop unless the saved states fit the parameters, the same on every rank.

    Args:
        saved: the groups of the run that saved.
        groups: the param groups now.
        members: of each, names and shapes of its parameters, over all ranks.

    Raises:
        ValueError: one sentence with the parameter, what differs, both values and the remedy.
    """
    for group, old in zip(groups, saved, strict=False):
        previous = old.values.get(KEY, FIRA_ADAM.name)
        if old.made_by is None and algorithm_of(group).name != previous:
            raise ValueError(
                f"the checkpoint was made by {previous}; set optimizer.type = {previous!r} to resume, or load with "
                "load_optimizer_states=False to start anew from its weights."
            )
    before = {name: (group, shape) for group in saved for name, shape in group.members.items()}
    now = {name: (group, shape) for group, listed in zip(groups, members, strict=True) for name, shape in listed}
    for names, holds, trained in (
        (now.keys() - before.keys(), "no optimizer state", "is trained now"),
        (before.keys() - now.keys(), "optimizer state", "is not trained now"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"the checkpoint holds {holds} for {min(names)}{more}, which {trained}; train the same parameters of "
                "the same model, or load with load_optimizer_states=False."
            )
    for name, (group, shape) in now.items():
        old, old_shape = before[name]
        if shape != old_shape:
            raise ValueError(
                f"{name} has shape {shape} and had {old_shape} in the checkpoint; build the model as it was."
            )
        if old.made_by is not None:
            continue  # its moments are of whole parameters
        # Which of the two it is at full rank the checkpoint says (`saved_projection`).
        full_rank = {PROJECT_FULL_RANK: old.projects_full_rank}
        group, values = {**group, **full_rank}, {**old.values, **full_rank}
        for setting in ("rank", "proj_type", "formulation"):
            mine, theirs = _structure(setting, shape, group), _structure(setting, shape, values)
            if mine != theirs:
                value, previous = group.get(setting), old.values.get(setting)
                raise ValueError(
                    f"{setting} = {value!r} for {name}, whose state in the checkpoint was made with {previous!r}; set "
                    f"{setting} to {previous!r} to resume, or load with load_optimizer_states=False to start anew from "
                    "its weights."
                )


def _structure(setting: str, shape: tuple[int, ...], group: Mapping[str, object]) -> int | str | None:
    """How a setting shapes the state of one parameter: two values that make the same are no difference."""
    if not is_projected(shape, group):
        return None
    matrix = (shape[-2], shape[-1])
    if setting == "rank":
        return effective_rank(matrix, group["rank"])
    return projection_side(matrix, group["proj_type"], group["formulation"])


def saved_projection(saved: Sequence[SavedGroup], group: Mapping[str, object], listed: Members) -> bool | None:
    """What `project_full_rank` of a param group has to be for its states to be those of the checkpoint.

    Args:
        saved: the groups of the run that saved.
        group: the param group now.
        listed: names and shapes of its parameters.

    Returns:
        None where the states are the same either way.

    Raises:
        ValueError: it was true for some parameters of the group and false for others.
    """
    found = {
        saved[number].projects_full_rank: member
        for number, (member, shape) in _numbered(saved, listed)
        if hangs_on_full_rank(shape, group) and saved[number].made_by is None
    }
    if len(found) > 1:
        raise ValueError(
            f"project_full_rank was true for {found[True]} and false for {found[False]} in the checkpoint, and one "
            "param group has both now; put them into groups of their own, as they were."
        )
    return next(iter(found), None)


def carry_values(
    saved: Sequence[SavedGroup],
    groups: Sequence[dict[str, object]],
    members: Sequence[Members],
    given: Sequence[Mapping[str, object]],
) -> list[str]:
    """Give the param groups the values of the groups that had their parameters.

    Args:
        saved: the groups of the run that saved.
        groups: the param groups now; changed.
        members: as in `refuse_changed_structure`.
        given: the settings each group was made with.

    Returns:
        One phrase for every setting whose value differs from the checkpoint's or is not used.
    """
    notes: dict[str, None] = {}
    for group, listed, own in zip(groups, members, given, strict=True):
        sources = [saved[index] for index in sorted({index for index, _ in _numbered(saved, listed)})]
        full_rank = saved_projection(saved, group, listed)
        if full_rank is not None:
            group[PROJECT_FULL_RANK] = full_rank
            if own.get(PROJECT_FULL_RANK, full_rank) != full_rank:
                notes[f"{PROJECT_FULL_RANK} goes on from the checkpoint's {full_rank}, not from {not full_rank}"] = None
        for key in [key for key in (sources[0].values if sources else ()) if key != PROJECT_FULL_RANK]:
            found = [source.values.get(key) for source in sources]
            if any(not _equal(value, found[0]) for value in found):
                notes[f"{key} = {group.get(key)!r}, since its parameters were in groups with different values"] = None
                continue
            changed = key in own and any(
                key in source.given and not _equal(own[key], source.given[key]) for source in sources
            )
            if changed and key == "lr":
                notes[f"lr goes on from the checkpoint's {found[0]!r}, not from {own[key]!r}"] = None
            if changed and key != "lr":
                notes[f"{key} = {own[key]!r} where the checkpoint had {found[0]!r}"] = None
            elif isinstance(group.get(key), Tensor):
                group[key].fill_(float(found[0]))  # who holds the tensor goes on changing this learning rate
            else:
                group[key] = float(found[0]) if isinstance(found[0], Tensor) else found[0]
    return list(notes)


def _numbered(saved: Sequence[SavedGroup], listed: Members) -> list[tuple[int, tuple[str, tuple[int, ...]]]]:
    """The parameters of a group that were saved, each with the number of the saved group that had it."""
    number = {name: index for index, group in enumerate(saved) for name in group.members}
    return [(number[name], (name, shape)) for name, shape in listed if name in number]


def _whole(saved: Sequence[SavedGroup]) -> list[SavedGroup]:
    """The user's groups, each from its parts, as far as their members go."""
    found: dict[object, SavedGroup] = {}
    for index, group in enumerate(saved):
        key = (index,) if group.origin is None else group.origin
        before = found[key].members if key in found else {}
        found[key] = SavedGroup({**before, **group.members}, group.given, group.values, group.origin)
    return [found[key] for key in (found if any(group.origin is None for group in saved) else sorted(found))]


def _equal(first: object, second: object) -> bool:
    first, second = (float(value) if isinstance(value, Tensor) else value for value in (first, second))
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (math.isnan(first) and math.isnan(second))
    return first == second


def carry_schedule(state: object, own: object, saved: Sequence[SavedGroup], members: Sequence[Members]) -> object:
    """Bring the lists of one value a group, in the state of a learning-rate scheduler, to the groups now.

    Args:
        state: saved; its lists have a value for each of the user's groups, and before 0.2.0 for each of their parts.
        own: the state dict of the new scheduler; shows which lists go by the groups.
        saved: the groups of the run that saved.
        members: of every group that the new scheduler sees, names and shapes of its parameters, over all ranks.
    """
    if isinstance(state, dict) and isinstance(own, dict):
        return {
            key: carry_schedule(value, own[key], saved, members) if key in own else value
            for key, value in state.items()
        }
    if isinstance(state, list | tuple) and isinstance(own, list | tuple):
        nested = any(isinstance(value, dict) and "last_epoch" in value for value in state)  # SequentialLR's own
        for groups in (saved, _whole(saved)):
            if len(state) == len(groups) and len(own) == len(members) and not nested:
                order = [min((index for index, _ in _numbered(groups, listed)), default=0) for listed in members]
                return type(state)(state[index] for index in order)
        if len(state) == len(own):
            return type(state)(carry_schedule(a, b, saved, members) for a, b in zip(state, own, strict=True))
    return state
