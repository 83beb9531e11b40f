"""Trainings that are killed: processes forked from one that has imported everything, so that a start takes a second."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.distributed import free_port

SHAPES = [(24, 12), (12, 24), (16, 16), (10, 14)]
STEPS = 9
SAVE_EVERY = 2
TIMEOUT = 30.0  # seconds, of the collectives
SETTINGS = {"lr": 0.02, "rank": 3, "update_proj_gap": 3, "alpha": 0.5}
# Raised by Python before each of these; os.replace is a rename.
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree")

_context = multiprocessing.get_context("forkserver")
# The last brings what an engine imports when it is built: torch's compiler, most of the seconds of a start.
_context.set_forkserver_preload(["ds_fira", "tests.zero_jobs", "deepspeed.runtime.zero.muon.muon_optimizer"])


@dataclass(frozen=True)
class Kill:
    """How one rank kills itself.

    Attributes:
        operation: at which of its operations on files of the checkpoint folder, from 1; None for none.
        torn: at which of its calls of torch.save, from 1, after cutting the file in half; None for none.
    """

    operation: int | None = None
    torn: int | None = None


class Run:
    """A training of some ranks in processes of their own, and what they leave.

    Args:
        folder: for checkpoints (`state`), `log-RANK.txt` and `final-RANK.pt`.
        kills: by rank, how it kills itself.
        world_size: processes.
        function: of this module, called on every rank with the folder.
    """

    def __init__(
        self, folder: Path, kills: dict[int, Kill] | None = None, world_size: int = 2, function: str = "train"
    ) -> None:
        self.folder, port = folder, free_port()
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            kill = (kills or {}).get(rank, Kill())
            arguments = (function, rank, world_size, port, str(folder), kill)
            process = _context.Process(target=_start, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self, limit: float = 100.0) -> tuple[list[int | None], float]:
        """Wait for all; returns the exit status by rank, negative for a signal, and seconds from the first end on."""
        end, first = time.monotonic() + limit, None
        while any(process.exitcode is None for process in self.processes) and time.monotonic() < end:
            if first is None and any(process.exitcode is not None for process in self.processes):
                first = time.monotonic()
            time.sleep(0.002)
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return statuses, time.monotonic() - (first or time.monotonic())

    def log(self, rank: int) -> str:
        """What a rank printed."""
        return (self.folder / f"log-{rank}.txt").read_text()


def _start(function: str, rank: int, world_size: int, port: int, folder: str, kill: Kill) -> None:
    with open(f"{folder}/log-{rank}.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    import ds_fira

    torch.set_num_threads(1)
    ds_fira.init_distributed(timeout=TIMEOUT)
    _arm(kill, f"{folder}/state")
    try:
        globals()[function](folder)
        ds_fira.shutdown()
    except Exception:
        # As at the end of a script; multiprocessing would print the traceback alone.
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


def _arm(kill: Kill, watched: str) -> None:
    """Let this process kill itself when its time has come."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    operations = saves = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal operations
        if event in FILE_EVENTS and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(watched):
            operations += 1
            if operations == kill.operation:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill.operation is not None:
        sys.addaudithook(watch)
    write = TorchCheckpointEngine.save

    def tear(engine: Any, state_dict: Any, path: str) -> None:
        nonlocal saves
        write(engine, state_dict, path)
        saves += 1
        if saves == kill.torn:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    TorchCheckpointEngine.save = tear


def train(folder: str) -> None:
    """Train from the newest complete checkpoint in `folder / "state"` to the last step, saving on the way.

    Every second checkpoint is saved under one name, over the one that is there.
    """
    import torch

    from ds_fira.zero import fira_of
    from tests.zero_jobs import batches, build, config

    engine = build(config(2, "bf16", SETTINGS), SHAPES)
    rank = torch.distributed.get_rank()
    loaded, client_state = engine.load_checkpoint(f"{folder}/state")
    start = client_state["step"] if loaded else 0
    print(f"starting at step {start} from {loaded}", flush=True)
    for step, tokens in enumerate(batches(STEPS, rank)[start:], start + 1):
        engine.backward(engine(tokens))
        engine.step()
        if step % SAVE_EVERY == 0:
            tag = "again" if step % (2 * SAVE_EVERY) == 0 else None
            print(f"saving {step}", flush=True)
            engine.save_checkpoint(f"{folder}/state", tag, client_state={"step": step})
            print(f"saved {step}", flush=True)
    optimizer = fira_of(engine)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [{key: value.clone() for key, value in optimizer.state[param].items()} for param in params]
    module = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    torch.save(
        {"weights": [p.detach().clone() for p in params], "state": state, "module": module}, f"{folder}/f.{rank}"
    )
    os.replace(f"{folder}/f.{rank}", f"{folder}/final-{rank}.pt")
    del optimizer
    engine.destroy()
