"""Which checkpoint `engine.load_checkpoint` takes: the newest that is complete, the same on every rank.

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
from typing import Any, TypeVar

from deepspeed import comm as dist
from deepspeed.utils import logger

from ds_fira.checkpoint import atomic_save
from ds_fira.checkpoint.atomic_save import CheckpointError
from ds_fira.checkpoint.manifest import FORMAT, REPLACED, STAGING
from ds_fira.checkpoint.tag_folder import beside
from ds_fira.engine.deepspeed.save_load.files import MODEL_FILE, OPTIMIZER_FILE, load
from ds_fira.sharding.comm import Communicator

T = TypeVar("T")
# The tag that is being loaded and the names of its files, where its manifest lists them.
_loading: ContextVar[tuple[str | None, Collection[str] | None]] = ContextVar("_loading", default=(None, None))
_warned: set[Path] = set()


def owns_storage(engine: Any) -> bool:
    """Whether this rank moves the files of its storage: rank 0, or the first of each node."""
    return (engine.local_rank if engine.use_node_local_storage() else engine.global_rank) == 0


def choose(engine: Any, call: inspect.BoundArguments) -> str | None:
    """The tag to load, the same on every rank; None leaves it to DeepSpeed, which finds nothing.

    With node-local storage the parts on the nodes have to be of one save. Where a crash has left them under different
    names, the tag is this node's.

    Raises:
        CheckpointError: the tag that was asked for is not complete, or none is where there should be one; on every rank
            with the same sentence.
    """
    return _Choice(engine, call).make()


class _Choice:
    """One call of `load_checkpoint` on one rank; what it decides goes by what all ranks have gathered."""

    def __init__(self, engine: Any, call: inspect.BoundArguments) -> None:
        given, self.communicator = call.arguments, Communicator()
        self.name: str = engine.basic_optimizer.algorithm.name
        self.folder = Path(given["load_dir"])
        self.told = ""  # rank 0's folder, for sentences that are the same on every rank
        self.asked = None if given["tag"] is None else str(given["tag"])
        partial = given["load_module_only"] or not given["load_optimizer_states"]
        self.model_only = partial and engine.zero_optimization_stage() < 3
        self.whole = not partial
        self.local: bool = engine.use_node_local_storage()
        self.owner = owns_storage(engine)

    def make(self) -> str | None:
        """See `choose`."""
        wanted, fault, candidates = self._gathered(self._candidates)[0]
        if fault is not None and self.asked is not None:
            raise CheckpointError(
                f"{self.name}: nothing can be loaded under tag {atomic_save.shown(wanted)}, which {fault}: give "
                f"load_checkpoint the name of a folder inside {self.told}."
            )
        faults = {} if fault is None else {atomic_save.LATEST: fault}
        for tag, save_id in candidates:
            own = tag
            if self.local:
                own = next((name for name in _names(tag) if self._save_id(name) == save_id), tag) if save_id else tag
            found = self._gathered(self._find_fault, own, save_id)
            if not any(found):
                # Contents are read by all processes of a storage, each file by one.
                found = self._gathered(self._find_damage, own)
            if not any(found):
                if wanted is None and not faults:
                    faults = {atomic_save.LATEST: "it is missing"}
                self._warn(faults, f"loading {tag!r} instead")
                if not faults and tag != wanted:
                    self._say(
                        f"{tag!r} was complete when its run was killed, before {atomic_save.LATEST} named it: "
                        "loading it"
                    )
                self._tell_unverified(own)
                return own
            faults[tag] = next(text for text in found if text)
        if wanted is not None or any(not atomic_save.is_leftover(tag) for tag in faults):
            # Of rank 0: the others may come here later, when the folder has changed.
            others = self._gathered(lambda: self._others(faults))[0]
            remedy = f"load another tag, such as {others[0]!r}" if others else "load from another folder"
            told = "; ".join(f"{Path(self.told, tag)}: {text}" for tag, text in faults.items())
            raise CheckpointError(f"{self.name}: no complete checkpoint to load ({told}): {remedy}.")
        self._warn(faults, "there is no complete one")
        return None

    def _gathered(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function returns on every rank.

        Raises:
            CheckpointError: it raised on some rank; on every rank, so that none waits for another.
        """
        answer, error = None, None
        try:
            answer = function(*args)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        answers = self.communicator.gather_objects((answer, error, str(self.folder)))
        self.told = answers[0][2]
        failed = [(rank, text) for rank, (_, text, _) in enumerate(answers) if text is not None]
        if failed:
            rank, text = failed[0]
            raise CheckpointError(
                f"{self.name}: rank {rank} cannot read the checkpoints in {self.told} ({text}): mend the folder or "
                "load from another one."
            )
        return [answer for answer, *_ in answers]

    def _candidates(self) -> tuple[str | None, str | None, list[tuple[str, str | None]]] | None:
        """The tag that is wanted, its fault, and what to try with the ids of its saves.

        Of rank 0: DeepSpeed alone writes `latest` on the first node only.
        """
        if self.communicator.dp_rank != 0:
            return None
        if self.asked is not None:
            wanted, fault = self.asked, atomic_save.find_tag_fault(self.folder, self.asked)
            found = [] if fault else atomic_save.in_order(self.folder, wanted, only=True)
        else:
            wanted, fault = atomic_save.look_up_latest(self.folder)
            wanted = "" if fault else wanted
            found = atomic_save.in_order(self.folder, wanted)
        return wanted, fault, [(tag, self._save_id(tag)) for tag in found]

    def _save_id(self, tag: str) -> str | None:
        try:
            return (atomic_save.read_manifest(self.folder / tag) or {}).get("save_id")
        except ValueError:
            return None

    def _find_fault(self, tag: str, save_id: str | None) -> str | None:
        """Of the ranks that own a storage: what is missing, or that it is of another save than rank 0's."""
        if not self.owner:
            return None
        fault = atomic_save.find_fault(self.folder / tag, self.model_only)
        if fault is None and self.local and self._save_id(tag) != save_id:
            fault = "its parts on the nodes are of different saves"
        if fault is None and self.whole and not self.local and atomic_save.listed_files(self.folder / tag) is None:
            fault = _find_missing_ranks(self.folder / tag)
        return fault

    def _find_damage(self, tag: str) -> str | None:
        if self.local and not self.owner:
            return None
        share = (0, 1) if self.local else (self.communicator.dp_rank, self.communicator.dp_size)
        return atomic_save.find_damage(self.folder / tag, self.model_only, *share)

    def _others(self, faults: dict[str, str]) -> list[str]:
        """What is complete in the folder beside what was tried."""
        if self.communicator.dp_rank != 0:
            return []
        listed = [tag for tag in atomic_save.in_order(self.folder, None) if tag not in faults]
        return [tag for tag in listed if atomic_save.find_fault(self.folder / tag) is None]

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
        path = self.folder / tag
        if dist.get_rank() != 0 or path in _warned:
            return
        content = atomic_save.read_manifest(path)
        if content is not None and content["format"] >= FORMAT:
            return
        _warned.add(path)
        lack = f"no {atomic_save.MANIFEST}, so that nothing of it could be verified"
        if content is not None:
            lack = f"a {atomic_save.MANIFEST} of format {content['format']}, which has no checksum of itself"
        logger.warning(f"{self.name}: {path} has {lack}: the next save writes one of format {FORMAT}.")


