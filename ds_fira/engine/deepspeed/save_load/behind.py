"""Saves that go on while the training does: one at a time, of one engine.

`engine.save_checkpoint` copies what this rank writes to the host and returns. A thread does the rest, as a save does
that the training waits for; it also tells the other ranks what they have to know. Its end is agreed on: from the save
on, every `engine.step` starts one small all-reduce whose answer it reads a step later, so that the ranks learn at the
same step that all of them are done, and raise there what went wrong. Between saves a step costs nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger

from ds_fira.checkpoint.atomic_save import CheckpointError
from ds_fira.checkpoint.host_copies import HostCopies
from ds_fira.checkpoint.outgoing import Outgoing
from ds_fira.engine.deepspeed.monitor import PREFIX
from ds_fira.engine.deepspeed.save_load.agreement import Known
from ds_fira.engine.deepspeed.save_load.writing import Target, Writing
from ds_fira.runtime import lost_peer
from ds_fira.runtime.background import Background
from ds_fira.runtime.meeting import Meeting
from ds_fira.runtime.termination import SharedFlag

T = TypeVar("T")
_BEHIND = "_ds_fira_behind"
_numbers = itertools.count(1)  # of the saves of this process from behind, the same on all ranks
_WORTH_TELLING = 0.1  # seconds that a save waited for the one before


@dataclass
class Report:
    """What a save took.

    Attributes:
        target: of the save.
        samples: that the engine had seen.
        look_into: looks into what was saved, by its tag.
        began: when the training stopped, by `time.monotonic`.
        stall: seconds for which the training stood still.
        seconds: from the call until the checkpoint was published.
        nbytes: that all ranks wrote.
    """

    target: Target
    samples: int
    look_into: Callable[[str], None]
    began: float
    stall: float = 0.0
    seconds: float = 0.0
    nbytes: int = 0

    def tell(self, engine: DeepSpeedEngine) -> None:
        """Say it in the log and to the monitors."""
        if engine.global_rank == 0:
            logger.info(
                f"{engine.basic_optimizer.algorithm.name}: saved {self.target.tag!r}: {self.nbytes / 1e6:.1f} MB in "
                f"{self.seconds:.2f} s, for {self.stall:.3f} s of which the training stood still"
            )
        if engine.monitor.enabled:
            figures = {"save_bytes": self.nbytes, "save_seconds": self.seconds, "save_stall_seconds": self.stall}
            events = [(PREFIX + name, float(value), self.samples) for name, value in figures.items()]
            engine.monitor.write_events(events)
        self.look_into(self.target.tag)


@dataclass
class Behind:
    """The saves of one engine.

    Attributes:
        copies: of what is being written.
        known: what the ranks have told each other before.
        under_way: the save that has not been heard of yet, and its report.
    """

    copies: HostCopies = field(default_factory=HostCopies)
    known: Known = field(default_factory=Known)
    under_way: tuple[Background[int], Report] | None = None
    _flag: SharedFlag | None = None
    _asked: bool = False

    @classmethod
    def of(cls, engine: DeepSpeedEngine) -> Behind:
        """Those of an engine."""
        return vars(engine).setdefault(_BEHIND, cls())

    @staticmethod
    def meeting() -> Meeting:
        """Of the next save, which every rank begins as its next one too."""
        return Meeting(f"save {next(_numbers)}")

    def start(
        self,
        writing: Writing,
        files: Sequence[Outgoing],
        finish: Callable[[Meeting], int],
        meeting: Meeting,
        report: Report,
    ) -> None:
        """Copy, and let a thread write.

        Args:
            writing: of the save.
            files: what this rank has a part in.
            finish: does everything else; returns the bytes that all ranks have written.
            meeting: for `finish`.
            report: to be filled in.
        """
        with writing.caught():
            self.copies.take([extent for file in files for extent in file.extents])

        def write() -> int:
            report.nbytes = writing.among(meeting, finish)
            meeting.close()
            report.seconds = time.monotonic() - report.began
            return report.nbytes

        self.under_way = (Background(write, meeting.hurry), report)
        self._asked = False
        report.stall = time.monotonic() - report.began

    def wait(self, engine: DeepSpeedEngine, why: str) -> None:
        """Wait for the save under way, if any.

        Raises:
            CheckpointError: it failed; the same sentence on every rank.
        """
        if self.under_way is None:
            return
        waited = self.under_way[0].wait()
        if waited > _WORTH_TELLING and engine.global_rank == 0:
            name = engine.basic_optimizer.algorithm.name
            logger.info(f"{name}: {why} waited {waited:.2f} s for the save of {self.under_way[1].target.tag!r} to end")
        self._hear(engine)

    def look(self, engine: DeepSpeedEngine) -> None:
        """At the beginning of a step, on every rank: hear of a save that has ended on all of them.

        Raises:
            CheckpointError: as in `wait`.
        """
        if self.under_way is None:
            return
        self._flag = self._flag or SharedFlag()
        unfinished = self._flag.ask(not self.under_way[0].done)
        if self._asked and not unfinished:
            self._hear(engine)
        self._asked = True

    def _hear(self, engine: DeepSpeedEngine) -> None:
        (background, report), self.under_way = self.under_way, None
        if self._flag is not None:
            self._flag.forget()
        background.result()
        report.tell(engine)


def refuse_unsaveable(engine: DeepSpeedEngine) -> None:
    """Stop, on every rank alike, if an engine asks for saves from behind that cannot be.

    Raises:
        ValueError: one sentence with the setting, its value and the remedy.
    """
    if not engine.basic_optimizer.saving.async_save:
        return
    writer, reason = engine.checkpoint_engine, None
    if type(writer) is not TorchCheckpointEngine:
        reason = (
            f"{type(writer).__name__} writes checkpoints in its own way; remove checkpoint.writer, nebula or "
            "datastates_ckpt from the DeepSpeed config"
        )
    elif not getattr(writer, "zipfile_serialization", True):
        reason = (
            "checkpoint.checkpoint_serialization = false writes files that are not laid out before they are written; "
            "remove it"
        )
    elif dist.get_world_size() > 1 and lost_peer.open_store() is None:
        reason = "the ranks have no store to agree through; start them over gloo or NCCL, not MPI"
    if reason is not None:
        name = engine.basic_optimizer.algorithm.name
        raise ValueError(f"{name}: async_save = True is not possible, because {reason}, or set async_save to false.")


def hear_before_step(step: Callable[..., T], engine: DeepSpeedEngine, *args: object, **kwargs: object) -> T:
    """`step`: raises what has gone wrong in a save from behind, at the same step on every rank."""
    behind: Behind | None = vars(engine).get(_BEHIND)
    if behind is not None:
        behind.look(engine)
    return step(engine, *args, **kwargs)


def wait_before(method: Callable[..., T], engine: DeepSpeedEngine, *args: object, **kwargs: object) -> T:
    """`load_checkpoint` and `destroy`: after the save that is under way."""
    behind: Behind | None = vars(engine).get(_BEHIND)
    if behind is None or behind.under_way is None:
        return method(engine, *args, **kwargs)
    try:
        behind.wait(engine, "load_checkpoint" if "load" in method.__name__ else "the end of the engine")
    except CheckpointError:
        if "load" not in method.__name__:
            method(engine, *args, **kwargs)  # it ends all the same
        raise
    return method(engine, *args, **kwargs)
