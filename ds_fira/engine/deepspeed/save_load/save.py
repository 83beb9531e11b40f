"""Let `save_checkpoint` and `load_checkpoint` of engines that train with an optimizer of ours survive a crash.

DeepSpeed 0.19.8 writes every file straight to its final place, truncates `latest` and writes it anew, lets a rank that
cannot write leave the others in a barrier, and loads whatever is there. Here it writes under the tag of a staging
folder, as if the user had asked for that; `ds_fira/checkpoint/atomic_save.py` does the rest, on the ranks that own a
storage.

What this relies on in DeepSpeed: `save_checkpoint` writes through `checkpoint_engine.save` and `_copy_recovery_script`
and ends with the epilogue of stage 3, if any, and one barrier.
"""

from __future__ import annotations

import functools
import inspect
import secrets
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
from ds_fira.engine.deepspeed.save_load.behind import Behind, Report, refuse_unsaveable
from ds_fira.engine.deepspeed.save_load.calls import bound
from ds_fira.engine.deepspeed.save_load.capture import Capture, peers_of
from ds_fira.engine.deepspeed.save_load.check import warn_if_unloadable
from ds_fira.engine.deepspeed.save_load.client_state import KEY
from ds_fira.engine.deepspeed.save_load.for_others import ask_for_states
from ds_fira.engine.deepspeed.save_load.pick import Choice, only_listed_files, owns_storage
from ds_fira.engine.deepspeed.save_load.writing import Target, Writing
from ds_fira.runtime.lost_peer import tell_lost_contact
from ds_fira.sharding.comm import Communicator


def save_whole(save: Callable[..., object], *args: object, **kwargs: object) -> object:
    """`save_checkpoint`: writes into a staging folder, which takes its place once it is complete."""
    call = bound(save, *args, **kwargs)
    engine = call.arguments["self"]
    if not trains_ours(engine) or not call.arguments["save_dir"]:
        return save(*args, **kwargs)
    if _can_stage(engine):
        return _Save(engine, call).run(save)
    done = save(*args, **kwargs)
    _look_into(engine, call, _tag_of(engine, call))()
    return done


def load_whole(load: Callable[..., object], *args: object, **kwargs: object) -> object:
    """`load_checkpoint`: takes the newest complete checkpoint, the same on every rank."""
    call = bound(load, *args, **kwargs)
    engine = call.arguments["self"]
    if not trains_ours(engine):
        ask_for_states(call)
    elif _can_stage(engine) and not engine.load_universal_checkpoint():
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


def _look_into(engine: DeepSpeedEngine, call: inspect.BoundArguments, tag: str) -> Callable[[], None]:
    """What says, once it is called after the save, that a load would refuse what the user has put into it."""
    given = {key: value for key, value in call.arguments["client_state"].items() if key != KEY}
    return functools.partial(warn_if_unloadable, engine, Path(call.arguments["save_dir"], tag), given)


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
        self._engine, self._call, self._communicator = engine, call, Communicator()
        self._tag = _tag_of(engine, call)
        self._target = Target(
            folder=Path(given["save_dir"]),
            tag=self._tag,
            save_latest=given["save_latest"],
            owner=owns_storage(engine),
            name=engine.basic_optimizer.algorithm.name,
            user=engine,
            keep_last=engine.basic_optimizer.saving.keep_last,
            keep_every=engine.basic_optimizer.saving.keep_every,
        )
        self._writing = Writing(self._target)

    def run(self, save: Callable[..., object]) -> object:
        """Save, or begin to; raises `CheckpointError` on every rank where one cannot, or could not the last time."""
        behind = Behind.of(self._engine)
        behind.wait(self._engine, "save_checkpoint")
        began = time.monotonic()
        capture = self._capture(save)
        capture.share_out(self._agree(capture.digest))
        afterwards = _look_into(self._engine, self._call, self._target.tag)
        report = Report(self._target.tag, self._engine.global_samples, afterwards)
        if self._engine.basic_optimizer.saving.async_save:
            behind.start(self._writing, capture, self._target.details["save_id"], report, began)
            return True
        report.nbytes = self._writing.run(self._communicator, capture.files, capture.write_scripts)
        report.seconds = report.stall = time.monotonic() - began
        report.tell(self._engine)
        return True

    def _agree(self, digest: str) -> bool:
        """Take rank 0's id of the save; and its tag, if ranks gave several and `checkpoint.tag_validation` lets them.

        Files in folders that depend on the rank would not be a checkpoint.

        Returns:
            Whether the digest is the same on all ranks.

        Raises:
            AssertionError: DeepSpeed's, on every rank, with `checkpoint.tag_validation` = "Fail".
        """
        own = (self._tag, secrets.token_hex(8), digest)
        names, ids, digests = zip(*self._communicator.gather_objects(own), strict=True)
        size, steps = self._communicator.dp_size, self._engine.global_steps
        self._target.details = {"world_size": size, "global_steps": steps, "save_id": ids[0]}
        same = len(set(digests)) == 1
        if len(set(names)) == 1:
            return same
        self._engine._checkpoint_tag_validation(self._tag)
        self._target.tag = names[0]
        if dist.get_rank() == 0:
            logger.warning(
                f"{self._target.name}: save_checkpoint got {len(set(names))} different tags, such as {max(names)!r}; "
                f"saving under rank 0's, {names[0]!r}: give all ranks the same tag."
            )
        return same

    def _capture(self, save: Callable[..., object]) -> Capture:
        """Let DeepSpeed build what it would write; its errors are kept for all ranks."""
        self._call.arguments |= {"tag": staging_tag(self._tag), "save_latest": False}
        peers = peers_of(self._engine, self._communicator)
        capture = Capture(self._engine, self._target.staging, peers, self._writing.caught)
        with capture.installed():
            try:
                save(*self._call.args, **self._call.kwargs)
            except Exception as error:
                self._writing.keep(error)
                # The others are on their way to the end of DeepSpeed's function: meet them there. Here, so that an
                # error of the barrier has this one as its context.
                if self._engine._optimizer_has_ckpt_event_epilogue():
                    self._engine.optimizer.checkpoint_event_epilogue()
                dist.barrier()
        return capture
