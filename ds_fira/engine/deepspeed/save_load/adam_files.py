"""Read what an Adam that is none of this package's left in DeepSpeed's files: the moments of whole parameters, by name.

torch's Adam and AdamW, and DeepSpeed's FusedAdam and CPUAdam, keep the same two moments. Under ZeRO they lie in the
order of the flat groups, whose names a checkpoint lists; at stage 0 by the positions of parameters alone.

What it relies on, of DeepSpeed 0.17 to 0.19, beside what `files.py` does: `param_shapes` in the model's file lists
names and shapes in the order of the flat groups (round robin or not), `param_alignment_paddings` what lies behind each
parameter, and `ds_config` the config; flat groups are padded to twice the ranks.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_fira.checkpoint.named_state import KEY, SavedMoments, SavedState
from ds_fira.checkpoint.reconcile import SavedGroup
from ds_fira.core.algorithms import ADAM_STATES, Algorithm
from ds_fira.core.quantization import VALUES
from ds_fira.core.state import BASIS, STEP
from ds_fira.engine.deepspeed.save_load.files import MASTERS, CheckpointFiles, normalized
from ds_fira.engine.deepspeed.save_load.slicing import saved_cuts, whole_shapes
from ds_fira.engine.deepspeed.save_load.universal_files import UniversalFiles
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.geometry import Partitioning

# Values of a param group that go on: the learning rate is the schedule's.
CARRIED = ("lr", "initial_lr")
Shapes = Mapping[str, tuple[int, ...]]
_ANEW = "load with load_optimizer_states=False to start anew from its weights"


def maker_of(files: CheckpointFiles, state_dict: Mapping[str, object]) -> str | None:
    """The optimizer of another package that made a checkpoint; None where it is one of this package, or not known.

    Args:
        files: of the checkpoint.
        state_dict: of the optimizer, of one rank.

    Raises:
        ValueError: it is another one, and no Adam.
    """
    if KEY in state_dict:
        return None
    states = state_dict.get("state") if isinstance(state_dict, Mapping) else None
    if not isinstance(states, Mapping):
        raise ValueError(
            "the checkpoint keeps its optimizer in another form than torch's, as zero_optimization.elastic_checkpoint "
            f"does; save it without that, or {_ANEW}."
        )
    config = files.model().get("ds_config")
    named = config.get("optimizer") if isinstance(config, Mapping) else None
    name = named.get("type") if isinstance(named, Mapping) else None
    found = {key for state in states.values() for key in state}
    if BASIS in found:
        return None  # of ours, before there was a description
    if not found or found >= {*ADAM_STATES}:
        return str(name or "AdamW")
    raise ValueError(
        f"the checkpoint was made by {name or 'another optimizer'}, which keeps {', '.join(sorted(found)[:4])}; only "
        f"the moments of an Adam can be taken over, so {_ANEW}."
    )


def given_names(engine: DeepSpeedEngine) -> list[list[str]]:
    """Names of the trained parameters in the groups and the order in which the engine was given them."""
    names = {id(param): name for name, param in normalized(dict(engine.module.named_parameters())).items()}
    return [[names.get(key, "") for key in group] for group in engine.fira_given]


def left_out(files: CheckpointFiles) -> list[str]:
    """What an Adam of another package kept beside its two moments, which nothing here takes over."""
    state_dict = files.optimizer_state(0)[1]
    found = {key for state in state_dict["state"].values() for key in state} - {STEP, *ADAM_STATES}
    # DeepSpeed's converter leaves it out itself.
    amsgrad = any(group.get("amsgrad") for group in state_dict["param_groups"])
    return sorted(found | ({"max_exp_avg_sq"} if amsgrad else set()))


def warn_of_adam(optimizer: LowRankOptimizer, name: str, lost: Sequence[str], stacklevel: int) -> None:
    """Say once, on the first rank, what becomes of the states of another package's Adam.

    Args:
        optimizer: that goes on.
        name: of the other.
        lost: of `left_out`.
        stacklevel: of the warning.
    """
    if optimizer.communicator.dp_rank != 0:
        return
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
    warnings.warn(
        f"{optimizer.algorithm.name}: the checkpoint was made by {name}: weights, step counts and the schedule's place "
        f"go on, at this run's own rate, now lr = {', '.join(f'{rate:.3g}' for rate in rates[:3])}; of each projected "
        f"matrix {name}'s moments are kept until its first basis, which the next step's gradient gives, and projected "
        f"on it, so that this step still takes the memory of {name}.",
        stacklevel=stacklevel,
    )
    if lost:
        warnings.warn(
            f"{optimizer.algorithm.name}: {', '.join(lost)} of the checkpoint of {name} is left out, since "
            f"{optimizer.algorithm.name} has no such state: steps are divided by the root of exp_avg_sq from now on"
            f"{', and not by that of its maximum (amsgrad)' if 'max_exp_avg_sq' in lost else ''}; keep {name} if the "
            "run needs it.",
            stacklevel=stacklevel,
        )


def read_adam(files: CheckpointFiles, name: str, given: Sequence[Sequence[str]]) -> SavedState:
    """The moments and master weights that all ranks of a run with Adam saved.

    Args:
        files: all of the checkpoint.
        name: of the optimizer.
        given: names of the parameters of every group that the new run was given, by which stage 0 knows them.

    Raises:
        ValueError: which parameters the states are of cannot be said.
    """
    if isinstance(files, UniversalFiles):
        return files.read_adam(name)
    saved, cuts = SavedState(algorithm=Algorithm(name, limited=False)), saved_cuts(files, ())
    for number, each in enumerate(files.of_all_slices()):
        labels = {key: of_it[number].label for key, of_it in cuts.items() if of_it}
        _read_slice(saved, each, name, given, labels)
    for group in saved.groups:
        group.members.update(whole_shapes(group.members, cuts))
    return saved


def _read_slice(
    saved: SavedState,
    files: CheckpointFiles,
    name: str,
    given: Sequence[Sequence[str]],
    labels: Mapping[str, str],
) -> None:
    """Add what is in the files of one slice of a module, or of all of it.

    Args:
        saved: gets it.
        files: of the slice.
        name: as of `read_adam`.
        given: likewise.
        labels: by parameter the name of its slice; of others their own.
    """
    model = files.model()
    listed = model.get("param_shapes") if files.optimizers else None
    weights = normalized({key: value for key, value in model["module"].items() if isinstance(value, Tensor)})
    ranks = len(files.optimizers) or 1
    for rank in range(ranks):
        wrapper, state_dict = files.optimizer_state(rank)
        groups = state_dict["param_groups"]
        owners = [(number, group) for number, group in enumerate(groups) for _ in group["params"]]
        states = [state_dict["state"].get(number, {}) for group in groups for number in group["params"]]
        if listed is not None:
            shapes = [normalized({key: tuple(shape) for key, shape in part.items()}) for part in listed]
        else:
            shapes = _shapes_by_position(groups, states, weights, given, wrapper)
        if len(shapes) != len(states):
            raise ValueError(
                f"the checkpoint of {name} lists {len(shapes)} groups of parameters and states of {len(states)}; load "
                "another tag."
            )
        if not saved.groups:
            saved.groups = _groups(groups, owners, shapes, name)
        masters = _masters(wrapper) or [weights[key].reshape(-1) for part in shapes for key in part]
        for place, (part, state) in enumerate(zip(shapes, states, strict=True)):
            numels = tuple(math.prod(shape) for shape in part.values())
            if files.partitioned:
                layout = Partitioning.of_slices(numels, ranks)
            else:
                layout = _flat(numels, wrapper, place, state, ranks if listed is not None else 1)
            slices = layout.slices(rank, [labels.get(key, key) for key in part])
            step = state.get(STEP, owners[place][1].get(STEP))
            for held in slices:
                saved.weights[held.name].append((held, masters[place].reshape(-1)))
                if state:
                    flats = {key: {VALUES: state[key].reshape(-1)} for key in ADAM_STATES}
                    saved.moments[held.name].append((held, SavedMoments(torch.tensor(int(step)), flats)))


def _groups(
    groups: Sequence[Mapping[str, object]],
    owners: Sequence[tuple[int, object]],
    shapes: Sequence[Shapes],
    name: str,
) -> list[SavedGroup]:
    """The param groups of the run that saved, each with all of its parameters."""
    found = []
    for number, group in enumerate(groups):
        members = {
            key: shape
            for (own, _), part in zip(owners, shapes, strict=True)
            if own == number
            for key, shape in part.items()
        }
        values = {key: group[key] for key in CARRIED if key in group}
        found.append(SavedGroup(members, {}, values, made_by=name))
    return found


def _masters(wrapper: Mapping[str, object]) -> list[Tensor] | None:
    """The stepped tensors in the order of the states; None where these are the module's own weights."""
    flat = next((wrapper[key] for key in (*MASTERS, "fp32_groups_flat") if key in wrapper), None)
    if flat is None and "fp32_groups" in wrapper:
        flat = [tensor for group in wrapper["fp32_groups"] for tensor in group]
    return flat


