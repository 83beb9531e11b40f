"""Let `save_checkpoint` and `load_checkpoint` of engines that train with an optimizer of ours survive a crash.

DeepSpeed 0.19.8 writes every file straight to its final place, truncates `latest` and writes it anew, lets a rank that
cannot write leave the others in a barrier, and loads whatever is there. Here it writes under the tag of a staging
folder, as if the user had asked for that; `ds_fira/checkpoint/atomic_save.py` does the rest, on the ranks that own a
storage.

What this relies on in DeepSpeed: `save_checkpoint` writes through `checkpoint_engine.save` and `_copy_recovery_script`,
and the only collective in it, but for barriers, is the epilogue of stage 3 at its end.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable
from pathlib import Path

from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger

from ds_fira.checkpoint import folder_lock
from ds_fira.checkpoint.tag_folder import staging_tag
from ds_fira.engine.deepspeed.chosen import trains_ours
from ds_fira.engine.deepspeed.save_load.agreement import Agreement, Known
from ds_fira.engine.deepspeed.save_load.behind import Behind, Report, refuse_unsaveable
from ds_fira.engine.deepspeed.save_load.calls import bound
from ds_fira.engine.deepspeed.save_load.capture import Capture, peers_of
from ds_fira.engine.deepspeed.save_load.check import warn_if_unloadable
from ds_fira.engine.deepspeed.save_load.client_state import KEY, own_part, own_record, resume_state
from ds_fira.engine.deepspeed.save_load.for_others import load_beside
from ds_fira.engine.deepspeed.save_load.pick import Choice, only_listed_files, owns_storage
from ds_fira.engine.deepspeed.save_load.universal import load_universal
from ds_fira.engine.deepspeed.save_load.writing import Ranks, Target, Writing
from ds_fira.runtime.lost_peer import tell_lost_contact
from ds_fira.sharding.comm import Communicator


def save_whole(save: Callable[..., object], *args: object, **kwargs: object) -> object:
    """`save_checkpoint`: writes into a staging folder, which takes its place once it is complete."""
    call = bound(save, *args, **kwargs)
    engine = call.arguments["self"]
    if not trains_ours(engine) or not call.arguments["save_dir"]:
        return save(*args, **kwargs)
    look_into = _look_into(engine, call)
    if _can_stage(engine):
        return _Save(engine, call).run(save, look_into)
    resume = resume_state(Communicator().gather_objects(own_part(engine)()), own_record(engine))
    call.arguments["client_state"] = {**call.arguments["client_state"], KEY: resume}
    done = save(*call.args, **call.kwargs)
    look_into(_tag_of(engine, call))
    return done


def load_whole(load: Callable[..., object], *args: object, **kwargs: object) -> object:
    """`load_checkpoint`: takes the newest complete checkpoint, the same on every rank."""
    call = bound(load, *args, **kwargs)
    engine = call.arguments["self"]
    if not trains_ours(engine):
        return load_beside(load, call)
    if engine.load_universal_checkpoint():
        return load_universal(load, call)
    if _can_stage(engine):
        # Asked for both, DeepSpeed looks for the weights of stage 3 where that stage saves none, and says nothing.
        call.arguments["load_optimizer_states"] &= not call.arguments["load_module_only"]
        choice = Choice(engine, call)
        tag = call.arguments["tag"] = choice.make()
        if tag is not None:
            with only_listed_files(Path(call.arguments["load_dir"]), tag, choice.reading):
                return load(*call.args, **call.kwargs)
    return load(*call.args, **call.kwargs)


def explain_lost_contact(configure: Callable[..., None], engine: DeepSpeedEngine) -> None:
    """`_configure_checkpointing`: says at the end why contact was lost; refuses what cannot be saved from behind."""
    configure(engine)
    if trains_ours(engine):
        tell_lost_contact()
        refuse_unsaveable(engine)


def release_folder(destroy: Callable[..., None], engine: DeepSpeedEngine) -> None:
    """`destroy`: another run may save into the folder from now on."""
    folder_lock.release(engine)
    destroy(engine)


def _tag_of(engine: DeepSpeedEngine, call: inspect.BoundArguments) -> str:
    tag = call.arguments["tag"]
    return f"global_step{engine.global_steps}" if tag is None else str(tag)


def _look_into(engine: DeepSpeedEngine, call: inspect.BoundArguments) -> Callable[[str], None]:
    """What says, called with the tag after the save, that a load would refuse what the user has put into it."""
    folder, given = Path(call.arguments["save_dir"]), dict(call.arguments["client_state"])
    return lambda tag: warn_if_unloadable(engine, folder / tag, given)


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
        given, saving = call.arguments, engine.basic_optimizer.saving
        self._engine, self._call, self._communicator = engine, call, Communicator()
        self._target = Target(
            folder=Path(given["save_dir"]),
            tag=_tag_of(engine, call),
            save_latest=given["save_latest"],
            owner=owns_storage(engine),
            name=engine.basic_optimizer.algorithm.name,
            user=engine,
            details={"world_size": self._communicator.dp_size, "global_steps": engine.global_steps},
            keep_last=saving.keep_last,
            keep_every=saving.keep_every,
        )
        self._writing = Writing(self._target)

    def run(self, save: Callable[..., object], look_into: Callable[[str], None]) -> object:
        """Save, or begin to; raises `CheckpointError` on every rank where one cannot, or could not the last time."""
        engine, behind = self._engine, Behind.of(self._engine)
        behind.wait(engine, "save_checkpoint")
        report = Report(self._target, engine.global_samples, look_into, time.monotonic())
        capture = self._capture(save)
        if engine.basic_optimizer.saving.async_save:
            meeting = behind.meeting()
            agreement = Agreement(engine, self._target, capture.digest, behind.known)
            if agreement.due:
                with contextlib.suppress(Exception):  # raised from behind, at the same step as on the other ranks
                    agreement.make(meeting)
            capture.share_out(agreement.same)
            finish = functools.partial(self._finish, agreement=agreement, capture=capture)
            behind.start(self._writing, capture.files, finish, meeting, report)
        else:
            agreement = Agreement(engine, self._target, capture.digest, Known())  # all is new to it
            agreement.make(self._communicator)
            capture.share_out(agreement.same)
            report.nbytes = self._finish(self._communicator, agreement, capture)
            report.seconds = report.stall = time.monotonic() - report.began
            report.tell(engine)
        return True

    def _finish(self, ranks: Ranks, agreement: Agreement, capture: Capture) -> int:
        """Do what is not the copy; returns the bytes that all ranks have written."""
        agreement.make(ranks)
        capture.complete(agreement.resume)
        return self._writing.run(ranks, capture.files, capture.write_scripts)

    def _capture(self, save: Callable[..., object]) -> Capture:
        """Let DeepSpeed build what it would write; its errors are kept for all ranks."""
        given = self._call.arguments
        # The entry of ours is completed later, when all ranks have told of theirs.
        client_state = {**given["client_state"], KEY: {}}
        given |= {"tag": staging_tag(self._target.tag), "save_latest": False, "client_state": client_state}
        known = Behind.of(self._engine).known
        known.peers = known.peers or peers_of(self._engine, self._communicator)
        capture = Capture(self._engine, self._target.staging, known.peers, self._writing.caught)
        with capture.installed():
            try:
                save(*self._call.args, **self._call.kwargs)
            except Exception as error:
                self._writing.keep(error)
                # The others are on their way to the end of DeepSpeed's function: meet them there.
                if self._engine._optimizer_has_ckpt_event_epilogue():
                    self._engine.optimizer.checkpoint_event_epilogue()
        return capture
