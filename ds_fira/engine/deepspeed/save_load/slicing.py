"""Read from AutoTP which slices of which parameters the ranks have, in this run and in the one that saved.

Written against DeepSpeed 0.19.8. What it relies on: AutoTP describes the slices of a parameter by an affine map, in the
note that it leaves in the parameter (`conversion`), and of all of them in the file of the model's states, under
`universal_checkpoint_info`, by patterns that are the names. `ParamAffineMap` says what stands in one: pieces, each a
block of the whole parameter that lies in a rank's slice. Here each has to be all columns of some rows, or all rows of
some columns, one behind the other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping

import torch
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from torch import Tensor, nn

from ds_fira.checkpoint.cuts import Cut, matrix_shape
from ds_fira.checkpoint.named_state import SavedState
from ds_fira.checkpoint.restore import restore_weights
from ds_fira.core.selection import is_sliced
from ds_fira.engine.deepspeed.holders import Holders
from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles, normalized
from ds_fira.engine.deepspeed.save_load.written import untrained_values
from ds_fira.engine.deepspeed.tensor_parallel import NOTE
from ds_fira.sharding.geometry import ParamSlice
from ds_fira.sharding.slice_names import param_of, slice_name

# Keys of the description of all slices.
AFFINE_MAP, AFFINE_MAP_PARAMS = "affine_map", "params"
# By parameter its slices, in the order of the ranks; one that is not described has none.
Cuts = dict[str, tuple[Cut, ...]]


def own_cuts(module: nn.Module, slices: int) -> Cuts:
    """The slices of what AutoTP has sliced in a module.

    Args:
        module: of an engine.
        slices: into how many it is taken apart.
    """
    found: Cuts = {}
    for name, param in normalized(dict(module.named_parameters())).items():
        if slices > 1 and is_sliced(param):
            note = (getattr(param, NOTE, None) or {}).get("conversion") or {}
            found[name] = _cuts_in(name, note.get(AFFINE_MAP), slices)
    return found


def saved_cuts(files: CheckpointFiles, names: Iterable[str]) -> Cuts:
    """The slices of what AutoTP had sliced in the run that saved.

    Args:
        files: of the checkpoint.
        names: of the parameters that were sliced, where they are known otherwise; described or not, they are in it.
    """
    if files.slices == 1:
        return {}
    info = files.model().get(UNIVERSAL_CHECKPOINT_INFO) or {}
    maps = (info.get(AFFINE_MAP) or {}).get(AFFINE_MAP_PARAMS) or {}
    found: Cuts = dict.fromkeys(names, ())
    for pattern, described in maps.items():
        name = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))
        cuts = _cuts_in(name, described, files.slices)
        if cuts or not _replicated(described):
            found[name] = cuts
    return found


def whole_shapes(shapes: Mapping[str, tuple[int, ...]], cuts: Cuts) -> dict[str, tuple[int, ...]]:
    """The shapes of whole parameters, by name.

    Args:
        shapes: of them, or of their slices.
        cuts: their slices.
    """
    return {name: cuts[name][0].shape[: len(own)] if cuts.get(name) else own for name, own in shapes.items()}


def recut(saved: SavedState, files: CheckpointFiles, module: nn.Module, holders: Holders) -> None:
    """Let this run read the slices that it has of parameters of those that another had.

    Args:
        saved: read completely; changed.
        files: it was read from.
        module: of this run.
        holders: of this run.

    Raises:
        ValueError: the numbers of slices differ, and DeepSpeed does not say which rows or columns some of them have.
    """
    sliced = {param_of(name) for held in (saved.weights, saved.moments) for name in held if param_of(name) != name}
    before, now = saved_cuts(files, sliced), own_cuts(module, holders.slices)
    for name in sorted(before.keys() | now.keys()):
        unknown = () in (before.get(name), now.get(name))
        if unknown and not (files.slices == holders.slices and saved.weights.get(slice_name(name, 0, holders.slices))):
            raise ValueError(
                f"tensor_parallel.autotp_size = {holders.slices} cannot load {name} of what was saved with "
                f"{files.slices}, since DeepSpeed does not say which of its rows or columns the slices have; load the "
                f"checkpoint itself, without load_universal, with autotp_size = {files.slices}."
            )
        if unknown:
            before.pop(name, None), now.pop(name, None)
    saved.recut(before, now, holders.slice_number)


def untrained_here(
    files: CheckpointFiles, module: nn.Module, holders: Holders, wanted: Collection[str]
) -> dict[str, Tensor]:
    """Buffers and frozen weights by name, of slices those that this rank has.

    Args:
        files: of the slice of this rank's number.
        module: of this run.
        holders: of this run.
        wanted: the names of those that the optimizer does not step.

    Raises:
        ValueError: as of `recut`.
    """
    found = untrained_values(files)
    before, now = saved_cuts(files, ()), own_cuts(module, holders.slices)
    changed = [name for name in wanted if before.get(name) != now.get(name)]
    if not changed:
        return found
    saved = SavedState()
    for number, each in enumerate(files.of_all_slices()):
        values = untrained_values(each)
        for name in changed:
            label = before[name][number].label if before.get(name) else name
            saved.weights[label] = [(ParamSlice(label, 0, 0, values[name].numel()), values[name].reshape(-1))]
    recut(saved, files, module, holders)
    for name in changed:
        label = now[name][holders.slice_number].label if name in now else name
        own, before_it = saved.recuts[label].own, found[name]
        value = torch.empty(own.numel, dtype=before_it.dtype)
        restore_weights(saved, [(value, [ParamSlice(label, 0, 0, own.numel)])])
        found[name] = value.view(-1, own.width) if before_it.dim() == 2 else value
    return found


def pattern_of(name: str) -> str:
    """The key of a parameter in the description of all slices."""
    return f"^{re.escape(name)}$"


def undescribed(module: nn.Module, slices: int) -> list[str]:
    """The parameters of which DeepSpeed does not say which rows or columns the slices have."""
    return sorted(name for name, cuts in own_cuts(module, slices).items() if not cuts)


def _replicated(described: Mapping[str, object]) -> bool:
    shape = list(described["logical_shape"])
    return all(list(rank["shard_shape"]) == shape for rank in described["ranks"].values())


def _cuts_in(name: str, described: Mapping[str, object] | None, slices: int) -> tuple[Cut, ...]:
    """The slices that an affine map describes; none where they are others than rows or columns."""
    if described is None or not 1 <= len(described["logical_shape"]) <= 2 or len(described["ranks"]) != slices:
        return ()
    shape, found = matrix_shape(described["logical_shape"]), []
    for rank, held in sorted(described["ranks"].items(), key=lambda item: int(item[0])):
        own = matrix_shape(held["shard_shape"])
        axis = int(own[0] == shape[0])
        label, first, runs = slice_name(name, int(rank), slices), 0, []
        for piece in held["pieces"]:
            size, (source, strides), (place, _) = matrix_shape(piece["shape"]), piece["source"], piece["dest"]
            # The elements from one row, or column, to the next.
            of_whole, of_slice = (1, 1) if axis == 1 else (shape[1], own[1])
            start, rest = divmod(source, of_whole)
            whole_lines = size[1 - axis] == shape[1 - axis] and strides[0] == shape[1] and place == first * of_slice
            if rest or not whole_lines or piece.get("scale", 1.0) != 1.0 or len(piece["locations"]) > 1:
                return ()
            runs.append(range(start, start + size[axis]))
            first += size[axis]
        if first != own[axis]:
            return ()
        found.append(Cut(label, shape, axis, tuple(runs)))
    held = sorted((run.start, run.stop) for cut in found for run in cut.runs)
    ends = [0, *itertools.chain(stop for _, stop in held)]
    even = [start for start, _ in held] == ends[:-1] and ends[-1] == shape[found[0].axis]
    return tuple(found) if even and len({cut.axis for cut in found}) == 1 else ()
