"""Read a universal checkpoint: what DeepSpeed's `ds_to_universal` made of a checkpoint, by the names of parameters.

Its folder has the files of the model's states as they were, `zero/optimizer_state.pt` with what the first rank's
wrapper had beside its tensors, and for each parameter a folder `zero/NAME` with its float32 weights and, where the
converter knew them, Adam's moments. `universal_form.py` says where the states are that it does not know.

Of what AutoTP had sliced it has the wholes, and of a pipeline the parameters of all stages. The states of ours are of
whole matrices however these were sliced.

What it relies on, of DeepSpeed 0.17 to 0.19: these names; that a tensor of stages 1 and 2 lies in a dict under `param`,
in its own shape, and one of stage 3 by itself, flat; that `mp_world_size` of a file of the model's states counts slices
or stages; and of an Adam's step count, that stages 1 and 2 have it in
`zero/NAME/step.pt`, and stage 3 in the states of the first rank.
"""

from __future__ import annotations

import math
import zipfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ds_fira.checkpoint import safe_load
from ds_fira.checkpoint.named_state import KEY, SavedMoments, SavedState, StateDict, TensorSlices
from ds_fira.checkpoint.payload import ELSEWHERE, PAYLOAD, UNTRAINED, unfold
from ds_fira.checkpoint.reconcile import SavedGroup
from ds_fira.core.algorithms import ADAM_STATES, Algorithm
from ds_fira.core.quantization import VALUES
from ds_fira.core.state import STEP
from ds_fira.engine.deepspeed.save_load.client_state import KEY as RESUME
from ds_fira.engine.deepspeed.save_load.files import BASE_OPTIMIZER, MODEL_FILE, CheckpointFiles, normalized, place_of
from ds_fira.engine.deepspeed.save_load.slicing import saved_cuts, whole_shapes
from ds_fira.engine.deepspeed.save_load.universal_form import payload_folder
from ds_fira.sharding.geometry import ParamSlice
from ds_fira.sharding.slice_names import param_of

LATEST = "latest_universal"  # the converter writes it beside its output folder
WEIGHTS = "zero"
_WRAPPER = "optimizer_state.pt"
_FIRST = next(iter(ADAM_STATES))
_MODEL = "mp_rank_{:02d}_model_states.pt, the model's states"
_ZIP = b"PK\x03\x04"


def is_universal(folder: Path) -> bool:
    """Whether a folder is what the converter makes."""
    return (folder / WEIGHTS).is_dir()


def read_latest(folder: Path) -> str | None:
    """The name of what the converter has made last in a folder; None where it does not say."""
    path = folder / LATEST
    return path.read_text().strip() if path.is_file() else None


def find_files(folder: Path, *args: object, **kwargs: object) -> CheckpointFiles:
    """The files of a checkpoint, universal or not; as `CheckpointFiles.find`."""
    kind = UniversalFiles if is_universal(folder) else CheckpointFiles
    return kind.find(folder, *args, **kwargs)


def find_damage(path: Path) -> str | None:
    """Why a file of `torch.save` is not as it was written, by the sums that stand in it; None where it is."""
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP)) != _ZIP:
                return None  # of torch's old format, without sums; who reads it says what is wrong
        with zipfile.ZipFile(path) as archive:
            return None if archive.testzip() is None else "its content has changed"
    except (OSError, zipfile.BadZipFile) as error:
        return f"it cannot be read ({error})"


