"""SIGTERM, as schedulers and spot machines send it: the loop saves and leaves, on every rank at the same step."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor


class Termination(AbstractContextManager["Termination"]):
    """Notices SIGTERM, and tells all ranks of it at the same step, whichever of them got it, and when.

    From its construction on the signal no longer ends the process at once. After every optimizer step the loop asks
    `requested`, on every rank. A handler that was there before is called as well.

        with ds_fira.Termination() as termination:
            for batch in batches:
                ...
                engine.step()
                if termination.requested():
                    engine.save_checkpoint(folder, client_state=...)
                    ds_fira.shutdown(engine)
                    sys.exit(termination.status)

    Args:
        number: of the signal.

    Attributes:
        status: to exit with, 128 and the signal's number, as a shell has it for a process that the signal ended: 143.

    Raises:
        ValueError: it is not made in the process's main thread, the only one in which Python takes signals.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "ds_fira.Termination: it was made in another thread, where Python takes no signals; make it in the "
                "main thread, before the loop."
            )
        self.status = 128 + number
        self._number = number
        self._received = self._answered = False
        self._flag: SharedFlag | None = None
        self._open = True
        self._before = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        if callable(self._before):
            self._before(number, frame)

    def requested(self) -> bool:
        """Whether any rank has got the signal; a collective call, at the end of every optimizer step.

        With several ranks the answer to one call comes with the next, so that nobody waits for it: the loop makes one
        or two more steps after the signal.

        Returns:
            The same on every rank.
        """
        answer = self._received
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._flag = self._flag or SharedFlag()
            answer = self._flag.ask(answer)
        self._answered = self._answered or answer
        return answer

    def close(self) -> None:
        """Give the signal back to whom it belonged; one that came, and that no `requested` told of, comes again."""
        if not self._open:
            return
        self._open = False
        signal.signal(self._number, signal.SIG_DFL if self._before is None else self._before)
        if self._received and not self._answered and not callable(self._before):
            os.kill(os.getpid(), self._number)

    def __exit__(self, *_: object) -> None:
        self.close()


class SharedFlag:
    """Whether any rank has said yes: asked at one call, answered at the next, so that no rank waits for another.

    Over gloo, also where the training communicates over NCCL: the host needs the answer.
    """

    def __init__(self) -> None:
        self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self._asked: tuple[Tensor, dist.Work] | None = None

    def forget(self) -> None:
        """Drop the answer to the last call; on every rank after the same one."""
        self._asked = None

    def ask(self, flag: bool) -> bool:
        """Say yes or no for this rank; a collective call.

        Args:
            flag: this rank's.

        Returns:
            Whether any rank said yes at the call before; the same on every rank.
        """
        answer = False
        if self._asked is not None:
            largest, work = self._asked
            work.wait()
            answer = bool(largest.item())
        mine = torch.tensor([int(flag)], dtype=torch.int32)
        work = dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = (mine, work)
        return answer
