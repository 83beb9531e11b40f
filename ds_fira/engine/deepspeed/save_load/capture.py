"""Take what DeepSpeed hands to its checkpoint engine, and say who writes which bytes of it.

Written against DeepSpeed 0.19.8. What it relies on: `save_checkpoint` writes through `checkpoint_engine.save`, after
`makedirs` of the same object, and copies its scripts by `_copy_recovery_script`. It keeps the ranks in step by barriers
of its module's `dist`, which nothing needs here: the folder is made later, and nobody writes before all have agreed.
Every rank builds the content of the module's file, and those whose `save_non_zero_checkpoint` is set save it: rank 0
below stage 3, or the first of each node. Below stage 3 all ranks hold the same parameters, and at stage 0 the same
states. So there every rank saves it here, its part of the bytes. Buffers, which may differ between ranks, and
everything else in it are the first one's. Of a pipeline the first rank of each stage saves that stage's, as DeepSpeed
does.

At stage 3 the module's file, and at every stage above 0 that of the optimizer's states, is one a rank in DeepSpeed,
with what that rank alone has.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import deepspeed.runtime.engine as deepspeed_engine
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch.utils.serialization import config as serialization

from ds_fira.checkpoint.manifest import FORMAT, MARK
from ds_fira.checkpoint.outgoing import Frame, Outgoing, extents_of
from ds_fira.checkpoint.pickled import pickled, tensors_in
from ds_fira.checkpoint.process_identity import boot
from ds_fira.engine.deepspeed.save_load.calls import replaced
from ds_fira.engine.deepspeed.save_load.client_state import KEY
from ds_fira.engine.deepspeed.save_load.files import MODEL_FILE, OUTER
from ds_fira.engine.deepspeed.save_load.universal_form import add_info, for_converter
from ds_fira.sharding.comm import Communicator

# What all ranks hold alike below stage 3, of the module's file: the states are in it at stage 0 alone.
REPLICATED = ("module", "optimizer", "frozen_param_fragments")


def peers_of(engine: DeepSpeedEngine, communicator: Communicator) -> Sequence[int]:
    """The ranks that write to the same storage as this one, the first of which owns it; a collective call."""
    rank, size = communicator.dp_rank, communicator.dp_size
    if not engine.use_node_local_storage():
        return range(size)
    found = communicator.gather_objects((engine.local_rank == 0, f"{socket.gethostname()} {boot()}"))

    def owner(of: int) -> int:
        """The nearest first process of its node; containers of one host may have disks of their own."""
        return next((each for each in range(of, -1, -1) if found[each] == (True, found[of][1])), of)

    return [each for each in range(size) if owner(each) == owner(rank)]


@dataclass(frozen=True, slots=True)
class _Handed:
    """What DeepSpeed has handed over for one file.

    Attributes:
        file: what becomes of it.
        content: for `torch.save`.
        shared: the storages in it that all of `peers` hold alike.
    """

    file: Outgoing
    content: object
    shared: list[torch.UntypedStorage]


class _NoBarriers:
    """`deepspeed.comm` as DeepSpeed's engine sees it during a save."""

    def __init__(self, comm: ModuleType) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> object:
        return getattr(self._comm, name)

    def barrier(self, *_: object, **__: object) -> None:
        """The ranks agree later."""


