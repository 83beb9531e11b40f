"""What ranks run to save from behind, together, and where a disk or a folder is gone."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger
from torch import distributed as dist

import ds_fira
from ds_fira.checkpoint import ranged_file
from ds_fira.checkpoint.manifest import MANIFEST, find_damage, find_fault
from ds_fira.engine.deepspeed.save_load.behind import Behind
from ds_fira.runtime.meeting import Meeting
from tests.distributed.crash_jobs import SETTINGS, SHAPES, slow_disk
from tests.distributed.save_jobs import attempt, engine_of, step, weights
from tests.distributed.zero_jobs import batches, build, config

# Large enough that what is not tensors does not count: 1.2 million parameters.
LARGE = [(512, 256)] * 6 + [(256, 640)] * 2 + [(96, 512)] * 2
STEPS = 200


def written_by(process: int) -> int:
    """Bytes that a process has handed to the system to be written, as the system counts them."""
    lines = Path(f"/proc/{process}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def count_written(folder: str, stage: int, dtype: str, async_save: bool) -> dict[str, Any]:
    """Save; what the next rank has written meanwhile, as this one sees it from outside, and the files."""
    rank, size = dist.get_rank(), dist.get_world_size()
    processes: list[Any] = [None] * size
    dist.all_gather_object(processes, os.getpid())
    # The kernel counts what goes to other ranks too: at stage 3 DeepSpeed gathers small parameters again after a save.
    extra = {"zero_stage3_param_persistence_threshold": 0} if stage == 3 else {}
    engine = build(config(stage, dtype, SETTINGS | {"rank": 8, "async_save": async_save}, **extra), LARGE)
    step(engine)
    watched = (rank + 1) % size
    dist.barrier()
    before = written_by(processes[watched])
    engine.save_checkpoint(folder, "a")
    Behind.of(engine).wait(engine, "the test")
    dist.barrier()
    seen = {"rank": watched, "written": written_by(processes[watched]) - before}
    kept = weights(engine)
    engine.destroy()
    at = Path(folder) / "a"
    seen["files"] = {path.name: path.stat().st_size for path in sorted(at.glob("*.pt"))}
    seen["damage"] = find_fault(at) or find_damage(at)
    if rank == 0:
        seen["bad records"] = [path.name for path in at.glob("*.pt") if zipfile.ZipFile(path).testzip() is not None]
        seen["mapped"] = all(
            isinstance(torch.load(path, mmap=True, weights_only=False), dict) for path in at.glob("*.pt")
        )
        if stage < 3:
            module = torch.load(at / "mp_rank_00_model_states.pt", weights_only=False)["module"]
            seen["weights"] = all(torch.equal(a, b) for a, b in zip(module.values(), kept, strict=True))
    return seen


def save_behind(folder: str, stage: int, dtype: str) -> dict[str, Any]:
    """Save from behind and train on; what a load gives back, what was said, and which checkpoints are left."""
    told: list[str] = []
    original, logger.info = logger.info, lambda text, *args, **kwargs: told.append(text)
    events: list[Any] = []
    write_at = ranged_file.write_at
    try:
        engine = build(config(stage, dtype, SETTINGS | {"async_save": True, "keep_last": 2}), SHAPES)
        engine.monitor.enabled, engine.monitor.write_events = True, events.extend
        step(engine)
        slow_disk(0.01)
        for tag in ("first", "second", "third"):
            engine.save_checkpoint(folder, tag)
            kept, at, steps = weights(engine), engine.global_steps, 0
            while Behind.of(engine).under_way is not None:
                step(engine)
                steps += 1
        seen: dict[str, Any] = {"steps": steps, "left": sorted(path.name for path in Path(folder).iterdir())}
        engine.save_checkpoint(folder, "fourth", save_latest=False)
        engine.save_checkpoint(folder, "fifth", save_latest=False)
        path, _ = engine.load_checkpoint(folder)
        seen |= {"path": str(path), "at": engine.global_steps == at, "latest": (Path(folder) / "latest").read_text()}
        seen["weights"] = all(torch.equal(a, b) for a, b in zip(weights(engine), kept, strict=True))
        seen["damage"] = find_damage(Path(folder) / "third")
        engine.save_checkpoint(folder, "last")
        engine.destroy()
    finally:
        logger.info, ranged_file.write_at = original, write_at
    dist.barrier()
    seen["fault"] = find_fault(Path(folder) / "last")
    seen["told"] = [text for text in told if "FiraAdam" in text]
    seen["events"] = sorted({name for name, *_ in events if "save" in name})
    return seen


def step_until_told(engine: Any) -> tuple[int, str | None]:
    """Steps until one raises, and what."""
    for number in range(STEPS):
        _, error = attempt(step, engine)
        if error is not None or Behind.of(engine).under_way is None:
            return number, error
    return STEPS, "nothing"


def fail_behind(folder: str, stage: int) -> dict[str, Any]:
    """Saves from behind that a file limit of one rank, a vanished folder and a pickle end; the training goes on."""
    rank, results, write_at = dist.get_rank(), {}, ranged_file.write_at
    at = Path(folder)
    with engine_of(stage) as engine:
        engine.basic_optimizer.saving = engine.basic_optimizer.saving._replace(async_save=True)
        engine.save_checkpoint(folder, "kept")
        Behind.of(engine).wait(engine, "the test")
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        _, results["the former"] = attempt(engine.save_checkpoint, folder, "full")
        results["full"] = step_until_told(engine)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        slow_disk(0.3)
        engine.save_checkpoint(folder, "vanished")
        if rank == 0:
            while not list(at.glob(".saving-vanished/*.pt")):
                time.sleep(0.01)
            shutil.rmtree(at / ".saving-vanished", ignore_errors=True)
        results["vanished"] = step_until_told(engine)
        ranged_file.write_at = write_at
        engine.save_checkpoint(folder, "bad", client_state={"f": (lambda: 0) if rank == 0 else 0})
        _, results["at the next save"] = attempt(engine.save_checkpoint, folder, "next")
        engine.save_checkpoint(folder, "next")
        results["path"] = str(engine.load_checkpoint(folder)[0])
        engine.save_checkpoint(folder, "after", client_state={"f": (lambda: 0) if rank == 0 else 0})
        _, results["at the end"] = attempt(engine.destroy)
        dist.barrier()
    results["names"] = sorted(path.name for path in at.iterdir() if not path.name.startswith(".ds_fira"))
    return results


def disagree(folder: str) -> dict[str, Any]:
    """Saves from behind to which ranks give several tags, or for which one alone has other tensors than before."""
    rank, results = dist.get_rank(), {}
    with engine_of(checkpoint={"tag_validation": "Fail"}) as engine:
        engine.basic_optimizer.saving = engine.basic_optimizer.saving._replace(async_save=True)
        engine.save_checkpoint(folder, "alike")
        Behind.of(engine).wait(engine, "the test")
        engine.save_checkpoint(folder, f"rank {rank}")
        results["tags"] = step_until_told(engine)
        more = {} if rank == 0 else {"more": torch.ones(100)}
        hook = engine.module.register_state_dict_post_hook(lambda module, found, *_: found.update(more))
        engine.save_checkpoint(folder, "changed")
        results["changed"] = step_until_told(engine)
        engine.save_checkpoint(folder, "apart")
        kept = weights(engine)
        Behind.of(engine).wait(engine, "the test")
        hook.remove()
        results["path"] = str(engine.load_checkpoint(folder)[0])
        results["weights"] = all(torch.equal(a, b) for a, b in zip(weights(engine), kept, strict=True))
    results["names"] = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    return results


def leave(folder: str, stage: int) -> None:
    """Begin a save and end: nothing is destroyed, nothing waits but the end of the process."""
    slow_disk(0.05)
    engine = build(config(stage, "bf16", SETTINGS | {"async_save": True}), SHAPES)
    step(engine)
    engine.save_checkpoint(f"{folder}/state", "only")
    print("left", Path(folder, "state", "only", MANIFEST).exists(), flush=True)


def terminate(folder: str) -> None:
    """Train until SIGTERM comes, which finds a save under way; then save what there is, and leave with its status."""
    slow_disk(0.02)
    with ds_fira.Termination() as termination:
        engine = build(config(2, "bf16", SETTINGS | {"async_save": True}), SHAPES)
        print("starting at step 0", flush=True)
        tokens = batches(1, dist.get_rank())[0]
        while True:
            engine.backward(engine(tokens))
            engine.step()
            behind = Behind.of(engine)
            if behind.under_way is None:
                engine.save_checkpoint(f"{folder}/state", client_state={"step": engine.global_steps})
                print("saving", engine.global_steps, flush=True)
            if termination.requested():
                print("under way", behind.under_way is not None, flush=True)
                engine.save_checkpoint(f"{folder}/state", "end", client_state={"step": engine.global_steps})
                print("saved", engine.global_steps, flush=True)
                ds_fira.shutdown(engine)
                sys.exit(termination.status)


def stall(folder: str, stage: int, width: int, repeats: int = 9) -> list[tuple[float, float]]:
    """Processor seconds of this thread for a copy of the bytes that a save from behind copies, and for the save.

    Args:
        folder: of checkpoints.
        stage: of ZeRO.
        width: of 15 square matrices.
        repeats: pairs of both, in turn.
    """
    settings = {"lr": 1e-3, "rank": 128, "subspace": "randomized", "async_save": True, "keep_last": 1}
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(15)]).bfloat16()
    ds_config = config(stage, "bf16", settings)
    engine = deepspeed.initialize(model=model, config=ds_config, model_parameters=model.parameters())[0]
    behind, found = Behind.of(engine), []
    engine.backward(engine(torch.ones(1, width, dtype=torch.bfloat16)).float().square().mean())
    engine.step()
    engine.save_checkpoint(folder, "first")  # the system provides the pages
    behind.wait(engine, "the test")
    source = torch.ones(behind.copies.nbytes, dtype=torch.uint8)
    target = source.clone()
    for number in range(repeats):
        dist.barrier()
        began = time.thread_time()
        target.copy_(source)
        copied = time.thread_time()
        engine.save_checkpoint(folder, f"{number % 2}")
        found.append((copied - began, time.thread_time() - copied))
        behind.wait(engine, "the test")
    engine.destroy()
    return found


def meet(patience: float) -> dict[str, Any]:
    """Agree in a thread while the ranks make collectives; then with a rank that does not come."""
    rank, found = dist.get_rank(), []

    def agree() -> None:
        meeting = Meeting("the test")
        for number in range(20):
            found.append(meeting.gather_objects((rank, number)))
        meeting.close()

    thread = threading.Thread(target=agree)
    thread.start()
    total = torch.ones(1)
    for _ in range(50):
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
    thread.join()
    seen: dict[str, Any] = {"found": found, "total": float(total)}
    alone, before = Meeting("without one"), time.monotonic()
    alone._patience = patience
    if rank == dist.get_world_size() - 1:
        alone._ended.set()  # its heart stops, as of a process that is gone
    else:
        _, seen["error"] = attempt(alone.gather_objects, rank)
        seen["waited"] = time.monotonic() - before
        alone._ended.set()
    dist.barrier()
    return seen


def refuse() -> str | None:
    """What an engine says that is to save from behind in a format that cannot be laid out beforehand."""
    extra = {"checkpoint": {"checkpoint_serialization": False}}
    return attempt(build, config(2, "bf16", SETTINGS | {"async_save": True}, **extra), SHAPES)[1]