@dataclass(frozen=True, slots=True)
class UniversalFiles(CheckpointFiles):
    """The files of a universal checkpoint; `optimizers` are those with payloads, of stages 1 and 2.

    Those of one slice, where the ranks had slices of the module; of a pipeline those of one stage after the other.
    """

    @classmethod
    def find(
        cls, folder: Path, every: bool = True, unpickle: bool = False, reading: object = None, of_slice: int = 0
    ) -> UniversalFiles:
        """The files in a folder; as of the base class.

        Raises:
            ValueError: some are missing.
        """
        del every, reading  # of files that the manifest of another folder lists
        models: dict[int, list[Path]] = defaultdict(list)
        for path in sorted(folder.iterdir()):
            if match := MODEL_FILE.fullmatch(path.name):
                models[place_of(match)[0]].append(path)
        if not models[0]:
            _refuse_lack(folder, _MODEL.format(0))
        kinds = {match[1] is None for path in folder.iterdir() if (match := MODEL_FILE.fullmatch(path.name))}
        if len(kinds) > 1:
            raise ValueError(f"{folder} holds what was made of two checkpoints; convert one into an empty folder.")
        first = cls((models[0][0],), (), unpickle)
        # A folder that was converted into twice may have files of more ranks, slices or stages.
        size, places = int(first.model()["dp_world_size"]), range(int(first.model()["mp_world_size"]))
        if absent := [number for number in places if not models[number]]:
            _refuse_lack(folder, _MODEL.format(absent[0]))
        of_ranks = {number: sorted(models[number], key=_rank_of)[:size] for number in places}
        payloads = {
            number: [
                folder / payload_folder(number, first.of_pipeline) / f"{_FIRST}.{rank:02d}" for rank in range(size)
            ]
            for number in places
        }
        if first.of_pipeline:
            stages = ([path for number in places for path in listed[number]] for listed in (of_ranks, payloads))
            found = [cls(*map(tuple, stages), unpickle)]
        else:
            found = [cls(tuple(of_ranks[n]), tuple(payloads[n]), unpickle, slices=len(places)) for n in places]
        for number, files in enumerate(found):
            if absent := files.find_absent():
                where = f", which had slice {number}" if len(found) > 1 else ""
                _refuse_lack(folder, f"{absent}{where}")
        files = found[of_slice % len(found)]
        return replace(files, optimizers=() if files.partitioned or not files.ours else files.optimizers)

    def of_all_slices(self) -> list[UniversalFiles]:
        """Return the files of every slice, in their order."""
        found = UniversalFiles.find
        return [found(self.models[0].parent, unpickle=self.unpickle, of_slice=n) for n in range(self.slices)]

    @property
    def folder(self) -> Path:
        """Of the parameters' folders."""
        return self.models[0].parent / WEIGHTS

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return [path for path in sorted(self.models[0].parent.rglob("*")) if path.is_file()]

    @property
    def at_stage_0(self) -> bool:
        """The converter reads no checkpoint of stage 0."""
        return False

    @property
    def ours(self) -> bool:
        """Whether an optimizer of this package saved it."""
        return RESUME in self.model()

    def first_of_stages(self) -> list[int]:
        """As of the base class."""
        return [*range(0, len(self.optimizers), int(self.model()["dp_world_size"]))] if self.of_pipeline else [0]

    def find_absent(self) -> str:
        """As of the base class."""
        if not self.ours:
            return ""
        there = [path.is_file() for path in self.optimizers]
        if self.partitioned:
            ranks = {_rank_of(path) for path in self.models}
            there = [rank in ranks for rank in range(int(self.model()["dp_world_size"]))]
        absent = [rank for rank, found in enumerate(there) if not found]
        return f"the states of ranks {absent} of the {len(there)} that saved it" if absent else ""

    def wrapper(self) -> Mapping[str, object]:
        """What the first rank's optimizer wrapper had, without its tensors."""
        return self._load(self.folder / _WRAPPER)

    def optimizer_state(self, number: int) -> tuple[Mapping[str, object], StateDict]:
        """As of the base class; moments that are not in a payload are without content. Of another Adam: its groups."""
        wrapper = self.wrapper()
        if not self.ours:
            named = next((wrapper[key] for key in BASE_OPTIMIZER if key in wrapper), {})
            return wrapper, {"state": named.get("state", {}), "param_groups": wrapper["param_groups"]}
        payload = self.model(number)[PAYLOAD] if self.partitioned else self._load(self.optimizers[number])
        empty = dict.fromkeys(ADAM_STATES, torch.empty(0, device="meta"))
        return wrapper, unfold(payload, dict.fromkeys(payload[ELSEWHERE], empty))

    def read(self) -> SavedState:
        """The states and master weights that all ranks saved."""
        saved = SavedState()
        elsewhere: set[str] = set()
        for files in self.of_all_slices():
            for number in range(len(files.models) if files.partitioned else len(files.optimizers)):
                _, state_dict = files.optimizer_state(number)
                saved.add(state_dict)
                for held, state in zip(state_dict[KEY]["places"], _in_order(state_dict), strict=True):
                    if any(value.is_meta for value in state.values()):
                        elsewhere |= {part.name for part in TensorSlices.from_plain(held).params}
        shapes = {name: shape for group in saved.groups for name, shape in group.members.items()}
        self.add_weights(saved, shapes)
        steps: dict[str, Tensor] = {}
        for label in elsewhere:
            found = [moments.step for _, moments in saved.moments.pop(label)]
            steps[param_of(label)] = max([*found, steps.get(param_of(label), found[0])], key=int)
        for name, step in steps.items():
            saved.moments[name] = self._moments(name, shapes[name], step)
        return saved

    def untrained_of_stages(self) -> dict[str, Tensor]:
        """Return the buffers and frozen weights of all stages of a pipeline."""
        found = [self._load(self.optimizers[number]).get(UNTRAINED) or {} for number in self.first_of_stages()]
        return {name: value for values in found for name, value in values.items()}

    def read_adam(self, name: str) -> SavedState:
        """The moments and master weights of a run with an Adam of another package.

        Args:
            name: of the optimizer.

        Raises:
            ValueError: a parameter has no moments, or another one's.
        """
        wrapper, state_dict = self.optimizer_state(0)
        stages = [self.model(number)["param_shapes"] for number in range(len(self.models) if self.of_pipeline else 1)]
        merged = [{key: tuple(s) for part in parts for key, s in part.items()} for parts in zip(*stages, strict=True)]
        cuts = saved_cuts(self, ())
        listed = [whole_shapes(normalized(part), cuts) for part in merged]
        groups, saved = wrapper["param_groups"], SavedState(algorithm=Algorithm(name, limited=False))
        # Stage 3 lists sub-groups, of which a group may have several.
        values = groups if len(groups) == len(listed) else [groups[0]] * len(listed)
        for part, group in zip(listed, values, strict=True):
            kept = {key: group[key] for key in ("lr", "initial_lr") if key in group}
            saved.groups.append(SavedGroup(part, {}, kept, made_by=name))
        shapes = {key: shape for part in listed for key, shape in part.items()}
        self.add_weights(saved, shapes)
        steps = [state[STEP] for state in state_dict["state"].values() if STEP in state]
        steps += [group[STEP] for group in groups if STEP in group]
        for key, shape in shapes.items():
            folder = self._path(key)
            if any((folder / f"{state}.pt").is_file() for state in ADAM_STATES):  # else it never had a gradient
                found = folder / f"{STEP}.pt"
                step = self._load(found) if found.is_file() else next(iter(steps), 0)
                saved.moments[key] = self._moments(key, shape, torch.tensor(int(step)))
        return saved

    def add_weights(self, saved: SavedState, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Add the float32 weights of some parameters.

        Args:
            saved: gets them.
            shapes: of the parameters, by name.

        Raises:
            ValueError: they are missing, or of another size.
        """
        for name, shape in shapes.items():
            weights = self._tensor(name, "fp32", shape)
            saved.weights[name].append((ParamSlice(name, 0, 0, weights.numel()), weights))

    def _moments(self, name: str, shape: tuple[int, ...], step: Tensor) -> list[tuple[ParamSlice, SavedMoments]]:
        found = {key: {VALUES: self._tensor(name, key, shape)} for key in ADAM_STATES}
        return [(ParamSlice(name, 0, 0, math.prod(shape)), SavedMoments(step, found))]

    def _path(self, name: str) -> Path:
        """The folder of a parameter, whose name may have torch.compile's prefix somewhere."""
        path = self.folder / name
        if path.is_dir():
            return path
        found = normalized({each.name: each for each in self.folder.iterdir() if each.is_dir()})
        return found.get(name, path)

    def _tensor(self, name: str, key: str, shape: Collection[int]) -> Tensor:
        """One flat tensor of a parameter; mapped, not read."""
        path = self._path(name) / f"{key}.pt"
        if not path.is_file():
            _refuse_lack(self.models[0].parent, f"{WEIGHTS}/{name}/{key}.pt")
        found = self._load(path)
        value = found.get("param") if isinstance(found, Mapping) else found
        if not isinstance(value, Tensor) or value.is_meta or value.numel() != math.prod(shape):
            what = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            empty = " without content" if isinstance(value, Tensor) and value.is_meta else ""
            raise ValueError(f"{path} holds {what}{empty} where {tuple(shape)} belongs; convert the checkpoint again.")
        return value.detach().reshape(-1)

    def _load(self, path: Path) -> object:
        if not path.is_file():
            _refuse_lack(self.models[0].parent, str(path.relative_to(self.models[0].parent)))
        return torch.load(path, map_location="cpu", weights_only=False) if self.unpickle else safe_load.read(path)


def _refuse_lack(folder: Path, what: str) -> NoReturn:
    raise ValueError(f"{folder} lacks {what}; convert the checkpoint again.")


def _rank_of(path: Path) -> int:
    """The rank that wrote a file of the model's states."""
    return place_of(MODEL_FILE.fullmatch(path.name))[1]


def _in_order(state_dict: StateDict) -> list[dict[str, Tensor]]:
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    return [state_dict["state"].get(number, {}) for number in numbers]
