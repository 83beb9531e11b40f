"""One sentence where a process ends because it lost another one."""

from __future__ import annotations

import os
import sys
from types import TracebackType

import torch.distributed

# gloo raises RuntimeError with these; NCCL and the store raise torch.distributed.DistError.
_SIGNS = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Socket Timeout", "Connection refused")


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
    """Let this process, if such an error ends it, say so after the traceback; calling it again has no effect."""
    before = sys.excepthook
    if getattr(before, "_tells_lost_contact", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        before(kind, error, traceback)
        if is_lost_contact(error):
            print(
                f"ds_fira: rank {os.environ.get('RANK', '0')} ends because another process ended or did not answer in "
                "time: see what the first one to end printed, and start the training again from its newest complete "
                "checkpoint.",
                file=sys.stderr,
                flush=True,
            )

    hook._tells_lost_contact = True
    sys.excepthook = hook
