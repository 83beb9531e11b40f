"""Choose the checkpoint that `engine.load_checkpoint` takes: the newest that is complete, the same on every rank.

Written against DeepSpeed 0.19.8. What it relies on: `use_node_local_storage`, and that `latest` lies beside the tags;
that loading finds its files through `_get_all_ckpt_names` and, for the weights alone at stage 3, through
`zero_to_fp32.get_checkpoint_files`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import logger

from ds_fira.checkpoint import manifest, tag_folder
from ds_fira.checkpoint.atomic_save import CheckpointError
from ds_fira.checkpoint.manifest import FORMAT, REPLACED, STAGING
from ds_fira.checkpoint.shared_read import Listed, SharedRead
from ds_fira.engine.deepspeed.save_load.files import MODEL_FILE, OPTIMIZER_FILE, CheckpointFiles, place_of
from ds_fira.sharding.comm import Communicator

T = TypeVar("T")
# The tag that is being loaded, the names of its files, where its manifest lists them, and what has been read of them.
_loading: ContextVar[tuple[str | None, Collection[str] | None, SharedRead | None]] = ContextVar(
    "_loading", default=(None, None, None)
)


def owns_storage(engine: DeepSpeedEngine) -> bool:
    """Whether this rank moves the files of its storage: rank 0, or the first of each node."""
    return (engine.local_rank if engine.use_node_local_storage() else engine.global_rank) == 0


def require_all(name: str, communicator: Communicator, error: str | None, item: T = None) -> list[T]:
    """Gather an item of every rank, unless some rank has an error.

    Args:
        name: of the optimizer.
        communicator: of the ranks.
        error: of this rank, the rest of a sentence that begins with the rank; None without one.
        item: of this rank.

    Raises:
        CheckpointError: some rank has an error; on every rank with the same sentence.
    """
    answers = communicator.gather_objects((error, item))
    errors = [(rank, text) for rank, (text, _) in enumerate(answers) if text is not None]
    if errors:
        (rank, text), *more = errors
        others = f" (and {len(more)} more ranks)" if more else ""
        raise CheckpointError(f"{name}: rank {rank}{others} {text}")
    return [item for _, item in answers]


class Choice:
    """One call of `load_checkpoint` on one rank; what it decides goes by what all ranks have gathered."""

    def __init__(self, engine: DeepSpeedEngine, call: inspect.BoundArguments) -> None:
        given, self.communicator = call.arguments, Communicator()
        self.name: str = engine.basic_optimizer.algorithm.name
        self.folder = Path(given["load_dir"])
        self.asked = None if given["tag"] is None else str(given["tag"])
        partial = given["load_module_only"] or not given["load_optimizer_states"]
        self.model_only = partial and engine.zero_optimization_stage() < 3
        self.whole = not partial
        self.local: bool = engine.use_node_local_storage()
        self.owner = owns_storage(engine)
        # Weights alone of stage 3 are put together by DeepSpeed, which maps the files, as the layers' of a pipeline;
        # slices have files of their own.
        mapped = not (self.whole or self.model_only) or isinstance(engine.module, PipelineModule)
        sliced = engine.fira_holders.slices > 1
        self.keeps = not (engine.basic_optimizer.unpickle_checkpoints or mapped or sliced)
        self.reading: SharedRead | None = None

    def make(self) -> str | None:
        """The tag to load, the same on every rank; None leaves it to DeepSpeed, which finds nothing.

        With node-local storage the parts on the nodes have to be of one save. Where a crash has left them under
        different names, the tag is this node's.

        Raises:
            CheckpointError: the tag that was asked for is not complete, or none is where there should be one; on every
                rank with the same sentence.
        """
        # Rank 0's folder, for sentences that are the same on every rank.
        wanted, fault, candidates, told = self._of_first(self._candidates)
        if fault is not None and self.asked is not None:
            raise CheckpointError(
                f"{self.name}: nothing can be loaded under tag {tag_folder.shown(wanted)}, which {fault}: give "
                f"load_checkpoint the name of a folder inside {told}."
            )
        faults = {} if fault is None else {tag_folder.LATEST: fault}
        for tag, save_id in candidates:
            own = tag
            if self.local and save_id:
                own = next((name for name in _names(tag) if self._save_id(name) == save_id), tag)
            looked = self._gathered(self._look_at, own, save_id)
            found = [fault for fault, _ in looked]
            if not any(found):
                found = self._read(own, looked[0][1])
            if not any(found):
                if wanted is None and not faults:
                    faults = {tag_folder.LATEST: "it is missing"}
                self._warn(faults, f"loading {tag!r} instead")
                if not faults and tag != wanted:
                    self._say(
                        f"{tag!r} was complete when its run was killed, before {tag_folder.LATEST} named it: loading it"
                    )
                self._tell_unverified(own)
                return own
            faults[tag] = next(text for text in found if text)
        if wanted is not None or any(not manifest.is_leftover(tag) for tag in faults):
            # Of rank 0: the others may come here later, when the folder has changed.
            others = self._of_first(self._others, faults)
            remedy = f"load another tag, such as {others[0]!r}" if others else "load from another folder"
            why = "; ".join(f"{Path(told, tag)}: {text}" for tag, text in faults.items())
            raise CheckpointError(f"{self.name}: no complete checkpoint to load ({why}): {remedy}.")
        self._warn(faults, "there is no complete one")
        return None

    def _gathered(self, function: Callable[..., T], *args: object) -> list[T]:
        """What a function returns on every rank; raises as `require_all` where it raised on some rank."""
        answer, error = None, None
        try:
            answer = function(*args)
        except Exception as raised:
            told = f"{type(raised).__name__}: {raised}"
            error = f"cannot read the checkpoints in {self.folder} ({told}): mend the folder or load from another one."
        return require_all(self.name, self.communicator, error, answer)

    def _of_first(self, function: Callable[..., T], *args: object) -> T:
        """What a function returns on rank 0."""
        return self._gathered(lambda: function(*args) if self.communicator.dp_rank == 0 else None)[0]

    def _candidates(self) -> tuple[str | None, str | None, list[tuple[str, str | None]], str]:
        """The tag that is wanted, its fault, what to try with the ids of its saves, and the folder.

        Of rank 0: DeepSpeed alone writes `latest` on the first node only.
        """
        if self.asked is not None:
            wanted, fault = self.asked, tag_folder.find_tag_fault(self.folder, self.asked)
            found = [] if fault else tag_folder.in_order(self.folder, wanted, only=True)
        else:
            wanted, fault = tag_folder.look_up_latest(self.folder)
            wanted = "" if fault else wanted
            found = tag_folder.in_order(self.folder, wanted)
        return wanted, fault, [(tag, self._save_id(tag)) for tag in found], str(self.folder)

    def _save_id(self, tag: str) -> str | None:
        return (manifest.whole_manifest(self.folder / tag) or {}).get("save_id")

    def _find_fault(self, tag: str, save_id: str | None) -> str | None:
        """Of the ranks that own a storage: what is missing, or that it is of another save than rank 0's."""
        if not self.owner:
            return None
        fault = manifest.find_fault(self.folder / tag, self.model_only)
        if fault is None and self.local and self._save_id(tag) != save_id:
            fault = "its parts on the nodes are of different saves"
        if fault is None and self.whole and not self.local and manifest.listed_files(self.folder / tag) is None:
            fault = _find_missing_ranks(self.folder / tag)
        return fault

    def _look_at(self, tag: str, save_id: str | None) -> tuple[str | None, dict[str, Listed]]:
        """What is missing of a checkpoint; on rank 0 also which files are to be read together."""
        fault = self._find_fault(tag, save_id)
        first = self.communicator.dp_rank == 0 and not self.local and fault is None
        return fault, self._files(tag) if first else {}

    def _read(self, tag: str, files: dict[str, Listed]) -> list[str | None]:
        """Read the files of a checkpoint, each byte on one rank; why it cannot be taken, one item of them None if not.

        On storage of the nodes the first rank of each reads all for its sum, and what is loaded is read once more.
        """
        if self.local:
            return self._gathered(self._find_damage, tag)
        self.reading = None  # and with it what an earlier one held
        self.reading = SharedRead(self.folder / tag, files, self.communicator)
        faults, sums = zip(*self._gathered(lambda: (self.reading.read(), self.reading.sums)), strict=True)
        return list(faults) if any(faults) else [self.reading.find_damage(sums)]

    def _find_damage(self, tag: str) -> str | None:
        return manifest.find_damage(self.folder / tag, self.model_only) if self.owner else None

    def _files(self, tag: str) -> dict[str, Listed]:
        """The files of a checkpoint, and how each is read: one a rank by that rank, the others by all."""
        path = self.folder / tag
        records = (manifest.read_manifest(path) or {"files": {}})["files"]
        names = [*records] or [file.name for file in path.glob("*.pt")]
        matches = {name: OPTIMIZER_FILE.fullmatch(name) or MODEL_FILE.fullmatch(name) for name in sorted(names)}
        places = {place_of(match) for match in matches.values() if match and match[1]}
        # Slices of a module have files of their own, which few ranks read.
        keeps = self.keeps and all(place_of(match)[0] == 0 for match in matches.values() if match)
        one_each = self.whole and places == {(0, rank) for rank in range(self.communicator.dp_size)}
        found = {}
        for name, match in matches.items():
            if self.model_only and match and match.re is OPTIMIZER_FILE:
                continue
            record = records.get(name) or {"size": (path / name).stat().st_size}
            owner = int(match[1]) if one_each and match and match[1] else None
            found[name] = Listed(record["size"], record.get("crc32"), owner, bool(match) and keeps)
        return found

    def _others(self, faults: dict[str, str]) -> list[str]:
        """What is complete in the folder beside what was tried."""
        listed = [tag for tag in tag_folder.in_order(self.folder, None) if tag not in faults]
        return [tag for tag in listed if manifest.find_fault(self.folder / tag) is None]

    def _warn(self, faults: dict[str, str], outcome: str) -> None:
        """Name the checkpoints that are not taken, and why."""
        if faults:
            told = "; ".join(f"{tag}: {text}" for tag, text in faults.items())
            self._say(f"not every checkpoint is complete ({told}): {outcome}")

    def _say(self, text: str) -> None:
        if dist.get_rank() == 0:
            logger.warning(f"{self.name}: in {self.folder} {text}.")

    def _tell_unverified(self, tag: str) -> None:
        """Say, once a checkpoint, what could not be checked."""
        if dist.get_rank() != 0:
            return
        path = self.folder / tag
        content = manifest.read_manifest(path)
        lack = f"no {manifest.MANIFEST}, so that nothing of it could be verified"
        if content is not None:
            lack = f"a {manifest.MANIFEST} of format {content['format']}, which has no checksum of itself"
        if content is None or content["format"] < FORMAT:
            logger.warning_once(f"{self.name}: {path} has {lack}: the next save writes one of format {FORMAT}.")


