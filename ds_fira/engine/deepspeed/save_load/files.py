"""Read DeepSpeed's checkpoint files: which there are, and what an optimizer of this package has left in them.

What it relies on, of DeepSpeed 0.19.8: the names of the files and their keys (`DeepSpeedEngine._load_checkpoint`, the
`state_dict` methods of its optimizer wrappers).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ds_fira.checkpoint import safe_load
from ds_fira.checkpoint.named_state import KEY, SavedState, StateDict, TensorSlices
from ds_fira.checkpoint.payload import PAYLOAD, unfold
from ds_fira.checkpoint.shared_read import SharedRead
from ds_fira.checkpoint.tag_folder import matching_files
from ds_fira.sharding.geometry import ParamSlice

T = TypeVar("T")
# Keys of DeepSpeed's files.
OUTER = "optimizer_state_dict"
BASE_OPTIMIZER = ("base_optimizer_state", "optimizer_state_dict")  # stages 1 and 2; stage 3 and the wrapper of stage 0
MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
# Of a rank, and of the slice of the module or the stage of the pipeline that it has; else 0.
OPTIMIZER_FILE = re.compile(r"(?:(?:bf16_)?zero_pp|expp)_rank_(\d+)_mp_rank_(\d\d+)_optim_states\.pt")
EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d\d+)_model_states\.pt")
# A stage of a pipeline and a data-parallel rank in it.
StageRank = tuple[int, int]


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The files of one tag; where the ranks had slices of the module, those of one slice.

    Attributes:
        models: with the module's weights: one, or under stage 3 one a rank; of a pipeline one a stage, without them.
        optimizers: one a rank; none at stage 0, where the states are in the model's file, but with experts one for each
            rank of the largest expert-parallel group. Of a pipeline stage after stage.
        unpickle: see `load`.
        reading: by which all ranks read them, None where this process does it alone.
        slices: how many slices of the module there are files of.
    """

    models: tuple[Path, ...]
    optimizers: tuple[Path, ...]
    unpickle: bool = False
    reading: SharedRead | None = None
    slices: int = 1

    @classmethod
    def find(
        cls,
        folder: Path,
        every: bool = True,
        unpickle: bool = False,
        reading: SharedRead | None = None,
        of_slice: int = 0,
    ) -> CheckpointFiles:
        """The files in the folder of a tag.

        Args:
            folder: of the tag.
            every: whether there have to be those of all ranks that saved it; on node-local storage there are not.
            unpickle: see `load`.
            reading: of that folder.
            of_slice: the number of a slice of this run, or of the one that saved.

        Raises:
            ValueError: some are missing.
        """
        listed = None if reading is None else reading.files
        models = _by_rank(folder, MODEL_FILE, "*", listed)
        if not models:
            return cls((), ())
        # A folder that was saved into twice, in bf16 and not, has two sets; the newer one counts.
        found = [_by_rank(folder, OPTIMIZER_FILE, names, listed) for names in ("bf16_*", "zero_*", "expp_*")]
        optimizers = max(found, key=lambda files: max((path.stat().st_mtime for path in files.values()), default=0.0))
        files = cls(tuple(models.values()), tuple(optimizers.values()), unpickle, reading)
        slices = 1 + max(number for number, _ in models)
        if slices > 1 and not files.of_pipeline:
            kept = [
                tuple(path for (number, _), path in paths.items() if number == of_slice % slices)
                for paths in (models, optimizers)
            ]
            files = replace(files, models=kept[0], optimizers=kept[1], slices=slices)
        if not files.optimizers or not every:
            return files
        if absent := files.find_absent():
            raise ValueError(
                f"{folder} lacks {absent}; to resume on other ranks all of its files must be in one folder that every "
                "node can read."
            )
        wanted = [files.places.index(place) for place in files.saved_places()]
        return replace(files, optimizers=tuple(files.optimizers[number] for number in wanted))

    def find_absent(self) -> str:
        """Words for the optimizer states of ranks that saved and have no file here; empty where all have."""
        if self.at_stage_0:
            return ""  # how many there were, nothing says; a state that is missing is found as it is read
        saved, found = self.saved_places(), {*self.places}
        absent = [number for number, place in enumerate(saved) if place not in found]
        return f"the optimizer states of ranks {absent} of the {len(saved)} that saved it" if absent else ""

    def saved_places(self) -> list[StageRank]:
        """Of all ranks that saved it, stage after stage."""
        model = self.model()
        stages = int(model["mp_world_size"]) if self.of_pipeline else 1
        return [(stage, rank) for stage in range(stages) for rank in range(int(model["dp_world_size"]))]

    @property
    def of_pipeline(self) -> bool:
        """Whether a pipeline saved it, whose layers have a file each."""
        return self.model().get("module", "") is None

    def lost_experts(self) -> list[str]:
        """The names of the files of experts that are not here; stage 3 writes none."""
        counts, folder = None if self.partitioned else self.model().get("num_experts"), self.models[0].parent
        names = [
            f"layer_{layer}_expert_{number}_mp_rank_00_model_states.pt"
            for layer, count in enumerate(counts if isinstance(counts, list) else ())
            for number in range(count)
        ]
        return [name for name in names if not (folder / name).exists()]

    @property
    def at_stage_0(self) -> bool:
        """Whether stage 0 saved it: the states are no shares of a flat tensor."""
        return not self.optimizers or self.optimizers[0].name.startswith("expp_")

    @property
    def partitioned(self) -> bool:
        """Whether stage 3 saved it: its model files hold no weights."""
        return MODEL_FILE.fullmatch(self.models[0].name)[1] is not None

    @property
    def places(self) -> list[StageRank]:
        """The ranks that the files of optimizer states are of."""
        found = [place_of(OPTIMIZER_FILE.fullmatch(path.name)) for path in self.optimizers]
        return found if self.slices == 1 else [(0, rank) for _, rank in found]

    def model(self, number: int = 0) -> dict[str, object]:
        """What the file with the module's weights holds, of one rank under stage 3."""
        return load(self.models[number], self.unpickle, self.reading)

    def of_rank(self, place: StageRank) -> tuple[Mapping[str, object], StateDict]:
        """As `optimizer_state`, of a rank by its place: files of other ranks may be on other nodes.

        Raises:
            ValueError: it has no file.
        """
        places, (stage, rank) = self.places, place
        if places and place not in places:
            folder, where = self.models[0].parent, f" of stage {stage}" if self.of_pipeline else ""
            raise ValueError(f"{folder} lacks the optimizer states of rank {rank}{where}; load another tag.")
        return self.optimizer_state(places.index(place) if places else stage)

    def optimizer_state(self, number: int) -> tuple[Mapping[str, object], StateDict]:
        """What a rank's wrapper has saved, and in it the state dict of the optimizer."""
        path = self.optimizers[number] if self.optimizers else self.models[number]
        content = load(path, self.unpickle, self.reading)
        wrapper = content.get("optimizer" if self.at_stage_0 else OUTER)
        if not isinstance(wrapper, Mapping):
            raise ValueError(
                f"{path} holds no optimizer states; load with load_optimizer_states=False, or another tag."
            )
        state_dict = next((wrapper[key] for key in BASE_OPTIMIZER if key in wrapper), wrapper)
        payload = self._payload(number, state_dict)
        return wrapper, state_dict if payload is None else unfold(payload, state_dict["state"])

    def _payload(self, number: int, state_dict: object) -> Mapping[str, object] | None:
        """The part of a rank's states that DeepSpeed does not know; at stage 3 it lies with the model's states."""
        if self.at_stage_0 or not isinstance(state_dict, Mapping):
            return None
        if not self.partitioned:
            return state_dict.get(PAYLOAD)
        ranks = [int(MODEL_FILE.fullmatch(path.name)[1]) for path in self.models]
        _, rank = self.places[number]
        payload = self.model(ranks.index(rank)).get(PAYLOAD) if rank in ranks else None
        if payload is not None and payload[KEY]["places"] != state_dict[KEY]["places"]:
            raise ValueError("this state dict is another rank's share of the run; load each rank's own.")
        return payload

    def of_all_slices(self) -> list[CheckpointFiles]:
        """The files of the same tag by slice."""
        if self.slices == 1:
            return [self]
        folder = self.models[0].parent
        others = {"unpickle": self.unpickle, "reading": self.reading}
        return [CheckpointFiles.find(folder, **others, of_slice=number) for number in range(self.slices)]

    def first_of_stages(self) -> list[int]:
        """The numbers of files with states, one of each stage."""
        stages = [stage for stage, _ in self.places] or range(len(self.models))
        return [number for number, stage in enumerate(stages) if stage not in stages[:number]]

    def read(self) -> SavedState:
        """The states and master weights that all ranks saved; without weights where they are in the layers' files."""
        saved = SavedState()
        for files in self.of_all_slices():
            files._read_into(saved)
        return saved

    def _read_into(self, saved: SavedState) -> None:
        for number in range(len(self.optimizers) or len(self.models)):
            wrapper, state_dict = self.optimizer_state(number)
            weights = next((wrapper[key] for key in MASTERS if key in wrapper), None)
            if weights is None and "fp32_groups" in wrapper:
                weights = [tensor for group in wrapper["fp32_groups"] for tensor in group]
            saved.add(state_dict, weights)
            if weights is None and not self.of_pipeline:
                # Stage 0 in float32 steps the module's own weights.
                module = self.module()
                for each in state_dict[KEY]["places"]:
                    _add_weights(saved, module, TensorSlices.from_plain(each).params[0])

    def module(self) -> dict[str, Tensor]:
        """The module's weights by name, experts too, each of which has a file."""
        found = dict(self.model()["module"])
        for path in matching_files(self.models[0].parent, "layer_*"):
            if EXPERT_FILE.fullmatch(path.name):
                found |= load(path, self.unpickle, self.reading)
        return normalized(found)


