"""Trainings that are killed: processes forked from one that has imported everything, so that a start takes a second."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.ranks import FORKS, free_port

SHAPES = [(24, 12), (12, 24), (16, 16), (10, 14)]
STEPS = 9
SAVE_EVERY = 2
TIMEOUT = 30.0  # seconds, of the collectives
SETTINGS = {"lr": 0.02, "rank": 3, "update_proj_gap": 3, "alpha": 0.5}
# Raised by Python before each of these; os.replace is a rename.
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree")


@dataclass(frozen=True)
class Kill:
    """How one rank kills itself.

    Attributes:
        operation: at which of its operations on files of the checkpoint folder, from 1; None for none.
        torn: behind which file that it writes to, from 1, after cutting that in half; None for none.
        signal: which one; SIGSTOP freezes it instead.
    """

    operation: int | None = None
    torn: int | None = None
    signal: int = signal.SIGKILL


class Run:
    """A training of some ranks in processes of their own, and what they leave.

    Args:
        folder: for checkpoints (`state`), `log-RANK.txt` and `final-RANK.pt`.
        kills: by rank, how it kills itself.
        world_size: processes.
        function: of this module, or by its module's name, called on every rank with the folder.
        timeout: seconds, of the collectives.
        **arguments: further ones of the function.
    """

    def __init__(
        self,
        folder: Path,
        kills: dict[int, Kill] | None = None,
        world_size: int = 2,
        function: str = "train",
        timeout: float = TIMEOUT,
        **arguments: Any,
    ) -> None:
        self.folder, port = folder, free_port()
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            kill = (kills or {}).get(rank, Kill())
            given = (function, rank, world_size, port, str(folder), kill, timeout, arguments)
            process = FORKS.Process(target=_start, args=given, daemon=True)
            process.start()
            self.processes.append(process)

    def wait_for_training(self, limit: float = 100.0) -> None:
        """Wait until rank 0 has built its engine."""
        end = time.monotonic() + limit
        while "starting at step" not in self.log(0) and time.monotonic() < end:
            time.sleep(0.001)

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
        path = self.folder / f"log-{rank}.txt"
        return path.read_text() if path.exists() else ""


def _start(
    function: str,
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    kill: Kill,
    timeout: float,
    arguments: dict[str, Any],
) -> None:
    with open(f"{folder}/log-{rank}.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    import ds_fira

    torch.set_num_threads(1)
    try:
        if "namespace" in arguments:
            _join_namespace(arguments.pop("namespace"))  # before there are threads
        ds_fira.init_distributed(timeout=timeout)
        count = _arm(kill, f"{folder}/state")
        module, _, name = function.rpartition(".")
        getattr(importlib.import_module(module or __name__), name)(folder, **arguments)
        ds_fira.shutdown()
        print("file operations and saves:", *count, flush=True)
    except Exception:
        # As at the end of a script; multiprocessing would print the traceback alone.
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


def _join_namespace(process: int) -> None:
    """See the mounts that another process sees."""
    with open(f"/proc/{process}/ns/mnt") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x00020000) != 0:
            raise OSError(ctypes.get_errno(), "setns failed")


def _arm(kill: Kill, watched: str) -> list[int]:
    """Let this process kill itself when its time has come; returns its counts of file operations and of saves."""
    from ds_fira.checkpoint.outgoing import Outgoing

    count = [0, 0]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(watched):
            count[0] += 1
            if count[0] == kill.operation:
                os.kill(os.getpid(), kill.signal)

    sys.addaudithook(watch)
    write = Outgoing.write

    def tear(file: Outgoing, folder: Path, *args: Any) -> Any:
        written = write(file, folder, *args)
        count[1] += 1
        if count[1] == kill.torn:
            os.truncate(folder / file.name, os.path.getsize(folder / file.name) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    Outgoing.write = tear
    return count


def slow_disk(seconds: float) -> None:
    """Let every write of a checkpoint's bytes in this process take longer: no file system can be slowed down here."""
    from ds_fira.checkpoint import ranged_file

    write_at = ranged_file.write_at

    def write_slowly(*args: Any) -> int:
        time.sleep(seconds)
        return write_at(*args)

    ranged_file.write_at = write_slowly


def train(folder: str, stage: int = 2, pause: float = 0.0, **settings: Any) -> None:
    """Train from the newest complete checkpoint in `folder / "state"` to the last step, saving on the way.

    Every second checkpoint is saved under one name, over the one that is there.

    Args:
        folder: see `Run`.
        stage: of ZeRO.
        pause: seconds that each write takes longer.
        **settings: further ones of the optimizer.
    """
    import torch

    from ds_fira.optim.registry import fira_of
    from tests.distributed.zero_jobs import batches, build, config

    if pause:
        slow_disk(pause)
    engine = build(config(stage, "bf16", SETTINGS | settings), SHAPES)
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
    weights = [param.detach().clone() for param in params]
    torch.save({"weights": weights, "state": state, "module": module}, f"{folder}/final-{rank}.pt")
    del optimizer
    engine.destroy()


def run_out_of_room(folder: str) -> None:
    """Save, fail to save where one rank may write no more, go on, save again; `seen-RANK.json` says what happened."""
    import resource

    import torch

    rank = torch.distributed.get_rank()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))

    def free() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    return _save_thrice(folder, f"{folder}/limited", fill, free)


def fill_the_disk(folder: str, disk: str) -> None:
    """The same on a disk that is really full: `disk` is a small tmpfs."""
    import torch

    filler = Path(disk) / "filler"

    def fill() -> None:
        if torch.distributed.get_rank() == 0:
            room = os.statvfs(disk)
            filler.write_bytes(bytes(room.f_bavail * room.f_frsize - 20_000))

    def free() -> None:
        if torch.distributed.get_rank() == 0:
            filler.unlink()

    return _save_thrice(folder, f"{disk}/state", fill, free)


def _save_thrice(folder: str, state: str, fill: Any, free: Any) -> None:
    import torch

    from ds_fira.checkpoint.atomic_save import CheckpointError
    from ds_fira.checkpoint.tag_folder import LOCK, read_latest
    from tests.distributed.zero_jobs import batches, build, config

    rank, seen = torch.distributed.get_rank(), {"error": None}
    engine = build(config(2, "bf16", SETTINGS), SHAPES)
    tokens = iter(batches(6, rank))

    def step() -> None:
        engine.backward(engine(next(tokens)))
        engine.step()

    def look() -> list[Any]:
        torch.distributed.barrier()
        return [read_latest(Path(state)), sorted({path.name for path in Path(state).iterdir()} - {LOCK})]

    step()
    engine.save_checkpoint(state, "kept")
    seen["before"] = look()
    step()
    fill()
    torch.distributed.barrier()
    try:
        engine.save_checkpoint(state, "kept")
    except CheckpointError as error:
        seen["error"] = str(error)
    seen["after"] = look()
    free()
    torch.distributed.barrier()
    seen["step"] = [engine.load_checkpoint(state, "kept")[0] is not None, engine.global_steps]
    step()
    engine.save_checkpoint(state, "next")
    seen["end"] = look()
    Path(f"{folder}/seen-{rank}.json").write_text(json.dumps(seen))
    engine.destroy()
