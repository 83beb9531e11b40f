"""What the ranks of a test pool run to save and load checkpoints through a real engine."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import CHECKPOINT_PARALLEL_DIMS
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from ds_fira.checkpoint.tag_folder import LOCK
from tests.distributed.crash_jobs import SETTINGS, SHAPES
from tests.distributed.zero_jobs import Net, batches, build, config


@contextmanager
def engine_of(stage: int = 2, dtype: str = "bf16", **extra: Any) -> Iterator[Any]:
    """An engine that has made a step, ended behind."""
    engine = build(config(stage, dtype, SETTINGS, **extra), SHAPES)
    step(engine)
    yield engine
    engine.destroy()


def step(engine: Any) -> None:
    """One optimizer step."""
    engine.backward(engine(batches(1, torch.distributed.get_rank(), engine.global_steps + 1)[0]))
    engine.step()


def weights(engine: Any) -> list[torch.Tensor]:
    """A copy of the module's parameters."""
    return [param.detach().clone() for param in engine.module.parameters()]


def attempt(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, str | None]:
    """What a call returned, or the name and text of its error."""
    try:
        return function(*args, **kwargs), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def save_both_ways(folder: str, stage: int, dtype: str) -> dict[str, Any]:
    """Save as ds_fira does and as DeepSpeed does alone; the files of both, and what a load gives back."""
    ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
    seen: dict[str, Any] = {}
    with engine_of(stage, dtype) as engine:
        for call, at in ((engine.save_checkpoint, ours), (inspect.unwrap(DeepSpeedEngine.save_checkpoint), theirs)):
            first = () if at is ours else (engine,)
            seen[f"{at.name} returned"] = call(
                *first, str(at), client_state={"mine": 3}, exclude_frozen_parameters=True
            )
        engine.save_checkpoint(str(ours), "apart", save_latest=False)
        kept = weights(engine)
        step(engine)
        path, client_state = engine.load_checkpoint(str(ours))
        seen |= {"path": str(path), "client": client_state.get("mine"), "steps": engine.global_steps}
        seen["weights"] = all(torch.equal(a, b) for a, b in zip(weights(engine), kept, strict=True))
        seen["without manifest"] = str(engine.load_checkpoint(str(theirs))[0])
    for at in (ours, theirs):
        seen[at.name] = files_in(at)
        seen[f"{at.name} latest"] = (at / "latest").read_bytes()
    return seen


def files_in(folder: Path) -> list[str]:
    """All files, but the lock, which rank 0 gives up when it ends its engine, before or after this rank looks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return sorted(path.relative_to(folder).as_posix() for path in files)


def harm(path: Path, how: str) -> None:
    """Damage a checkpoint, as seen from rank 0, while the others wait."""
    if torch.distributed.get_rank() == 0:
        optimizer = next(path.glob("*zero_pp_rank_1_*"))
        if how == "cut":
            os.truncate(optimizer, 1000)
        elif how == "changed":
            content = bytearray(optimizer.read_bytes())
            content[len(content) // 2] ^= 1
            optimizer.write_bytes(content)
        elif how == "empty latest":
            (path.parent / "latest").write_text("")
        elif how == "gone":
            path.rename(path.parent.parent / f"{path.name} elsewhere")
    torch.distributed.barrier()


def load_after_harm(folder: str, hows: list[str]) -> list[dict[str, Any]]:
    """For every kind of damage to the newest of two checkpoints: what is loaded by name, and without one."""
    results = []
    with engine_of() as engine:
        for how in hows:
            at = Path(folder) / how
            for tag in ("first", "second"):
                engine.save_checkpoint(str(at), tag)
            harm(at / "second", how)
            with recorded_warnings() as warnings:
                taken, error = attempt(engine.load_checkpoint, str(at))
            _, named = attempt(engine.load_checkpoint, str(at), "second")
            _, model = attempt(engine.load_checkpoint, str(at), "second", load_module_only=True)
            harm(at / "first", how)
            _, none = attempt(engine.load_checkpoint, str(at))
            results.append({"taken": taken and taken[0], "error": error, "named": named, "none": none})
            results[-1] |= {"model": model, "warnings": warnings}
            torch.distributed.barrier()
    return results


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """The warnings of DeepSpeed's logger."""
    found: list[str] = []
    original, logger.warning = logger.warning, lambda text, *args, **kwargs: found.append(text)
    try:
        yield found
    finally:
        logger.warning = original


def load_nothing(folder: str) -> dict[str, Any]:
    """Load from a folder that is not there, from an empty one, and where only an unfinished save lies."""
    results = {}
    with engine_of() as engine:
        for name in ("missing", "empty", "unfinished"):
            at = Path(folder) / name
            if name != "missing":
                (at / ".saving-a").mkdir(parents=True, exist_ok=True) if name == "unfinished" else at.mkdir(
                    exist_ok=True
                )
            if name == "unfinished":
                torch.save({}, at / ".saving-a" / f"{torch.distributed.get_rank()}.pt")
            torch.distributed.barrier()
            results[name] = attempt(engine.load_checkpoint, str(at))
    return results


