"""What the ranks of a save tell each other beside how it went: one exchange.

A save that the training waits for makes it before anything is written, over the training's collectives. One from behind
makes it from behind, so that no rank waits for another while it copies. What a rank copies depends on it, though:
whether all ranks hold the same tensors in the module's file. That stays as it was at the save before as long as a
rank's own tensors do. Where they are others, and at the first save, the exchange is made before the copy; a rank that
alone finds others meets the rest there, which are behind already, and all give the save up.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger

from ds_fira.checkpoint.atomic_save import CheckpointError
from ds_fira.engine.deepspeed.save_load.client_state import own_part, own_record, resume_state
from ds_fira.engine.deepspeed.save_load.writing import Ranks, Target


class TagsDiffer(CheckpointError, AssertionError):
    """Ranks gave several tags, which `checkpoint.tag_validation` = "Fail" forbids; DeepSpeed asserts it."""


@dataclass
class Known:
    """What an engine remembers of the save before.

    Attributes:
        digests: of the tensors that every rank had to share out; None where nothing is known.
        peers: the ranks that write to the same storage as this one; likewise.
    """

    digests: tuple[str, ...] | None = None
    peers: Sequence[int] | None = None


class _Told(NamedTuple):
    """What one rank tells: its tag and id of the save, its digest, whether that is new to it, its resume state."""

    tag: str
    save_id: str
    digest: str
    new: bool
    part: dict[str, object]


class Agreement:
    """The exchange of one save, on one rank.

    Attributes:
        due: whether it is to be made before the copy.
        same: whether all ranks have the same tensors to share out, once that is known.
    """

    def __init__(self, engine: DeepSpeedEngine, target: Target, digest: str, known: Known) -> None:
        """Note what this rank tells; a collective call where scaling factors are recorded.

        Args:
            engine: that saves.
            target: of the save; gets rank 0's tag and id.
            digest: of the tensors to share out.
            known: kept for the next save.
        """
        self._engine, self._target, self._known = engine, target, known
        self.due = known.digests is None or known.digests[dist.get_rank()] != digest
        self.same = not self.due and len(set(known.digests)) == 1
        self._digest, self._part = digest, own_part(engine)
        self._record = own_record(engine)
        self._parts: tuple[Mapping[str, object], ...] | None = None
        self._error: Exception | None = None

    def make(self, ranks: Ranks) -> None:
        """Tell and hear, unless that is done; a call that all ranks make.

        Raises:
            CheckpointError: the save cannot go on; on every rank, with the same sentence. Raised by later calls too.
        """
        if self._parts is None and self._error is None:
            try:
                self._make(ranks)
            except Exception as error:
                self._error = error
        if self._error is not None:
            raise self._error

    def _make(self, ranks: Ranks) -> None:
        target, known = self._target, self._known
        own = _Told(target.tag, secrets.token_hex(8), self._digest, self.due, self._part())
        tags, ids, digests, new, self._parts = zip(*ranks.gather_objects(own), strict=True)
        target.details = {**target.details, "save_id": ids[0]}
        known.digests = digests if len(set(new)) == 1 else None
        self.same = len(set(digests)) == 1
        if len(set(tags)) > 1:
            self._settle_tag(tags)
        if known.digests is None:
            changed = [rank for rank, found in enumerate(new) if found]
            raise CheckpointError(
                f"{target.name}: the save of {target.tag!r} was given up and earlier checkpoints are as they were, "
                f"because the module's tensors have changed on ranks {changed} since the last save, and not on the "
                "others: save again, and rank 0 writes them all."
            )

    def _settle_tag(self, tags: tuple[str, ...]) -> None:
        """Take rank 0's tag if `checkpoint.tag_validation` lets it.

        Files in folders that depend on the rank would not be a checkpoint.
        """
        told = f"save_checkpoint got {len(set(tags))} different tags, such as {max(tags)!r}"
        if self._engine.checkpoint_tag_validation_enabled() and self._engine.checkpoint_tag_validation_fail():
            raise TagsDiffer(
                f"{self._target.name}: {told}: the checkpoint tag name is not consistent across all ranks; give all "
                'ranks the same tag, or set "checkpoint": {"tag_validation": "Warn"}.'
            )
        self._target.tag = tags[0]
        if dist.get_rank() == 0:
            logger.warning(
                f"{self._target.name}: {told}; saving under rank 0's, {tags[0]!r}: give all ranks the same tag."
            )

    @property
    def resume(self) -> dict[str, object]:
        """What is saved of all ranks for an exact resume, once the exchange is made."""
        return resume_state(self._parts, self._record)
