"""What the ranks of a test pool run: loads from checkpoints that were harmed in many ways, with one engine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.distributed.corruptions import corrupt
from tests.distributed.probes import stepped_and_states
from tests.distributed.save_jobs import attempt, engine_of, recorded_warnings, step

TAGS = ("first", "second")


def held(engine: Any) -> list[Tensor]:
    """What a load has to bring back on this rank: master weights, states, and what the module computes with."""
    parts = [getattr(param, "ds_tensor", param) for param in engine.module.parameters()]
    return [*stepped_and_states(engine), *(part.detach() for part in parts)]


def load(engine: Any, folder: Path, tag: str | None, expected: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Load into an engine that holds something else; which checkpoint it holds then, by its tensors to the bit."""
    for tensor in held(engine):
        tensor.fill_(3)
    engine.global_steps = -1
    with recorded_warnings() as warnings:
        loaded, error = attempt(engine.load_checkpoint, str(folder), tag)
    now = held(engine)
    same = [name for name in TAGS if all(torch.equal(a, b) for a, b in zip(now, expected[name], strict=True))]
    path = None if error or loaded[0] is None else Path(loaded[0]).parent.name
    steps = engine.global_steps
    return {"path": path, "error": error, "holds": same, "steps": steps, "warnings": warnings}


def changed(folder: Path, pristine: Path) -> list[str]:
    """The names under which the newest checkpoint is not as it was saved; what was added to it does not count."""

    def differs(tag: str, name: str) -> bool:
        try:
            return (folder / tag / name).read_bytes() != (pristine / "second" / name).read_bytes()
        except OSError:
            return True

    names = os.listdir(pristine / "second")
    return [tag for tag in ("second", ".saving-second", ".replaced-second") if any(differs(tag, n) for n in names)]


def load_corrupted(folder: str, stage: int, seeds: list[str]) -> list[dict[str, Any]]:
    """For every seed: what was done to the second of two checkpoints, and what loads of it gave on this rank."""
    rank, pristine, work = torch.distributed.get_rank(), Path(folder, "pristine"), Path(folder, "work")
    results: list[dict[str, Any]] = []
    expected: dict[str, list[Tensor]] = {}
    with engine_of(stage) as engine:
        for tag in TAGS:
            engine.save_checkpoint(str(pristine), tag)
            expected[tag] = [tensor.clone() for tensor in held(engine)]
            step(engine)
        for tag in TAGS:
            assert load(engine, pristine, tag, expected)["holds"] == [tag]
        for seed in seeds:
            result: dict[str, Any] = {"seed": seed}
            if rank == 0:
                shutil.rmtree(work, ignore_errors=True)
                (work / "outside").mkdir(parents=True)
                shutil.copytree(pristine, work / "state", ignore=shutil.ignore_patterns(".*"))
                result["harm"] = corrupt(seed, work / "state", work / "outside")
                result["changed"] = changed(work / "state", pristine)
            torch.distributed.barrier()
            for tag in (None, "second"):
                result[str(tag)] = load(engine, work / "state", tag, expected)
                torch.distributed.barrier()
            results.append(result)
    return results
