"""Let `save_checkpoint` and `load_checkpoint` of engines that train with an optimizer of ours survive a crash.

DeepSpeed 0.19.8 writes every file straight to its final place, truncates `latest` and writes it anew, lets a rank that
cannot write leave the others in a barrier, and loads whatever is there. Here it writes under the tag of a staging
folder, as if the user had asked for that; `ds_fira/checkpoint/atomic_save.py` does the rest, on the ranks that own a
storage.

What this relies on in DeepSpeed: `save_checkpoint` writes through `checkpoint_engine.save` and `_copy_recovery_script`
and ends with the epilogue of stage 3, if any, and one barrier.
"""

from __future__ import annotations

import contextlib
import inspect
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger

from ds_fira.checkpoint import atomic_save, folder_lock
from ds_fira.checkpoint.atomic_save import CheckpointError
from ds_fira.checkpoint.errors import save_sentence
from ds_fira.checkpoint.manifest import FORMAT, MARK, Record, record_file
from ds_fira.checkpoint.tag_folder import find_tag_fault, shown, staging_tag
from ds_fira.engine.deepspeed.chosen import trains_ours
from ds_fira.engine.deepspeed.save_load.calls import bound, replaced
from ds_fira.engine.deepspeed.save_load.client_state import KEY
from ds_fira.engine.deepspeed.save_load.files import OUTER
from ds_fira.engine.deepspeed.save_load.pick import Choice, only_listed_files, owns_storage, require_all
from ds_fira.runtime.lost_peer import tell_lost_contact
from ds_fira.sharding.comm import Communicator

T = TypeVar("T")


def save_whole(save: Callable[..., object], *args: object, **kwargs: object) -> object:
    """`save_checkpoint`: writes into a staging folder, which takes its place once it is complete."""
    call = bound(save, *args, **kwargs)
    engine = call.arguments["self"]
    if trains_ours(engine) and call.arguments["save_dir"] and _can_stage(engine):
        return _Save(engine, call).run(save)
    return save(*args, **kwargs)


def load_whole(load: Callable[..., object], *args: object, **kwargs: object) -> object:
    """`load_checkpoint`: takes the newest complete checkpoint, the same on every rank."""
    call = bound(load, *args, **kwargs)
    engine = call.arguments["self"]
    if trains_ours(engine) and _can_stage(engine) and not engine.load_universal_checkpoint():
        # Asked for both, DeepSpeed looks for the weights of stage 3 where that stage saves none, and says nothing.
        call.arguments["load_optimizer_states"] &= not call.arguments["load_module_only"]
        choice = Choice(engine, call)
        tag = call.arguments["tag"] = choice.make()
        if tag is not None:
            with only_listed_files(Path(call.arguments["load_dir"]), tag, choice.reading):
                return load(*call.args, **call.kwargs)
    return load(*call.args, **call.kwargs)


def explain_lost_contact(configure: Callable[..., None], engine: DeepSpeedEngine) -> None:
    """`_configure_checkpointing`: a process that an error of communication ends says so after the traceback."""
    configure(engine)
    if trains_ours(engine):
        tell_lost_contact()


def release_folder(destroy: Callable[..., None], engine: DeepSpeedEngine) -> None:
    """`destroy`: another run may save into the folder from now on."""
    folder_lock.release(engine)
    destroy(engine)


def _can_stage(engine: DeepSpeedEngine) -> bool:
    """Whether the engine's files are all written when `save_checkpoint` returns; warns once where they may not be."""
    kind = type(engine.checkpoint_engine)
    if kind is not TorchCheckpointEngine and dist.get_rank() == 0:
        logger.warning_once(
            f"{engine.basic_optimizer.algorithm.name}: {kind.__name__} writes checkpoints in its own way, so they are "
            "neither protected against crashes nor verified; remove checkpoint.writer, nebula or datastates_ckpt from "
            "the DeepSpeed config."
        )
    return kind is TorchCheckpointEngine


