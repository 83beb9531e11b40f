"""Tell the other ranks that one has failed, outside of collectives, through the store of torch.distributed.

A rank that raises in a step leaves the others in a collective that it will never join, until the timeout of minutes.
So it publishes what went wrong, and a thread in every process looks for that about twice a second. A failure that all
ranks have at the same place, such as a refused setting, ends in the exception of each; a rank that did not fail there
itself ends with the sentence of the one that did:

- its next call of the engine raises it, and so does the collective that it waits in where that can be interrupted:
  the other process ended and closed its connections, or the backend (NCCL) can abort;
- where nothing interrupts it (gloo, and the other process lives on because its caller caught the exception), the
  thread prints the sentence and ends the process with status 1.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch.distributed import distributed_c10d

POLL = 0.5  # seconds from one look at the store to the next
GRACE = 2.0  # seconds in which a rank may still fail at the same place by itself
ABORT = 2.0  # seconds for an abort to take effect, before the process is ended
ACKNOWLEDGED = 5.0  # seconds for which a rank that failed waits until the others know, since it may hold the store
LONGEST = 1000  # characters of an error's text that are passed on
# gloo raises RuntimeError with these; NCCL and the store raise torch.distributed.DistError.
_SIGNS = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Socket Timeout", "Connection refused")


class PeerFailed(RuntimeError):
    """Another rank failed, and said why."""

    says_why = True  # to whoever ends because of it


@dataclass(frozen=True)
class Failure:
    """What one rank tells the others.

    Attributes:
        rank: of the process, in all.
        place: where, the same on every rank that gets there.
        sentence: what the others raise.
    """

    rank: int
    place: str
    sentence: str


@dataclass
class Peers:
    """The other processes of a training.

    Attributes:
        group: the default process group.
        store: a client of its own, or the process group's where a store cannot be cloned.
        rank: of this process.
    """

    group: torch.distributed.ProcessGroup
    store: torch.distributed.Store
    rank: int
    _process: int = field(default_factory=os.getpid)
    _own: set[str] = field(default_factory=set)
    _known: list[tuple[float, Failure]] = field(default_factory=list)
    _raised: threading.Event = field(default_factory=threading.Event)
    _ending: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    # A read of what is still to be told would keep it out of the store for good: both use one client.
    _telling: threading.Lock = field(default_factory=threading.Lock)
    _aborted: bool = False

    def start(self) -> None:
        """Begin to look for failures of others."""
        seen = self.store.add("failures", 0)
        self._thread = threading.Thread(target=self._watch, args=(seen,), name="ds_fira.runtime.lost_peer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; it must not be inside the store when the interpreter ends."""
        self._ending.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def failure(self, place: str | None = None) -> Failure | None:
        """The first failure known of another rank at a place where this rank did not fail; not at `place`."""
        return next((each for _, each in self._known if each.place not in (place, *self._own)), None)

    def check(self, place: str | None = None, cause: Exception | None = None) -> None:
        """Raise where another rank failed, unless at `place`, where this one may do so by itself.

        Raises:
            PeerFailed: with the sentence of the rank that failed; from `cause`.
        """
        failure = self.failure(place)
        if failure is not None:
            self._raised.set()
            raise PeerFailed(failure.sentence) from cause

    def publish(self, place: str, sentence: str, listening: int | None = None) -> None:
        """Tell the others that this rank failed, and wait a moment until they know.

        Args:
            place: where, the same on every rank that gets there; told once.
            sentence: what the others raise.
            listening: ranks that look for failures, this one among them; None for all.
        """
        if place in self._own or self._process != os.getpid():
            return
        self._own.add(place)
        with contextlib.suppress(Exception):  # the store may be gone, and the error that is being raised counts
            with self._telling:
                number = self.store.add("failures", 1)
                self.store.set(f"failure/{number}", json.dumps([self.rank, place, sentence]))
            wait_a_moment(self.store, f"known/{number}", (listening or self.group.size()) - 1)

    def settle(self, error: Exception, place: str | None, doing: str, name: str) -> None:
        """Say what an error on this rank means for the others, or which other rank's failure it comes from.

        Args:
            error: that was raised, and goes on to the caller.
            place: as in `publish`; None for a part of the training whose errors are the user's own, not published.
            doing: for the sentence, as in "in step 12".
            name: of the optimizer.

        Raises:
            PeerFailed: it follows from the failure of another rank.
        """
        if isinstance(error, PeerFailed):
            return
        if is_lost_contact(error) or self._aborted:
            self.check(cause=error)
        elif place is not None:
            self.publish(place, sentence_of(self.rank, doing, error, name))

    def _watch(self, seen: int) -> None:
        while not self._ending.wait(POLL):
            try:
                with self._telling:
                    count = self.store.add("failures", 0)
                while seen < count:
                    seen += 1
                    failure = Failure(*json.loads(self.store.get(f"failure/{seen}")))
                    if failure.rank != self.rank:
                        self._known.append((time.monotonic() + GRACE, failure))
                        self.store.add(f"known/{seen}", 1)
            except Exception:  # the process that held the store is gone
                if not self._known:
                    return
            for deadline, failure in self._known:
                if time.monotonic() > deadline and failure.place not in self._own:
                    self._end(failure)
                    return

    def _end(self, failure: Failure) -> None:
        """End this process: by an exception where its collective can be interrupted, else at once."""
        if not self._raised.is_set():
            self._aborted = True
            _abort_collectives()
        # A main thread that has raised the sentence may close its files and end by itself, or live on.
        if self._raised.wait(ABORT) or self._ending.is_set():
            return
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        print(failure.sentence, file=sys.stderr, flush=True)
        os._exit(1)


