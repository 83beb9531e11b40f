"""The worker process that makes a rank's batches while the rank trains: torchdata's `StatefulDataLoader`."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import warnings
from collections.abc import Iterator

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from .documents import DataError
from .rows import Rows, State

PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Loader:
    """Micro-batches made in the background, `depth` of them ahead, each with the state of `rows` after it.

    The loader's own state belongs to one rank and one number of workers. What the rows said in the worker is taken out
    of it, since a stream may go on on another number of ranks.
    """

    def __init__(self, rows: Rows, depth: int) -> None:
        """Start the worker."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 calls it
            self._loader = StatefulDataLoader(
                rows,
                batch_size=None,  # rows come as batches
                num_workers=1,
                prefetch_factor=depth,
                worker_init_fn=begin_worker,
                multiprocessing_context="fork",  # at once, with the files and the tokenizer that are open
            )
        self._batches: Iterator[torch.Tensor | str] = iter(self._loader)

    def get(self) -> tuple[torch.Tensor, State]:
        """The next micro-batch, and the state of the rows after it.

        Raises:
            DataError: it cannot be made.
        """
        batch = next(self._batches)
        if isinstance(batch, str):
            raise DataError(batch)
        (worker,) = self._loader.state_dict()["_snapshot"]["_worker_snapshots"].values()
        return batch, worker["dataset_state"]

    def close(self) -> None:
        """End the worker; one that hangs, in a slow network say, is stopped after five seconds."""
        self._loader, self._batches = None, iter(())


def begin_worker(number: int) -> None:
    """Bind the worker to its rank, of which it is a fork.

    It dies with the rank, at once: its copies of the rank's sockets would let the other ranks wait for one that was
    killed. A SIGTERM for all processes of a job is the rank's to answer, which saves first.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with_rank, daemon=True).start()
    # A fork has none of the tokenizer's threads, of which it would warn.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def end_with_rank() -> None:
    """End the worker at the first SIGTERM that comes from its rank."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
