"""Before an engine of ours makes its first collective, its ranks agree that they build the same one.

A rank with another setting, parameter or ZeRO stage would train something else without a word, wait for the others
until the timeout, or end in an abort of the communication library. So every rank describes what it was given
(`description.py`), or what it refused, and all compare: one digest each, through the store, and only where they differ
the descriptions. All ranks then raise one sentence. Nobody waits in a collective for a rank that never comes.

They do it twice: before DeepSpeed distributes the model, and once more with the optimizer that the config or a
function has made, before DeepSpeed wraps it. Engines of other optimizers only leave a note that they are built, so that
a rank which builds another kind of engine than its peers is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from torch.distributed import distributed_c10d

from ds_fira.engine.deepspeed.description import Description, describe_difference
from ds_fira.runtime import lost_peer

FOREIGN = 3.0  # seconds for which a peer is seen at another kind of engine, before the others give up on it
REMEDY = "give every rank the same DeepSpeed config, model and parameters"


class DeviatingRank(ValueError, RuntimeError):
    """One rank was given something else than the others; the same sentence on every rank."""

    says_why = True  # to whoever ends because of it


@dataclass
class Engines:
    """The engines that the ranks of one group have begun to build, as this process counts them.

    Attributes:
        key: of the group in the store.
        ranks: of its processes, in all.
        ours: agreements that were begun.
        foreign: engines of other optimizers.
    """

    key: str
    ranks: Sequence[int]
    ours: int = 0
    foreign: int = 0


@dataclass
class Building:
    """An engine that is being built on this rank.

    Attributes:
        engines: of its group.
        name: of the optimizer.
        given: what the engine was given, by the names of its arguments.
        number: of the engine among ours, from 1; 0 before the first agreement.
        phases: agreements that were begun.
        refused: whether one of them ended in an error, the same on every rank.
    """

    engines: Engines
    name: str
    given: dict[str, object]
    number: int = 0
    phases: list[str] = field(default_factory=list)
    refused: bool = False

    @property
    def place(self) -> str:
        """The same for this engine on all of its ranks."""
        return f"engine {self.number} of {self.engines.key}"


_engines: dict[str, Engines] = {}


def engines_of(mpu: object) -> Engines:
    """The engines of the ranks that will train together: those that `mpu` names, else all; the stages of a pipeline."""
    ranks: Sequence[int] = range(torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    for name in (
        () if isinstance(mpu, PipelineParallelGrid) else ("get_sequence_data_parallel_group", "get_data_parallel_group")
    ):
        if hasattr(mpu, name):
            # What is wrong with an mpu is for DeepSpeed to say.
            with contextlib.suppress(Exception):
                ranks = torch.distributed.get_process_group_ranks(getattr(mpu, name)())
            break
    key = f"{len(ranks)} ranks {zlib.crc32(str(list(ranks)).encode()):08x}"
    return _engines.setdefault(key, Engines(key, ranks))


@contextlib.contextmanager
def foreign(engines: Engines, label: str) -> Iterator[None]:
    """Leave a note, while an engine of another optimizer is built and after, that this rank builds it."""
    store = lost_peer.open_store() if len(engines.ranks) > 1 else None
    if store is None:
        yield
        return
    engines.foreign += 1
    key, rank = f"{engines.key}/foreign/{engines.foreign}", torch.distributed.get_rank()
    with contextlib.suppress(Exception):
        store.set(f"{key}/{rank}", label)
        store.add(key, 1)
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            store.delete_key(f"{key}/{rank}")
            store.add(key, -1)
        engines.foreign -= 1
        raise


def agree(
    building: Building, phase: str, describe: Callable[[], Description] | None = None, error: Exception | None = None
) -> None:
    """Stop on every rank unless all of them build the same engine; a call that all of its ranks make.

    Args:
        building: the engine.
        phase: the agreement's name.
        describe: gives what this rank has; an exception of it counts as an error.
        error: that this rank has raised, in place of `describe`.

    Raises:
        DeviatingRank: ranks differ, or some raised an error; names them.
        Exception: `error`, where every rank has raised the same.
        PeerFailed: another rank failed in the meantime.
    """
    building.phases.append(phase)
    if not building.number:
        building.engines.ours += 1
        building.number = building.engines.ours
    description: Mapping[str, object] = {}
    try:
        if describe is not None:
            description = describe()
    except Exception as raised:
        error = raised
    building.refused = True  # until the ranks have agreed
    others = lost_peer.current() if len(building.engines.ranks) > 1 else None
    if others is not None:
        says = None if error is None else lost_peer.one_line(error) or type(error).__name__
        told = {**description, "name": building.name, "error": says}
        table = _Table(others, building, phase)
        if not table.all_same(_digests(told)):
            found = {rank: json.loads(each) for rank, each in table.gather(json.dumps(told)).items()}
            table.leave()
            raise DeviatingRank(_difference(found)) from error
        if error is not None:
            table.leave()
    if error is not None:
        raise error
    building.refused = False


def _digests(told: Mapping[str, object]) -> dict[str, str]:
    """Digests of what all ranks have to tell alike, and of what those of a pipeline's stage have to."""
    of_stage = ("stage", "group_settings", "parameters", "groups")
    common = {key: value for key, value in told.items() if key not in of_stage}
    parts = {"all": common, f"stage {told.get('stage', 0)}": [told.get(key) for key in of_stage]}
    if told["error"] is not None:
        parts = {"all": common}
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