def _names(tag: str) -> list[str]:
    """The names under which a crash may have left a checkpoint."""
    parent, _, name = tag.rpartition("/")
    name = name.removeprefix(STAGING).removeprefix(REPLACED)
    base = f"{parent}/{name}" if parent else name
    return [base, beside(base, STAGING), beside(base, REPLACED)]


def _find_missing_ranks(path: Path) -> str | None:
    """Of a checkpoint without a manifest: the ranks whose optimizer states are missing."""
    names = [entry.name for entry in path.iterdir() if entry.is_file()]
    models = sorted(name for name in names if MODEL_FILE.fullmatch(name))
    if not models:
        return "its file of the model's states is missing"
    try:
        content = load(path / models[0])
        size, replicated = int(content["dp_world_size"]), content.get("optimizer") is not None
    except Exception:
        return None  # loading says what is wrong with it
    found = {int(match.groups()[-1]) for name in names if (match := OPTIMIZER_FILE.fullmatch(name))}
    absent = [rank for rank in range(size) if rank not in found]
    if replicated or not absent:
        return None
    return f"it lacks the optimizer states of ranks {absent} of the {size} that saved it"


@contextlib.contextmanager
def only_listed_files(folder: Path, tag: str) -> Iterator[None]:
    """Hide from DeepSpeed what lies in a checkpoint's folder and does not belong to it, while it loads the tag."""
    token = _loading.set((tag, atomic_save.listed_files(folder / tag)))
    try:
        yield
    finally:
        _loading.reset(token)


def find_listed(find: Callable[..., list[str]], *args: object) -> list[str]:
    """`_get_all_ckpt_names` and `get_checkpoint_files`: without files that do not belong to the tag that is loaded."""
    _, listed = _loading.get()
    return [path for path in find(*args) if listed is None or Path(path).name in listed]


def consolidate_tag(consolidate: Callable[..., T], checkpoint_dir: str, *args: object, **kwargs: object) -> T:
    """`get_fp32_state_dict_from_zero_checkpoint`: of the tag that is loaded; DeepSpeed reads what `latest` names."""
    tag, _ = _loading.get()
    return consolidate(checkpoint_dir, *(args if tag is None else (tag, *args)), **kwargs)
