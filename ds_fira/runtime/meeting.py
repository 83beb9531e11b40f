"""Ranks that agree with each other in threads, while their processes train: through the store of torch.distributed.

A collective in a thread would have to fall into the same place among those of the training on every rank, and would
keep a group busy. The store takes what any thread brings. Rank 0 puts the parts together. Who waits looks at the
heartbeat of those that are missing: a rank that writes to a slow disk is waited for without an end, one whose process
is gone or frozen for `PATIENCE` seconds is not.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import zlib
from collections.abc import Iterable
from typing import TypeVar

import torch.distributed

from ds_fira.runtime import lost_peer

T = TypeVar("T")
BEAT = 1.0  # seconds
_POLL = 0.02  # seconds
PATIENCE = 20.0  # seconds, as of a lock of a folder
HURRIED = 10.0  # seconds, once this process ends
LEAVING = 10.0  # seconds for which the process with the store waits for the others to have read the last answer


class RankGone(RuntimeError):
    """Another rank did not take part, and its heart has stopped."""


class Meeting:
    """The ranks of one undertaking; used by one thread of each at a time, and begun by the first thing that is told.

    Args:
        name: the same on all ranks, of no other undertaking.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self._rank = torch.distributed.get_rank() if self._size > 1 else 0
        self._patience, self._round, self._looked = PATIENCE, 0, time.monotonic()
        self._ended = threading.Event()
        self._hearts: dict[int, tuple[int, float]] = {}
        self._gone: list[int] = []
        self._store: torch.distributed.Store | None = None

    def _begin(self) -> None:
        self._store = self._opened()
        threading.Thread(target=self._beat, args=(self._opened(),), name="ds_fira meeting", daemon=True).start()

    def _opened(self) -> torch.distributed.Store:
        return torch.distributed.PrefixStore(f"meeting/{self._name}", lost_peer.open_store())

    def _beat(self, store: torch.distributed.Store) -> None:
        with contextlib.suppress(Exception):  # the process with the store is gone
            while True:
                store.add(f"heart/{self._rank}", 1)
                if self._ended.wait(BEAT):
                    return

    def hurry(self) -> None:
        """Wait less for ranks that are missing: this process ends."""
        self._patience = HURRIED

    def gather_objects(self, item: T) -> list[T]:
        """`item` of every rank, in order of rank; a call that all ranks make.

        Raises:
            RankGone: some rank does not come any more; on every rank that does.
            Exception: the process that holds the store is gone.
        """
        if self._size == 1:
            return [item]
        if self._store is None:
            self._begin()
        self._round += 1
        here = f"{self._round}/"
        self._store.set(f"{here}item/{self._rank}", zlib.compress(pickle.dumps(item), 1))
        self._store.add(f"{here}count", 1)
        if self._rank == 0:
            answer = self._collect(here)
        else:
            while not self._store.check([f"{here}all"]):
                if self._looks():
                    self._require_beating([0])
            answer = self._store.get(f"{here}all")
        found = pickle.loads(zlib.decompress(answer))
        if isinstance(found, str):
            raise RankGone(found)
        return [pickle.loads(zlib.decompress(part)) for part in found]

    def _collect(self, here: str) -> bytes:
        try:
            while self._store.add(f"{here}count", 0) < self._size:
                if self._looks():
                    here_not = (each for each in range(self._size) if not self._store.check([f"{here}item/{each}"]))
                    self._require_beating(here_not)
            found: list[bytes] | str = [self._store.get(f"{here}item/{each}") for each in range(self._size)]
        except RankGone as error:
            found = str(error)
        answer = zlib.compress(pickle.dumps(found), 1)
        self._store.set(f"{here}all", answer)
        for each in range(self._size):
            self._store.delete_key(f"{here}item/{each}")
        self._store.delete_key(f"{self._round - 1}/all")  # all have read it, or they had not come
        return answer

    def _looks(self) -> bool:
        """Wait a little; whether it is time to look after those that are missing."""
        time.sleep(_POLL)
        now = time.monotonic()
        if now < self._looked + BEAT:
            return False
        self._looked = now
        return True

    def _require_beating(self, awaited: Iterable[int]) -> None:
        now = time.monotonic()
        for rank in awaited:
            beats = self._store.add(f"heart/{rank}", 0)
            before, since = self._hearts.get(rank, (-1, now))
            self._hearts[rank] = (beats, now if beats != before else since)
            if beats == before and now - since > self._patience:
                self._gone.append(rank)
        if self._gone:
            raise RankGone(f"the process of rank {self._gone[0]} has not answered for {self._patience:.0f} s")

    def close(self) -> None:
        """Leave; the rank that holds the store waits a moment for the others to have read what they need."""
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.add("left", 1)
                end = time.monotonic() + min(LEAVING, self._patience)
                others = self._size - len(self._gone)
                while self._rank == 0 and self._store.add("left", 0) < others and time.monotonic() < end:
                    time.sleep(_POLL)
                if self._rank == 0:
                    self._store.delete_key(f"{self._round}/all")
        self._ended.set()