class _Save:
    """One call of `save_checkpoint` on one rank."""

    def __init__(self, engine: DeepSpeedEngine, call: inspect.BoundArguments) -> None:
        given = call.arguments
        self.engine, self.call, self.communicator = engine, call, Communicator()
        self.folder = Path(given["save_dir"])
        self.tag = f"global_step{engine.global_steps}" if given["tag"] is None else str(given["tag"])
        self.save_latest: bool = given["save_latest"]
        self.owner = owns_storage(engine)
        self.staging = self.folder / staging_tag(self.tag)
        self.name: str = engine.basic_optimizer.algorithm.name
        self.save_id = ""
        self.prepared = False
        self.error: str | None = None
        self.cause: Exception | None = None
        self.records: dict[str, Record] = {}

    def run(self, save: Callable[..., object]) -> object:
        """Save; raises `CheckpointError` on every rank where one cannot."""
        try:
            token = self._prepare()
            done = self._let_deepspeed_write(save)
            answers = self._require_all((token, self.records))
            shared = {name: record for other, part in answers if other == token for name, record in part.items()}
            details = {"world_size": self.communicator.dp_size, "global_steps": self.engine.global_steps}
            details |= {"save_id": self.save_id}
            self._as_owner(atomic_save.seal, self.folder, self.tag, shared, details, self.save_latest)
            self._as_owner(atomic_save.publish, self.folder, self.tag, self.save_latest)
        except CheckpointError as error:
            if self.prepared:
                # Another run that has taken over the folder may have a save of this name under way.
                with contextlib.suppress(folder_lock.InUse, OSError):
                    folder_lock.hold(self.folder, self.engine)
                    atomic_save.discard(self.folder, self.tag)
            raise error from self.cause
        return done

    def _require_all(self, item: T = None) -> list[T]:
        return require_all(self.name, self.communicator, self.error, item)

    def _as_owner(self, function: Callable[..., None], *args: object) -> None:
        """Call a function that changes the folder on the ranks that own a storage, and agree on how it went."""
        with self._caught():
            if self.owner:
                folder_lock.hold(self.folder, self.engine)
                function(*args)
        self._require_all()

    @contextlib.contextmanager
    def _caught(self, path: Path | None = None) -> Iterator[None]:
        """Keep an error for the ranks to agree on: raised here, it would leave the others waiting."""
        try:
            yield
        except Exception as error:
            self._keep(error, path)

    def _keep(self, error: Exception, path: Path | None = None) -> None:
        if self.error is None:
            told = isinstance(error, CheckpointError)
            self.error = str(error) if told else save_sentence(error, path, self.folder, self.tag)
            self.cause = None if told else error

    def _prepare(self) -> str:
        """Make the staging folder; returns the token of the storage that this rank writes to."""
        token = secrets.token_hex(8)
        self._agree_on_tag(token)
        with self._caught():
            if self.owner:
                self._make_staging(token)
        self._require_all()
        with self._caught():
            token = self._shared_token()
        self._require_all()
        return token

    def _make_staging(self, token: str) -> None:
        fault = find_tag_fault(self.folder, self.tag, saving=True)
        if fault is not None:
            raise CheckpointError(
                f"cannot save under tag {shown(self.tag)}, which {fault}: give save_checkpoint the name of a folder "
                f"inside {self.folder}, such as 'global_step{self.engine.global_steps}'."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        folder_lock.hold(self.folder, self.engine)
        atomic_save.prepare(self.folder, self.tag, token)
        self.prepared = True

    def _shared_token(self) -> str:
        try:
            return atomic_save.token_of(self.folder, self.tag)
        except OSError as error:
            raise CheckpointError(
                f"does not see the folder {self.staging} that another rank made ({error.strerror}): save to a file "
                'system that all machines share, or set "checkpoint": {"use_node_local_storage": true}.'
            ) from None

    def _agree_on_tag(self, save_id: str) -> None:
        """Take rank 0's id of the save; and its tag, if ranks gave several and `checkpoint.tag_validation` lets them.

        Files in folders that depend on the rank would not be a checkpoint.

        Raises:
            AssertionError: DeepSpeed's, on every rank, with `checkpoint.tag_validation` = "Fail".
        """
        names, ids = zip(*self.communicator.gather_objects((self.tag, save_id)), strict=True)
        self.save_id = ids[0]
        if len(set(names)) == 1:
            return
        self.engine._checkpoint_tag_validation(self.tag)
        self.tag = names[0]
        self.staging = self.folder / staging_tag(self.tag)
        if dist.get_rank() == 0:
            logger.warning(
                f"{self.name}: save_checkpoint got {len(set(names))} different tags, such as {max(names)!r}; saving "
                f"under rank 0's, {self.tag!r}: give all ranks the same tag."
            )

    def _let_deepspeed_write(self, save: Callable[..., object]) -> object:
        """DeepSpeed's own save into the staging folder; its errors go to `self.error`."""
        self.call.arguments |= {"tag": staging_tag(self.tag), "save_latest": False}
        writer = self.engine.checkpoint_engine
        save_file, copy = writer.save, self.engine._copy_recovery_script

        def write(state_dict: object, path: str) -> None:
            if self.error is None:
                with self._caught(Path(path)):
                    save_file(_marked(state_dict), path)
                    self.records[Path(path).relative_to(self.staging).as_posix()] = record_file(Path(path))

        def copy_script(folder: str) -> None:
            with self._caught(self.staging):
                copy(str(self.staging))

        try:
            with replaced(writer, save=write), replaced(self.engine, _copy_recovery_script=copy_script):
                return save(*self.call.args, **self.call.kwargs)
        except Exception as error:
            self._keep(error)
            # The others are on their way to the end of DeepSpeed's function: meet them there. Here, so that an error
            # of the barrier has this one as its context.
            if self.engine._optimizer_has_ckpt_event_epilogue():
                self.engine.optimizer.checkpoint_event_epilogue()
            dist.barrier()
            return None


def _marked(state_dict: object) -> object:
    """A file's content, in whose entry of ours it says that there is a manifest, and of which format."""
    if not isinstance(state_dict, dict) or not {KEY, OUTER} & state_dict.keys():
        return state_dict
    return {**state_dict, KEY: {**state_dict.get(KEY, {}), MARK: FORMAT}}