def fail_to_save(folder: str) -> dict[str, Any]:
    """Saves that cannot end well, on one rank or on all; the training goes on behind each."""
    rank, results = torch.distributed.get_rank(), {}
    with engine_of() as engine:
        at = f"{folder}/state"
        engine.save_checkpoint(at, "kept")
        results["client"] = attempt(engine.save_checkpoint, at, client_state={"f": (lambda: 0) if rank == 0 else 0})
        results["reserved"] = attempt(engine.save_checkpoint, at, client_state={CHECKPOINT_PARALLEL_DIMS: 0})
        Path(f"{folder}/file").write_text("in the way")
        torch.distributed.barrier()
        results["folder"] = attempt(engine.save_checkpoint, f"{folder}/file")
        results["state"] = attempt(_with_broken_state, engine, at, rank == 1)
        step(engine)
        results["left"] = sorted(path.name for path in Path(at).iterdir())
        results["loaded"] = str(engine.load_checkpoint(at)[0])
    return results


def _with_broken_state(engine: Any, at: str, broken: bool) -> None:
    """Save while one rank cannot give its state."""
    original = engine.optimizer.state_dict

    def fail() -> None:
        raise MemoryError("no room for the state")

    if broken:
        engine.optimizer.state_dict = fail
    try:
        engine.save_checkpoint(at)
    finally:
        engine.optimizer.state_dict = original


def save_on_two_nodes(folder: str) -> dict[str, Any]:
    """Each rank as the first of a node with a disk of its own."""
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {}
    before = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = "0"
    try:
        with engine_of(checkpoint={"use_node_local_storage": True}) as engine:
            at = Path(folder) / f"node{rank}"
            for tag in ("first", "second"):
                engine.save_checkpoint(str(at), tag)
            results["files"] = sorted(path.name for path in (at / "second").iterdir())
            results["latest"] = (at / "latest").read_text()
            torch.distributed.barrier()
            if rank == 1:
                next((at / "second").glob("*zero_pp_rank_1_*")).unlink()
            results["loaded"] = str(engine.load_checkpoint(str(at))[0])
        os.environ["LOCAL_RANK"] = before
        with engine_of() as engine:
            results["apart"] = attempt(engine.save_checkpoint, f"{folder}/own{rank}")
    finally:
        os.environ["LOCAL_RANK"] = before
    return results


def save_without_fira(folder: str) -> list[str]:
    """The files of an engine with AdamW."""
    ds_config = config(2, "bf16", {}) | {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}}
    model = Net(SHAPES).bfloat16()
    engine = deepspeed.initialize(model=model, config=ds_config, model_parameters=list(model.parameters()))[0]
    engine.save_checkpoint(folder, "plain")
    engine.load_checkpoint(folder)
    engine.destroy()
    return sorted(path.name for path in (Path(folder) / "plain").iterdir())


def load_without_fira(folder: str, stage: int, async_save: bool) -> dict[str, bool]:
    """Whether an engine with torch's AdamW takes over the module's weights that one with FiraAdam saved, and trains."""
    with engine_of(stage) as engine:
        engine.basic_optimizer.saving = engine.basic_optimizer.saving._replace(async_save=async_save)
        step(engine)
        engine.save_checkpoint(folder)
        kept = whole_weights(engine)
    seen = {}
    plain = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    for option in ({"load_optimizer_states": False}, {"load_module_only": True}):
        other = build(config(stage, "bf16", {}) | plain, SHAPES, seed=7)
        before = whole_weights(other)
        # Asked for the weights alone, DeepSpeed takes those of stage 3 only where it is asked for no states too.
        path, _ = other.load_checkpoint(folder, **({"load_optimizer_states": False} if stage == 3 else {}) | option)
        name = f"{path is not None} {next(iter(option))}"
        seen[f"{name} other before"] = not any(torch.equal(kept[key], before[key]) for key in kept if "norm" not in key)
        seen[name] = all(torch.equal(weight, kept[key]) for key, weight in whole_weights(other).items())
        step(other)
        seen[f"{name} trains"] = all(bool(weight.isfinite().all()) for weight in whole_weights(other).values())
        other.destroy()
    if stage > 0:
        masters = get_fp32_state_dict_from_zero_checkpoint(folder)
        seen["exported"] = all(torch.equal(masters[key].bfloat16(), weight) for key, weight in kept.items())
    seen["read"] = all(isinstance(torch.load(file, weights_only=False), dict) for file in Path(folder).rglob("*.pt"))
    return seen


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """A copy of the module's parameters, put together where stage 3 has partitioned them."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def save_under_own_tags(folder: str) -> dict[str, Any]:
    """What becomes of a save to which every rank gives another tag, by `checkpoint.tag_validation`."""
    results = {}
    for mode in ("Fail", "Warn", "Ignore"):
        at = Path(folder, mode)
        with engine_of(checkpoint={"tag_validation": mode}) as engine:
            _, error = attempt(engine.save_checkpoint, str(at), f"rank{torch.distributed.get_rank()}")
            loaded = engine.load_checkpoint(str(at))[0]
        results[mode] = (error, loaded, sorted({*os.listdir(at)} - {LOCK}) if at.exists() else [])
    return results
