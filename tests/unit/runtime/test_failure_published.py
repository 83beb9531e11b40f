"""A failure is told whatever the thread that looks for failures of others does at that moment."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import torch

from ds_fira.runtime.lost_peer import POLL, Peers


class SlowStore:
    """A real store that takes its time after a failure is counted, so that the thread looks in between."""

    def __init__(self, store: torch.distributed.Store) -> None:
        self.store = store

    def add(self, key: str, number: int) -> int:
        found = self.store.add(key, number)
        if key == "failures" and number:
            time.sleep(4 * POLL)
        return found

    def set(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        return self.store.get(key)


def test_the_thread_that_looks_keeps_no_failure_from_being_told() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    peers = Peers(SimpleNamespace(size=lambda: 1), SlowStore(store), rank=0)
    peers.start()
    telling = threading.Thread(target=peers.publish, args=("step 3", "rank 0 failed"), daemon=True)
    telling.start()
    telling.join(4 * POLL + 5.0)
    ended = not telling.is_alive()
    peers._ending.set()
    assert ended, "the thread waits in the store for what it keeps from being written"
    assert b"rank 0 failed" in store.get("failure/1")