def _add_weights(saved: SavedState, module: Mapping[str, Tensor], part: ParamSlice) -> None:
    """Add a parameter of the module's, or the experts that AutoEP had put together in it, each saved by its number."""
    found = saved.weights[part.name]
    if part.param in module:
        found.append((part, module[part.param].reshape(-1)))
        return
    for number in itertools.takewhile(lambda number: f"{part.param}.{number}" in module, itertools.count()):
        weight = module[f"{part.param}.{number}"].reshape(-1)
        found.append((ParamSlice(part.name, 0, number * weight.numel(), (number + 1) * weight.numel()), weight))


def place_of(match: re.Match[str]) -> StageRank:
    """Of the rank that a file is of, by its name."""
    return int(match[2]), int(match[1] or 0)


def _by_rank(
    folder: Path, pattern: re.Pattern[str], names: str, listed: Collection[str] | None
) -> dict[StageRank, Path]:
    matches = [(pattern.fullmatch(path.name), path) for path in matching_files(folder, names, listed)]
    return dict(sorted((place_of(match), path) for match, path in matches if match))


def load(path: Path, unpickle: bool = False, reading: SharedRead | None = None) -> dict[str, object]:
    """One of DeepSpeed's files, its tensors mapped, not read; nothing that stands in it is run.

    Args:
        path: of the file.
        unpickle: run it, as DeepSpeed's own loader does; only where the user has said so.
        reading: what it has of the file is not read again; tensors are zeros as far as it has not got them.

    Raises:
        UnsafeFileError: it cannot be read without running it; a `ValueError`.
        ValueError: it cannot be read, or is none of DeepSpeed's.
        OSError: it cannot be opened.
    """
    image = None if reading is None else reading.images.get(path.name)
    if image is not None and image.legible:
        content = image.structure()
    else:
        content = torch.load(path, map_location="cpu", weights_only=False) if unpickle else safe_load.read(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where DeepSpeed keeps a dict; load another tag.")
    return content


def normalized(named: Mapping[str, T]) -> dict[str, T]:
    """Names without what `torch.compile` puts in front of them."""
    return {name.replace("_orig_mod.", ""): value for name, value in named.items()}
