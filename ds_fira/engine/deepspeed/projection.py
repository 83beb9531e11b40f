"""What an engine's optimizer projects and how it steps the rest: one flat partition holds one kind.

A checkpoint says what was projected.

Reads DeepSpeed's books through `ds_fira.engine.deepspeed.flat_groups` only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

from ds_fira.checkpoint.reconcile import SavedGroup, refuse_changed_structure, saved_projection
from ds_fira.core.selection import shape_of
from ds_fira.core.settings import GroupSettings
from ds_fira.engine.deepspeed.flat_groups import FlatGroup
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.projection import PROJECT_FULL_RANK, is_projected


def kinds_of(flat: FlatGroup, groups: Sequence[Mapping[str, object]]) -> Iterable[bool]:
    """Of every parameter of a flat tensor whether it is projected."""
    return (is_projected(shape_of(param), groups[flat.group]) for param in flat.lp_params)


def project_as_flat(optimizer: LowRankOptimizer, flats: Sequence[FlatGroup], communicator: Communicator) -> None:
    """Project at full rank after all where a flat tensor cannot be stepped otherwise, with a warning.

    That is where it holds matrices of both kinds, or where a rule has to see whole what is not projected.

    Args:
        optimizer: whose param groups are changed.
        flats: of all of them.
        communicator: whose first rank warns.
    """
    groups, rule, kept = optimizer.param_groups, optimizer.algorithm.rule, {}
    whole = rule is not None and not rule.elementwise
    for flat in flats:
        kinds = set(kinds_of(flat, groups))
        if "rank" in groups[flat.group] and (len(kinds) > 1 or (whole and False in kinds)):
            kept[flat.group] = None
    for number in kept:
        groups[number][PROJECT_FULL_RANK] = True
    if kept and communicator.dp_rank == 0:
        reason = f"{rule.__name__} is not elementwise" if whole else "ZeRO steps them with others as one flat tensor"
        remedy = "" if whole else "build the learning-rate scheduler after deepspeed.initialize or of user_groups, "
        warnings.warn(
            f"{optimizer.algorithm.name}: matrices of param group {', '.join(map(str, kept))} have a rank at which "
            f"low-rank states save nothing, and are projected all the same, because {reason}; {remedy}give a smaller "
            f"rank, put them into a group with rank = None, or say {PROJECT_FULL_RANK} = true.",
            stacklevel=2,
        )


def holds_vectors(flat: FlatGroup) -> bool:
    """Whether all parameters of a flat tensor, on all ranks, have at most one dimension."""
    return all(len(shape_of(param)) < 2 for param in flat.lp_params)


def warn_of_mixed(optimizer: LowRankOptimizer, flats: Sequence[FlatGroup], communicator: Communicator) -> None:
    """Say where `vector_lr_scale` has no effect: on norms and biases in one flat tensor with embeddings.

    Args:
        optimizer: whose param groups they are.
        flats: of all of them.
        communicator: whose first rank warns.
    """
    settings = {flat.group: GroupSettings.of(optimizer.param_groups[flat.group]) for flat in flats}
    mixed = {
        flat.group: settings[flat.group].vector_lr_scale
        for flat in flats
        if len({settings[flat.group].unprojected_scale(len(shape_of(param)) < 2) for param in flat.lp_params}) > 1
    }
    if mixed and communicator.dp_rank == 0:
        warnings.warn(
            f"{optimizer.algorithm.name}: vector_lr_scale = {next(iter(mixed.values()))} has no effect in param group "
            f"{', '.join(map(str, mixed))}, because ZeRO steps its norms and biases with matrices as one flat tensor; "
            "build the learning-rate scheduler after deepspeed.initialize or of user_groups, or make the groups with "
            "ds_fira.param_groups.",
            stacklevel=2,
        )


def project_as_saved(
    optimizer: LowRankOptimizer, saved: Sequence[SavedGroup], attach: Callable[[], None] | None
) -> None:
    """Let the param groups project what those of a checkpoint did, before its states are loaded.

    Args:
        optimizer: its param groups are changed.
        saved: the groups of the checkpoint, alike on all ranks.
        attach: tells it anew what lies where, inside an engine; a collective call. None where there is no engine.

    Raises:
        ValueError: the checkpoint does not fit, the same on every rank.
    """
    changed, members = {}, optimizer._members()
    for number, (group, listed) in enumerate(zip(optimizer.param_groups, members, strict=True)):
        wanted = saved_projection(saved, group, listed)
        if wanted is not None and wanted != group[PROJECT_FULL_RANK]:
            changed[number] = wanted
    # The stages of a pipeline have groups of their own, and are told anew together.
    alone = attach is None or optimizer.communicator is None
    if not (changed if alone else any(optimizer.communicator.gather_objects(bool(changed)))):
        return
    refuse_changed_structure(saved, optimizer.param_groups, members)
    if attach is None and optimizer.communicator is not None:
        raise ValueError(
            f"{optimizer.algorithm.name}: {PROJECT_FULL_RANK} has to become that of the run that saved, which its "
            "DeepSpeed engine has to be told; give the engine instead of its optimizer."
        )
    optimizer.project_full_rank(changed)
    if attach is not None:
        attach()
    for number, wanted in changed.items():
        if optimizer.param_groups[number][PROJECT_FULL_RANK] != wanted:
            raise ValueError(
                f"{optimizer.algorithm.name}: {PROJECT_FULL_RANK} was {wanted} in the checkpoint, and param group "
                f"{number} cannot be stepped so at this ZeRO stage; resume at stage 0, or give matrices of both kinds "
                "groups of their own."
            )