class Capture:
    """The files of one save on one rank.

    Attributes:
        files: what this rank has a part in, once `share_out` has been called; whole once `complete` has been.
        copies_scripts: whether DeepSpeed's scripts are this rank's to write.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        folder: Path,
        peers: Sequence[int],
        caught: Callable[[Path], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Take what is saved under `folder`.

        Args:
            engine: that saves.
            folder: into which DeepSpeed is told to write.
            peers: of `peers_of`.
            caught: keeps an error that a file raises.
        """
        self._engine, self._folder, self._peers, self._caught = engine, folder, peers, caught
        self._rank = engine.global_rank
        self._model: dict[str, object] = {}  # what is saved with the module's weights
        self._handed: list[_Handed] = []
        self._incomplete: list[Outgoing] = []
        self.files: list[Outgoing] = []
        self.copies_scripts = False

    @contextlib.contextmanager
    def installed(self) -> contextlib.AbstractContextManager[None]:
        """Let DeepSpeed save into this object for a while."""
        engine = self._engine
        spread = {"save_non_zero_checkpoint": True} if self._spreads else {}
        writer = {"save": self._save, "makedirs": lambda *_, **__: None}
        here = {"_copy_recovery_script": self._copy, "_checkpoint_tag_validation": lambda _: None}  # agreed on later
        comm = _NoBarriers(deepspeed_engine.dist)
        with (
            replaced(engine.checkpoint_engine, **writer),
            replaced(engine, **spread, **here),
            replaced(deepspeed_engine, dist=comm),
        ):
            yield

    @property
    def _spreads(self) -> bool:
        # Slices of the module, and layers of a pipeline, have files of their own, or several ranks write the same.
        whole = self._engine.fira_holders.slices == 1 and not isinstance(self._engine.module, PipelineModule)
        return len(self._peers) > 1 and self._engine.zero_optimization_stage() < 3 and self._zipped and whole

    @property
    def _zipped(self) -> bool:
        return getattr(self._engine.checkpoint_engine, "zipfile_serialization", True)

    def _copy(self, _: str) -> None:
        self.copies_scripts = True

    def _save(self, state_dict: object, path: str) -> None:
        with self._caught(Path(path)):
            name = Path(path).relative_to(self._folder).as_posix()
            if MODEL_FILE.fullmatch(name):
                self._model = state_dict
                add_info(self._engine, state_dict)
            elif isinstance(state_dict, dict) and OUTER in state_dict:
                state_dict = {**state_dict, OUTER: for_converter(self._engine, state_dict[OUTER], self._model)}
            shared = self._shared(state_dict) if self._spreads and MODEL_FILE.fullmatch(name) else []
            file = Outgoing(name, self._peers[0] if shared else self._rank)
            self._handed.append(_Handed(file, state_dict, shared))

    def _shared(self, state_dict: dict[str, object]) -> list[torch.UntypedStorage]:
        own = {buffer.untyped_storage()._cdata for buffer in self._engine.module.buffers()}
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors_in([state_dict.get(key) for key in REPLICATED]):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                found.setdefault(storage._cdata, storage)
        return list(found.values())

    @property
    def digest(self) -> str:
        """Of the tensors that are to be shared out; the same on ranks that can."""
        sizes = [[storage.nbytes() for storage in handed.shared] for handed in self._handed if handed.shared]
        return hashlib.sha256(repr(sizes).encode()).hexdigest()

    def share_out(self, same: bool) -> None:
        """Pickle the structure of what this rank owns, and give every rank its part of the bytes.

        Args:
            same: whether all ranks have the same digest; where they have not, the owners write all.
        """
        for handed in self._handed:
            with self._caught(self._folder / handed.file.name):
                self._lay_out(handed, same)
                self.files.append(handed.file)
        self._handed.clear()

    def _lay_out(self, handed: _Handed, same: bool) -> None:
        file, content, shared = handed.file, handed.content, handed.shared if same else []
        if isinstance(content, dict) and KEY in content:
            content = {key: value for key, value in content.items() if key != KEY}
            self._incomplete.append(file)
        elif isinstance(content, dict) and OUTER in content:
            content = {**content, KEY: {MARK: FORMAT}}
        if not self._zipped:
            file.old = content
            return
        file.extents = extents_of(shared, self._peers.index(self._rank), len(self._peers)) if shared else []
        if file.owner != self._rank:
            return
        file.pickled, storages = pickled(content)
        numbers = {storage._cdata: number for number, storage in enumerate(storages)}
        order = tuple(numbers.pop(storage._cdata) for storage in shared)
        for extent in file.extents:
            extent.storage = order[extent.storage]
        sizes = tuple(storage.nbytes() for storage in storages)
        file.frame = Frame(len(file.pickled), sizes, order, serialization.save.storage_alignment)
        file.add_whole({number: storages[number] for number in numbers.values()})

    def complete(self, resume: Mapping[str, object]) -> None:
        """Put what all ranks have gathered meanwhile into the files with the client state.

        Args:
            resume: of `client_state.resume_state`.
        """
        item = {**resume, MARK: FORMAT}  # the mark says that there is a manifest, and of which format
        for file in self._incomplete:
            with self._caught(self._folder / file.name):
                file.add_item(KEY, item)
        self._incomplete.clear()

    def write_scripts(self, folder: Path) -> None:
        """Put DeepSpeed's scripts into a folder, on the rank that has them.

        Raises:
            OSError: names the folder; that of a copy names what is copied.
        """
        if self.copies_scripts:
            try:
                self._engine._copy_recovery_script(os.fspath(folder))
            except OSError as error:
                raise OSError(error.errno, error.strerror, os.fspath(folder)) from None
