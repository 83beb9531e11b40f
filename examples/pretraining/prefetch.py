"""Batches made in the background, so that training does not wait for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

CLOSE_SECONDS = 10.0


class Prefetcher:
    """Runs an endless iterator in a thread, a bounded number of items ahead.

    A thread, not a process: tokenising, decompressing and parsing leave Python's lock free, so it takes about as little
    from training as a process would (docs/data.md has the measurement), starts at once, and dies with its process.

    Attributes:
        waiting_seconds: time that `get` spent waiting.
    """

    def __init__(self, items: Iterator[Any], depth: int) -> None:
        """Start the thread; `depth` items are kept ready."""
        self.waiting_seconds = 0.0
        self._items = items
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="data", daemon=True)
        self._thread.start()

    def get(self) -> Any:
        """The next item.

        Raises:
            Exception: what the iterator raised, once all items before it were handed out, and at every call after.
        """
        began = time.perf_counter()
        item, error = self._queue.get()
        self.waiting_seconds += time.perf_counter() - began
        if error is not None:
            self._queue.put((None, error))  # the thread has ended, so there is room
            raise error
        return item

    def close(self) -> None:
        """End the thread; one that hangs, in a slow network say, is left to end with its process."""
        self._stop.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            # Where it waits for room, let it find some.
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)

    def _work(self) -> None:
        try:
            for item in self._items:
                self._queue.put((item, None))
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._queue.put((None, error))
