"""One sentence where a process ends because it lost another one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType

import torch.distributed

# gloo raises RuntimeError with these; NCCL and the store raise torch.distributed.DistError.
_SIGNS = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Socket Timeout", "Connection refused")

# Called with the error that ends the process, and whether it says that contact was lost; the cause where it is known.
Tell = Callable[[BaseException, bool], str | None]
_tell: list[Tell] = []


def is_lost_contact(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that another process is gone or does not answer."""
    while error is not None:
        if isinstance(error, torch.distributed.DistError):
            return True
        if isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def tell_lost_contact(tell: Tell | None = None) -> None:
    """Let this process, if such an error ends it, say so after the traceback; calling it again has no effect.

    Args:
        tell: also asked, whatever error ends the process, for the cause.
    """
    if tell is not None and tell not in _tell:
        _tell.append(tell)
    before = sys.excepthook
    if getattr(before, "_tells_lost_contact", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        before(kind, error, traceback)
        lost = is_lost_contact(error)
        causes = [cause for each in _tell if (cause := each(error, lost)) is not None]
        if lost and not getattr(error, "says_why", False):
            told = (
                causes[0]
                if causes
                else (
                    "see what the first one to end printed, and start the training again from its newest complete "
                    "checkpoint."
                )
            )
            print(
                f"ds_fira: rank {os.environ.get('RANK', '0')} ends because another process ended or did not answer in "
                f"time: {told}",
                file=sys.stderr,
                flush=True,
            )

    hook._tells_lost_contact = True
    sys.excepthook = hook
