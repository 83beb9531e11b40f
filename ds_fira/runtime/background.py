"""Do one thing at a time in a thread, behind a training that goes on; the end of the process waits for it.

What is done from behind here sums and writes bytes: calls that do not hold Python's lock. So a thread is enough, and
needs no second copy of anything, as a forked process would on its first write to each page.
"""

from __future__ import annotations

import _thread
import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import util
from typing import Generic, TypeVar

T = TypeVar("T")
_running: weakref.WeakSet[Background[object]] = weakref.WeakSet()
_registered_in = 0  # the process whose end waits


class Background(Generic[T]):
    """One call in a thread.

    Args:
        function: what is called.
        hurry: called when the process ends meanwhile, such as to wait less for others.
    """

    def __init__(self, function: Callable[[], T], hurry: Callable[[], None] | None = None) -> None:
        self._function, self._hurry = function, hurry
        self._found: T | None = None
        self._error: BaseException | None = None
        self._told = False
        self._done = threading.Event()
        _wait_at_the_end()
        _running.add(self)
        # Not `threading.Thread`, whose start waits until the thread has run: the training would wait with it.
        _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        try:
            self._found = self._function()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()
            _running.discard(self)

    @property
    def done(self) -> bool:
        """Whether the call has ended, well or not."""
        return self._done.is_set()

    def wait(self) -> float:
        """Wait for the end of the call; returns the seconds that this took."""
        began = time.monotonic()
        self._done.wait()
        return time.monotonic() - began

    def result(self) -> T:
        """What the call returned; waits for it.

        Raises:
            BaseException: what the call raised.
        """
        self._done.wait()
        self._told = True
        if self._error is not None:
            raise self._error
        return self._found

    def end(self, hurry: bool) -> None:
        """Wait at the end of the process, and say what went wrong, since nobody will ask any more."""
        if hurry and self._hurry is not None and not self.done:
            self._hurry()
        self._done.wait()
        if self._error is not None and not self._told:
            print(self._error, file=sys.stderr, flush=True)


def _wait_at_the_end() -> None:
    """Let the end of this process wait; a process of `multiprocessing` calls none of `atexit`'s functions."""
    global _registered_in
    if _registered_in != os.getpid():
        _registered_in = os.getpid()
        _running.clear()  # of the process that this one was forked from
        atexit.register(end_all, True)
        util.Finalize(None, end_all, (True,), exitpriority=100)


def end_all(hurry: bool = False) -> None:
    """Wait for everything that is under way in this process.

    Args:
        hurry: less long for other processes that do not answer.
    """
    for each in list(_running):
        each.end(hurry)