def _names(tag: str) -> list[str]:
    """The names under which a crash may have left a checkpoint."""
    parent, slash, name = tag.rpartition("/")
    base = parent + slash + name.removeprefix(STAGING).removeprefix(REPLACED)
    return [base, tag_folder.beside(base, STAGING), tag_folder.beside(base, REPLACED)]


def _find_missing_ranks(path: Path) -> str | None:
    """Of a checkpoint without a manifest: the ranks whose optimizer states are missing."""
    files = CheckpointFiles.find(path, every=False)
    if not files.models:
        return "its file of the model's states is missing"
    try:
        absent = "" if files.model().get("optimizer") is not None else files.find_absent()
    except Exception:
        return None  # loading says what is wrong with it
    return f"it lacks {absent}" if absent else None


@contextlib.contextmanager
def only_listed_files(folder: Path, tag: str, reading: SharedRead | None = None) -> Iterator[None]:
    """Hide from DeepSpeed what lies in a checkpoint's folder and does not belong to it, while it loads the tag.

    Args:
        folder: of all checkpoints.
        tag: that is loaded.
        reading: what has been read of its files, for `current_reading`.
    """
    token = _loading.set((tag, manifest.listed_files(folder / tag), reading))
    try:
        yield
    finally:
        _loading.reset(token)


def current_reading() -> SharedRead | None:
    """What all ranks have read together, and kept, of the tag that is loaded; None where each reads by itself."""
    reading = _loading.get()[2]
    return reading if reading is not None and reading.images else None


def find_listed(find: Callable[..., list[str]], *args: object) -> list[str]:
    """`_get_all_ckpt_names` and `get_checkpoint_files`: without files that do not belong to the tag that is loaded."""
    _, listed, _ = _loading.get()
    return [path for path in find(*args) if listed is None or Path(path).name in listed]


def consolidate_tag(consolidate: Callable[..., T], checkpoint_dir: str, *args: object, **kwargs: object) -> T:
    """`get_fp32_state_dict_from_zero_checkpoint`: of the tag that is loaded; DeepSpeed reads what `latest` names."""
    tag, *_ = _loading.get()
    return consolidate(checkpoint_dir, *(args if tag is None else (tag, *args)), **kwargs)
