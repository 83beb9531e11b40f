"""Fresh processes for every cell: ranks that talk over gloo or NCCL, and what became of them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from .grid import Cell, Run

# Imported once and shared by all forks; the last three are what DeepSpeed and transformers import late.
PRELOAD = [
    *("torch", "deepspeed", "memory.measure", "memory.report", "benchmarks.common", "tqdm"),
    *("torch._dynamo", "torch._inductor.compile_fx", "transformers.models.llama.modeling_llama"),
]
# Seconds that the others get to report, once one rank has failed: they may wait for it in a collective.
GRACE = 5.0


def run_cell(cell: Cell, run: Run, log: Path, timeout: float) -> dict[str, Any]:
    """Measure a cell in processes of its own.

    Args:
        cell: what is measured.
        run: what is the same for all.
        log: gets everything that the ranks print.
        timeout: seconds.

    Returns:
        `status`: `ok`, `refused`, `out of memory` or `failed`; `reason` unless ok; `ranks`, what `measure` returned.
    """
    # A forked process on a GPU would inherit a CUDA that does not work; on a CPU forks share the imports.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload(PRELOAD)
    port = _free_port()
    processes, connections = [], []
    for rank in range(run.processes):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(rank, port, cell, run, str(log), theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        connections.append(ours)
    outcomes = _collect(connections, timeout)
    for process in processes:
        process.join(GRACE if len(outcomes) == run.processes else 0)
        if process.is_alive():
            process.kill()
            process.join()
    return _verdict(outcomes, [process.exitcode for process in processes], timeout)


def _collect(connections: list[Connection], timeout: float) -> dict[int, tuple[str, Any]]:
    """What the ranks sent, by rank; a rank that ended without a word is left out."""
    outcomes: dict[int, tuple[str, Any]] = {}
    waiting = dict(enumerate(connections))
    until = time.monotonic() + timeout
    while waiting and (left := until - time.monotonic()) > 0:
        ready = wait(list(waiting.values()), timeout=left)
        for rank in [rank for rank, connection in waiting.items() if connection in ready]:
            try:
                outcomes[rank] = waiting.pop(rank).recv()
                failed = outcomes[rank][0] != "ok"
            except EOFError:
                failed = True
            if failed:
                until = min(until, time.monotonic() + GRACE)
    return outcomes


def _verdict(outcomes: dict[int, tuple[str, Any]], codes: list[int | None], timeout: float) -> dict[str, Any]:
    for status in ("refused", "out of memory", "failed"):
        said = [value for kind, value in outcomes.values() if kind == status]
        if said:
            return {"status": status, **said[0]}
    if len(outcomes) == len(codes):
        return {"status": "ok", "ranks": [outcomes[rank][1] for rank in sorted(outcomes)]}
    if any(code == -9 for rank, code in enumerate(codes) if rank not in outcomes) and not outcomes:
        return {"status": "failed", "reason": f"killed, for want of host memory or after {timeout:.0f} s"}
    return {"status": "failed", "reason": f"processes ended with {codes} or were stopped after {timeout:.0f} s"}


def _rank(rank: int, port: int, cell: Cell, run: Run, log: str, connection: Connection) -> None:
    """The whole life of one process."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run.processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import ds_fira

    from .measure import RefusedError, measure

    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // run.processes))
    try:
        ds_fira.init_distributed()
        connection.send(("ok", measure(cell, run)))
        ds_fira.shutdown()
    except RefusedError as error:
        connection.send(("refused", {"reason": one_sentence(str(error))}))
    except Exception as error:
        traceback.print_exc()
        memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        found: dict[str, Any] = {"reason": one_sentence(f"{type(error).__name__}: {error}")}
        if torch.cuda.is_available():
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        connection.send(("out of memory" if memory else "failed", found))
    sys.stdout.flush()


def one_sentence(text: str) -> str:
    """The sentence of a message that tells most: what could not be allocated, or else the first one."""
    sentences = text.removeprefix("FiraAdam: ").split("\n")[0].split(". ")
    return next((words for words in sentences if "allocate" in words), sentences[0]).rstrip(".")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
