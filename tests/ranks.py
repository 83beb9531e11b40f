"""Real processes over gloo for the tests: a pool of ranks that run a function all together.

Importing torch, DeepSpeed and transformers takes many seconds: ranks are forked from one process that has done so. A
pool of one size is started once and reused. A rank that raises ends its pool, since the others may wait for it in a
collective; the next test gets a new one.

Ranks answer in bytes: multiprocessing itself would open a file and a socket for every tensor, which took most of the
time of most tests. torch.save would write a record of a zip file for each.
"""

from __future__ import annotations

import faulthandler
import importlib
import io
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
import warnings
from multiprocessing import forkserver, resource_tracker, util
from typing import Any

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])
# A forked process on a GPU would inherit a CUDA that does not work.
START = multiprocessing.get_context("spawn") if torch.cuda.is_available() else FORKS
TIMEOUT = 240.0  # seconds for one job, which only a pool that hangs or a very busy machine needs


class RankError(AssertionError):
    """What the ranks of a pool raised, by rank."""

    def __init__(self, errors: dict[int, tuple[str, str]]) -> None:
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, (_, text) in errors.items()))
        self.messages = {rank: message for rank, (message, _) in errors.items()}


def preload() -> None:
    """Import what ranks will need, and fork the process that ranks are forked from.

    This process needs most of it too. `multiprocessing` would start a new interpreter, which imports for ten seconds
    again.
    """
    if START is not FORKS:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tests.preloaded  # noqa: F401

    spawn = util.spawnv_passfds

    def fork(path: bytes, arguments: list[Any], kept: list[int]) -> int:
        code = os.fsdecode(arguments[-1])
        if "multiprocessing.forkserver" not in code:  # the tracker of shared memory
            return spawn(path, arguments, kept)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _become_an_interpreter(code, kept)
        return child

    util.spawnv_passfds = fork
    try:
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = spawn


def _become_an_interpreter(code: str, kept: list[int]) -> None:
    """Run code as `python -c` does, in a fork of a process that runs pytest, without that one's files and hooks.

    What it prints, such as the progress of a download, goes nowhere rather than among pytest's dots.
    """
    try:
        for own in (forkserver._forkserver, resource_tracker._resource_tracker):  # one holds its lock at this moment
            own.__init__()  # type: ignore[misc]
        faulthandler.disable()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
        sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
        # Kept, or their end would close a number that is another file's by then.
        before = [sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__]
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nowhere, number)
        first = 3
        for number in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
            os.closerange(first, number)
            first = number + 1
        sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        exec(code, {"__name__": "__main__", "before": before})
    finally:
        os._exit(0)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Packer(pickle.Pickler):
    """Writes a plain tensor as its bytes, and leaves any other to torch."""

    def reducer_override(self, value: Any) -> Any:
        """What makes the value again."""
        plain = type(value) is torch.Tensor and value.device.type == "cpu" and value.layout is torch.strided
        if not plain or value.requires_grad or value.is_complex() or value.is_neg() or value.is_quantized:
            return NotImplemented
        if vars(value) or not value.is_contiguous():
            return NotImplemented
        return _tensor, (value.dtype, tuple(value.shape), bytearray(value.reshape(-1).view(torch.uint8).numpy()))


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], content: bytearray) -> torch.Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    # Cloned into memory of torch's own, whose alignment its kernels count on.
    return torch.frombuffer(content, dtype=dtype).reshape(shape).clone()


def packed(value: Any) -> bytes:
    """The bytes from which `pickle.loads` makes a value with tensors again."""
    file = io.BytesIO()
    _Packer(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _serve(rank: int, world_size: int, port: int, connection: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR=os.environ.get("DS_ACCELERATOR", "cpu"),
    )
    torch.set_num_threads(1)
    import ds_fira

    ds_fira.init_distributed()
    while True:
        job = connection.recv()
        if job is None:
            ds_fira.shutdown()
            return
        module, function, arguments = job
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = getattr(importlib.import_module(module), function)(**arguments)
            connection.send((True, packed(result)))
        except Exception as error:
            connection.send((False, (f"{type(error).__name__}: {error}", traceback.format_exc())))


class Pool:
    """`world_size` processes that have started torch.distributed."""

    def __init__(self, world_size: int) -> None:
        port = free_port()
        self.connections, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = START.Pipe()
            process = START.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, module: str, function: str, **arguments: Any) -> list[Any]:
        """Call a function on all ranks.

        Returns:
            What it returned, by rank.

        Raises:
            RankError: it raised, or did not end, on some rank.
        """
        for connection in self.connections:
            connection.send((module, function, arguments))
        results, errors = [], {}
        for rank, connection in enumerate(self.connections):
            # Where another rank has failed already, this one may wait for it in vain.
            if not connection.poll(5.0 if errors else TIMEOUT):
                errors[rank] = ("no answer", f"no answer within {TIMEOUT} s")
                continue
            ok, value = connection.recv()
            if ok:
                results.append(pickle.loads(value))
            else:
                errors[rank] = value
        if errors:
            raise RankError(errors)
        return results

    @property
    def alive(self) -> bool:
        """Whether every process still runs."""
        return all(process.is_alive() for process in self.processes)

    def end(self) -> None:
        """Ask the processes to end as a script does; `close` waits for it."""
        for connection, process in zip(self.connections, self.processes, strict=True):
            if process.is_alive():
                connection.send(None)

    def close(self, kill: bool = False) -> None:
        """End the processes."""
        if kill:
            for process in self.processes:
                process.kill()
        for process in self.processes:
            process.join(20)
            process.kill()


class Pools:
    """Pools by world size, started when first asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def run(
        self, world_size: int, function: str, module: str = "tests.distributed.zero_jobs", **arguments: Any
    ) -> list[Any]:
        """Call a function on all ranks of the pool of a size; see `Pool.run`."""
        pool = self._pools.get(world_size)
        if pool is None or not pool.alive:
            pool = self._pools[world_size] = Pool(world_size)
        try:
            return pool.run(module, function, **arguments)
        except RankError:
            self._pools.pop(world_size).close(kill=True)
            raise

    def processes(self, world_size: int) -> list[Any]:
        """The processes of the pool of a size, by rank; it has to run."""
        return self._pools[world_size].processes

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.end()
        for pool in self._pools.values():
            pool.close()