def _difference(found: Mapping[int, _Told]) -> str:
    """The sentence, the same on every rank, about what they told each other."""
    name = next(iter(found.values()))["name"]
    failed = {rank: each["error"] for rank, each in found.items() if each["error"] is not None}
    if not failed:
        return f"{name}: the ranks would not train the same: {describe_difference(found)}; {REMEDY}."
    (rank, text), *more = failed.items()
    also = f", as ranks {[other for other, _ in more]} did for this or another reason," if more else ""
    return f"{name}: rank {rank} refused what it was given{also} and the others cannot go on without it: {text}"


class _Told(Description):
    """What a rank tells the others: its description, which is empty where it has an error."""

    name: str
    error: str | None


@dataclass
class _Table:
    """Entries of all ranks under one agreement in the store."""

    peers: lost_peer.Peers
    building: Building
    phase: str

    def __post_init__(self) -> None:
        self.store = torch.distributed.PrefixStore(f"{self.building.place}/{self.phase}", self.peers.store)

    def all_same(self, digests: Mapping[str, str]) -> bool:
        """Whether every rank came with these digests, as far as they have names in common; waits for them."""
        for name, digest in digests.items():
            if self.store.compare_set(f"digest/{name}", "", digest).decode() != digest:
                self.store.add("others", 1)
        self._arrive("arrived")
        return self.store.add("others", 0) == 0

    def gather(self, text: str) -> dict[int, str]:
        """The texts of all ranks; waits for them."""
        self.store.set(f"text/{self.peers.rank}", zlib.compress(text.encode()))
        self._arrive("told")
        return {rank: zlib.decompress(self.store.get(f"text/{rank}")).decode() for rank in self.building.engines.ranks}

    def leave(self) -> None:
        """Before this rank raises, and may end: wait a moment until the others have read what they need."""
        with contextlib.suppress(Exception):  # the rank that holds the store has ended, when all had read
            self.store.add("left", 1)
            lost_peer.wait_a_moment(self.store, "left", len(self.building.engines.ranks))

    def _arrive(self, key: str) -> None:
        """Wait until every rank has called this.

        Raises:
            PeerFailed: a rank failed elsewhere.
            DeviatingRank: a rank builds an engine of another kind, or does not come in time.
        """
        engines, foreign_place = self.building.engines, f"{self.building.place}/foreign"
        note = f"{engines.key}/foreign/{engines.foreign + 1}"
        self.store.set(f"{key}/{self.peers.rank}", "")
        self.store.add(key, 1)
        limit, pause = distributed_c10d.default_pg_timeout.total_seconds(), 0.002
        began = among_ours = time.monotonic()
        while self.store.add(key, 0) < len(engines.ranks):
            time.sleep(pause)
            pause = min(1.5 * pause, 0.25)
            strangers = self.peers.failure()
            if strangers is not None and strangers.place == foreign_place:
                raise DeviatingRank(strangers.sentence)
            self.peers.check()
            now = time.monotonic()
            if pause < 0.25 or self.peers.store.add(note, 0) <= 0:
                among_ours = now
            elif now > among_ours + FOREIGN:
                self._refuse_foreign(note)
            if now > began + limit:
                missing = [rank for rank in engines.ranks if not self.store.check([f"{key}/{rank}"])]
                raise DeviatingRank(
                    f"{self.building.name}: ranks {missing} did not begin to build the engine within "
                    f"{limit:.0f} s of the others; see what they printed, call deepspeed.initialize on "
                    "every rank, and where one needs longer raise the timeout of ds_fira.init_distributed."
                )

    def _refuse_foreign(self, note: str) -> None:
        engines, store = self.building.engines, self.peers.store
        kinds = {
            rank: store.get(f"{note}/{rank}").decode() for rank in engines.ranks if store.check([f"{note}/{rank}"])
        }
        if kinds:
            named = ", ".join(f"rank {rank} builds an engine with {kind}" for rank, kind in list(kinds.items())[:8])
            rest = [rank for rank in engines.ranks if rank not in kinds]
            sentence = (
                f"{self.building.name}: the ranks would not train the same: {named}, and ranks {rest[:8]} build one "
                f"with {self.building.name}; {REMEDY}."
            )
            self.peers.publish(f"{self.building.place}/foreign", sentence, listening=len(rest))
            raise DeviatingRank(sentence)