def _flat(
    numels: tuple[int, ...], wrapper: Mapping[str, object], place: int, state: Mapping[str, Tensor], ranks: int
) -> Partitioning:
    """Where parameters lie in a flat group of stages 1 and 2, and at stage 0, where all are in one tensor."""
    paddings = wrapper.get("param_alignment_paddings") or ()
    behind = paddings[place] if place < len(paddings) else [0] * len(numels)
    ends = list(itertools.accumulate(numel + padding for numel, padding in zip(numels, behind, strict=True)))
    size = state[next(iter(ADAM_STATES))].numel() if state else math.ceil(ends[-1] / (2 * ranks)) * 2
    return Partitioning(numels, (0, *ends[:-1]), max(size, 1), ranks, sliced=False)


def _shapes_by_position(
    groups: Sequence[Mapping[str, object]],
    states: Sequence[Mapping[str, Tensor]],
    weights: Mapping[str, Tensor],
    given: Sequence[Sequence[str]],
    wrapper: Mapping[str, object],
) -> list[Shapes]:
    """Names and shapes of what is stepped at stage 0: the parameters that the new run was given, in the same order."""
    sizes = [len(group["params"]) for group in groups]
    if "fp32_groups_flat" in wrapper:  # one tensor a group
        names = [list(part) for part in given]
        fits = len(names) == sum(sizes)
    else:
        names = [[name] for part in given for name in part]
        fits = [len(part) for part in given] == sizes
    shapes = [{name: tuple(weights[name].shape) for name in part if name in weights} for part in names]
    fits = fits and all(
        not state or state["exp_avg"].numel() == sum(math.prod(shape) for shape in part.values())
        for state, part in zip(states, shapes, strict=True)
    )
    if not fits:
        raise ValueError(
            f"the checkpoint holds, without names, the states of {sizes} parameters in its groups, and this run was "
            f"given groups of {[len(part) for part in given]}, or others; give the engine the parameters in the groups "
            f"and the order of the run that saved, or {_ANEW}."
        )
    return shapes
