"""What the ranks of a test pool run: saves and loads in folders that hold other things, or that others use."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_fira.checkpoint.manifest import MANIFEST, record_file
from tests.distributed.save_jobs import attempt, engine_of, recorded_warnings, step


def save_among_strangers(folder: str, stage: int) -> dict[str, Any]:
    """Save twice into a tag's folder that holds other things; then load all, and the weights alone."""
    rank, one = torch.distributed.get_rank(), Path(folder) / "one"
    seen: dict[str, Any] = {"loaded": []}
    with engine_of(stage) as engine:
        engine.save_checkpoint(folder, "two")
        engine.save_checkpoint(folder, "one", save_latest=False)
        if rank == 0:
            (one / "tokenizer").mkdir()
            (one / "tokenizer" / "vocab.json").write_text("mine")
            for name in ("zero_pp_rank_0_mp_rank_07_model_states.pt", "mp_rank_01_model_states.pt"):
                (one / name).write_text("of another model")
            for name in ("zero_pp_rank_0", "bf16_zero_pp_rank_5"):
                (one / f"{name}_mp_rank_00_optim_states.pt").write_text("of another run")
        torch.distributed.barrier()
        step(engine)
        kept = whole_weights(engine)
        engine.save_checkpoint(folder, "one", save_latest=False)
        for options in ({}, {"load_optimizer_states": False}, {"load_module_only": True}):
            step(engine)
            _, error = attempt(engine.load_checkpoint, folder, "one", **options)
            now = whole_weights(engine)
            seen["loaded"].append([all(torch.equal(a, b) for a, b in zip(now, kept, strict=True)), error])
    torch.distributed.barrier()
    return seen


def whole_weights(engine: Any) -> list[torch.Tensor]:
    """A copy of the module's parameters, whole under stage 3 too."""
    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params):
        return [param.detach().clone() for param in params]


def save_under_bad_tags(folder: str, given: list[str]) -> dict[str, Any]:
    """The errors of saving and loading under each tag; behind them, what is loaded where `latest` holds the first."""
    at, rank = Path(folder), torch.distributed.get_rank()
    with engine_of() as engine:
        engine.save_checkpoint(folder, "good")
        if rank == 0:
            (at / "out").symlink_to(at.parent / "outside")
            (at / "in").symlink_to("good")
        torch.distributed.barrier()
        errors = [
            (attempt(engine.save_checkpoint, folder, tag)[1], attempt(engine.load_checkpoint, folder, tag)[1])
            for tag in given
        ]
        torch.distributed.barrier()
        if rank == 0:
            (at / "latest").write_text(given[0])
        torch.distributed.barrier()
        loaded = str(Path(engine.load_checkpoint(folder)[0]).parent)
    torch.distributed.barrier()
    return {"errors": errors, "loaded": loaded}


def save_beside_another_run(folder: str) -> dict[str, Any]:
    """Try to save where a process outside holds the lock and has a save under way; then when it was killed."""
    at, rank = Path(folder), torch.distributed.get_rank()
    seen: dict[str, Any] = {}
    with engine_of() as engine:
        engine.save_checkpoint(folder, "one")
    torch.distributed.barrier()
    with engine_of() as engine:
        if rank == 0:
            source = "from ds_fira.checkpoint import atomic_save, folder_lock; import pathlib, sys, time; "
            source += "at = pathlib.Path(sys.argv[1]); folder_lock.hold(at); atomic_save.prepare(at, 'two', 'token'); "
            source += "print('held', flush=True); time.sleep(300)"
            other = subprocess.Popen([sys.executable, "-c", source, folder], stdout=subprocess.PIPE, text=True)
            while other.stdout.readline() not in ("held\n", ""):
                pass
        torch.distributed.barrier()
        seen["refused"] = attempt(engine.save_checkpoint, folder, "two")[1]
        seen["staging"] = (at / ".saving-two").is_dir()
        seen["loaded"] = str(engine.load_checkpoint(folder)[0])
        if rank == 0:
            other.kill()
            other.communicate()
        torch.distributed.barrier()
        seen["alone again"] = attempt(engine.save_checkpoint, folder, "two")[1]
    torch.distributed.barrier()
    return seen


def load_without_checksum(folder: str) -> dict[str, Any]:
    """Load, twice each, a checkpoint with a manifest as 0.1.0 wrote it and one without any."""
    at, rank = Path(folder), torch.distributed.get_rank()
    with engine_of() as engine:
        for tag in ("old", "plain"):
            inspect.unwrap(DeepSpeedEngine.save_checkpoint)(engine, folder, tag)
        if rank == 0:
            files = {path.name: record_file(path) for path in (at / "old").iterdir()}
            content = {"format": 1, "serial": 1, "save_latest": True, "world_size": 2, "global_steps": 1}
            (at / "old" / MANIFEST).write_text(json.dumps({**content, "files": files}, indent=1))
        torch.distributed.barrier()
        with recorded_warnings() as warnings:
            loaded = [engine.load_checkpoint(folder, tag)[0] for tag in ("old", "old", "plain", "plain")]
    return {"loaded": [Path(path).parent.name for path in loaded], "warnings": warnings}


def load_from_two_nodes(folder: str) -> dict[str, Any]:
    """Each rank as a node of its own whose parts are of one save, of two, or under another name."""
    rank, before = torch.distributed.get_rank(), os.environ["LOCAL_RANK"]
    at, results = Path(folder) / f"node{rank}", {}
    os.environ["LOCAL_RANK"] = "0"
    try:
        with engine_of(checkpoint={"use_node_local_storage": True}) as engine:
            for tag in ("before", "same"):
                engine.save_checkpoint(str(at), tag)
            shutil.copytree(at / "same", at / "kept")
            engine.save_checkpoint(str(at), "same")
            if rank == 1:  # killed before its renames
                (at / "same").rename(at / ".saving-same")
                (at / "kept").rename(at / "same")
            torch.distributed.barrier()
            results["behind"] = str(engine.load_checkpoint(str(at), "same")[0])
            shutil.rmtree(at / ".saving-same", ignore_errors=True)
            torch.distributed.barrier()
            results["mixed"] = attempt(engine.load_checkpoint, str(at), "same")[1]
            results["fallen back"] = str(engine.load_checkpoint(str(at))[0])
    finally:
        os.environ["LOCAL_RANK"] = before
    return results