def wait_a_moment(store: torch.distributed.Store, key: str, count: int) -> None:
    """Wait until a counter of the store has come to `count`, and no longer than others may take to answer."""
    deadline = time.monotonic() + ACKNOWLEDGED
    while store.add(key, 0) < count and time.monotonic() < deadline:
        time.sleep(0.02)


def sentence_of(rank: int, doing: str, error: BaseException, name: str) -> str:
    """What the other ranks raise.

    Args:
        rank: that failed.
        doing: when, as in "in step 12".
        error: that it raised.
        name: of the optimizer.
    """
    return (
        f"{name}: rank {rank} failed {doing}, so every rank ends (mend what it says, then go on from the newest "
        f"complete checkpoint): {type(error).__name__}: {one_line(error)[:LONGEST]}"
    )


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())


def _abort_collectives() -> None:
    """Interrupt what this process waits for; gloo of torch 2.13 cannot."""
    for group in list(distributed_c10d._world.pg_names):
        with contextlib.suppress(Exception):
            group.abort()


_current: Peers | None = None


def current() -> Peers | None:
    """The other processes of the default process group, watched from the first call on; None where there are none."""
    global _current
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    group = distributed_c10d._get_default_group()
    if _current is None or _current.group is not group:
        stop()
        store = open_store()
        if store is None:
            return None
        _current = Peers(group, store, torch.distributed.get_rank())
        _current.start()
        tell_lost_contact()
    return _current


def open_store() -> torch.distributed.Store | None:
    """The part of torch.distributed's store that is ours, through a connection of its own; None where there is none."""
    if not torch.distributed.is_initialized():
        return None
    store = distributed_c10d._get_default_store()
    if store is None:  # MPI has none
        return None
    # What waits in one client of the store keeps out whatever else uses it.
    return torch.distributed.PrefixStore("ds_fira", store.clone() if hasattr(store, "clone") else store)


def stop() -> None:
    """No longer look for failures of other processes; `current` begins anew."""
    global _current
    if _current is not None:
        _current.stop()
        _current = None


def is_lost_contact(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that another process is gone or does not answer."""
    while error is not None:
        if isinstance(error, torch.distributed.DistError):
            return True
        if isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def tell_lost_contact() -> None:
    """Say it in one sentence after the traceback if this process ends because it lost another; again without effect.

    Where another error ends the process, the others are told of it.
    """
    before = sys.excepthook
    if getattr(before, "_tells_lost_contact", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        before(kind, error, traceback)
        if getattr(error, "says_why", False):
            return
        if is_lost_contact(error):
            failure = None if _current is None else _current.failure()
            told = (
                "see what the first one to end printed, and start the training again from its newest complete "
                "checkpoint."
                if failure is None
                else failure.sentence
            )
            rank = os.environ.get("RANK", "0")
            text = f"ds_fira: rank {rank} ends because another process ended or did not answer in time: {told}"
            print(text, file=sys.stderr, flush=True)
        elif _current is not None and not _current._own:
            _current.publish("the end", sentence_of(_current.rank, "and ended", error, "ds_fira"))

    hook._tells_lost_contact = True
    sys.excepthook = hook


atexit.register(stop)
