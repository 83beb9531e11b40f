"""Bring what was captured of a save to the disk, on all ranks: one order of steps for every save, now or from behind.

`ds_fira/checkpoint/atomic_save.py` says what a folder goes through. The ranks agree between two steps: over the
training's own collectives in a save that the training waits for, over the store in one that it does not
(`ds_fira/runtime/meeting.py`).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from deepspeed.utils import logger

from ds_fira.checkpoint import atomic_save, folder_lock
from ds_fira.checkpoint.atomic_save import CheckpointError
from ds_fira.checkpoint.errors import save_sentence
from ds_fira.checkpoint.manifest import Record
from ds_fira.checkpoint.outgoing import Outgoing, Sum
from ds_fira.checkpoint.tag_folder import find_tag_fault, shown, staging_tag
from ds_fira.engine.deepspeed.save_load.pick import require_all
from ds_fira.runtime.meeting import Meeting

T = TypeVar("T")


class Ranks(Protocol):
    """What the ranks agree through: `Communicator`, or `Meeting`."""

    def gather_objects(self, item: T) -> list[T]:
        """`item` of every rank, in order of rank."""


@dataclass
class Target:
    """Where a save goes, the same on every rank but for the token and `owner`.

    Attributes:
        folder: of all checkpoints.
        tag: of the new one.
        save_latest: whether `latest` is to name it.
        owner: whether this rank owns its storage.
        name: of the optimizer, for sentences.
        user: of the folder's lock.
        details: for the manifest.
        keep_last: complete checkpoints to leave in the folder, None for all.
        keep_every: optimizer steps, the checkpoints of whose multiples stay beside those.
    """

    folder: Path
    tag: str
    save_latest: bool
    owner: bool
    name: str
    user: object
    details: Mapping[str, object] = field(default_factory=dict)
    keep_last: int | None = None
    keep_every: int | None = None

    @property
    def staging(self) -> Path:
        """The folder that is filled."""
        return self.folder / staging_tag(self.tag)


class Writing:
    """One save on one rank.

    Attributes:
        written: bytes by this rank.
        cause: the error of this rank, where it is none that says itself what is wrong.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._prepared = False
        self.error: str | None = None
        self.cause: Exception | None = None
        self.written = 0

    @contextlib.contextmanager
    def caught(self, path: Path | None = None) -> Iterator[None]:
        """Keep an error for the ranks to agree on: raised here, it would leave the others waiting."""
        try:
            yield
        except Exception as error:
            self.keep(error, path)

    def keep(self, error: Exception, path: Path | None = None) -> None:
        """Keep an error, the first one."""
        if self.error is None:
            told = isinstance(error, CheckpointError)
            self.error = str(error) if told else save_sentence(error, path, self._target.folder, self._target.tag)
            self.cause = None if told else error

    def run(self, ranks: Ranks, files: Sequence[Outgoing], write_scripts: Callable[[Path], None]) -> int:
        """Write the files and publish the checkpoint; a call that all ranks make.

        Args:
            ranks: to agree through.
            files: what this rank has a part in.
            write_scripts: puts further files into a folder.

        Returns:
            The bytes that all ranks have written.

        Raises:
            CheckpointError: on every rank where one cannot; the folder is as before.
        """
        try:
            return self._run(ranks, files, write_scripts)
        except CheckpointError as error:
            self._give_up()
            raise error from self.cause

    def _run(self, ranks: Ranks, files: Sequence[Outgoing], write_scripts: Callable[[Path], None]) -> int:
        target, token = self._target, secrets.token_hex(8)
        with self.caught():
            if target.owner:
                self._make_staging(token)
        self._agree(ranks)
        with self.caught():
            token = self._shared_token()
        frames = dict(
            item
            for part in self._agree(ranks, [(file.key, file.frame) for file in files if file.frame is not None])
            for item in part
        )
        sums: dict[tuple[int, str], list[Sum]] = {}
        for file in files:
            with self.caught(target.staging / file.name):
                sums[file.key], written = file.write(target.staging, frames.get(file.key))
                self.written += written
            if self.error is not None:
                break
        else:
            with self.caught(target.staging):
                write_scripts(target.staging)
        own = self._finish(ranks, files, sums)
        answers = self._agree(ranks, (token, own, self.written))
        records = {name: record for other, part, _ in answers if other == token for name, record in part.items()}
        self._as_owner(ranks, atomic_save.seal, target.folder, target.tag, records, target.details, target.save_latest)
        self._as_owner(ranks, atomic_save.publish, target.folder, target.tag, target.save_latest)
        if target.owner and target.keep_last is not None and target.save_latest:
            self._delete_older()
        return sum(written for *_, written in answers)

    def _finish(
        self, ranks: Ranks, files: Sequence[Outgoing], own: Mapping[tuple[int, str], list[Sum]]
    ) -> dict[str, Record]:
        """Put the sums of all ranks together, and write the rest of the files that this rank owns."""
        sums: dict[tuple[int, str], list[Sum]] = {}
        for part in self._agree(ranks, own):
            for key, found in part.items():
                sums.setdefault(key, []).extend(found)
        records: dict[str, Record] = {}
        for file in files:
            if file.frame is not None or file.old is not None:
                with self.caught(self._target.staging / file.name):
                    records[file.name], written = file.finish(self._target.staging, sums[file.key])
                    self.written += written
        return records

    def among(self, meeting: Meeting, function: Callable[[Meeting], T]) -> T:
        """What a function returns that agrees through a meeting, which ends where that fails.

        Raises:
            CheckpointError: also where the ranks could not even agree, such as when one of them is gone.
        """
        try:
            return function(meeting)
        except Exception as error:
            meeting.close()
            if isinstance(error, CheckpointError):
                raise
            raise self._given_up(error) from error

    def _given_up(self, error: Exception) -> CheckpointError:
        tag = self._target.tag
        return CheckpointError(
            f"{self._target.name}: the save of {tag!r} was given up and earlier checkpoints are as they were, because "
            f"the ranks could not agree on it ({type(error).__name__}: {error}): see what the process that ended first "
            "printed."
        )

    def _agree(self, ranks: Ranks, item: T = None) -> list[T]:
        return require_all(self._target.name, ranks, self.error, item)

    def _as_owner(self, ranks: Ranks, function: Callable[..., None], *args: object) -> None:
        """Call a function that changes the folder on the ranks that own a storage, and agree on how it went."""
        with self.caught():
            if self._target.owner:
                folder_lock.hold(self._target.folder, self._target.user)
                function(*args)
        self._agree(ranks)

    def _delete_older(self) -> None:
        """What cannot be deleted now, the next save tries again: this one is complete."""
        target = self._target
        try:
            atomic_save.prune(target.folder, target.keep_last, target.keep_every)
        except OSError as error:
            logger.warning(
                f"{target.name}: keep_last = {target.keep_last}, but an older checkpoint in {target.folder} could not "
                f"be deleted ({error.strerror or error}): mend the folder, and the next save deletes it."
            )

    def _make_staging(self, token: str) -> None:
        target = self._target
        fault = find_tag_fault(target.folder, target.tag, saving=True)
        if fault is not None:
            raise CheckpointError(
                f"cannot save under tag {shown(target.tag)}, which {fault}: give save_checkpoint the name of a folder "
                f"inside {target.folder}, such as 'global_step{target.details.get('global_steps')}'."
            )
        target.folder.mkdir(parents=True, exist_ok=True)
        folder_lock.hold(target.folder, target.user)
        atomic_save.prepare(target.folder, target.tag, token)
        self._prepared = True

    def _shared_token(self) -> str:
        try:
            return atomic_save.token_of(self._target.folder, self._target.tag)
        except OSError as error:
            raise CheckpointError(
                f"does not see the folder {self._target.staging} that another rank made ({error.strerror}): save to a "
                'file system that all machines share, or set "checkpoint": {"use_node_local_storage": true}.'
            ) from None

    def _give_up(self) -> None:
        if self._prepared:
            # Another run that has taken over the folder may have a save of this name under way.
            with contextlib.suppress(folder_lock.InUse, OSError):
                folder_lock.hold(self._target.folder, self._target.user)
                atomic_save.discard(self._target.folder, self._target.tag)
