"""Checkpoints that would run code if they were unpickled, made and loaded by real engines."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import logger

from ds_fira.optim.registry import fira_of
from tests.distributed.zero_jobs import Net, batches, build, config

SHAPES = [(8, 6), (6, 12), (3, 40)]
PARAMS = {"rank": 2, "update_proj_gap": 3, "lr": 0.01}


class Calls:
    """Unpickled, it is the result of a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


class Marks:
    """Unpickled, it leaves a mark by itself."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["marker"]).touch()


def evil(kind: str, marker: Path) -> Any:
    """Something whose unpickling makes a file."""
    if kind == "system":
        return Calls(os.system, f"touch {marker}")
    if kind == "eval":
        return Calls(builtins.eval, f"open({str(marker)!r}, 'w').close()")
    return Marks(str(marker))


WANTED = {"system": "posix.system", "eval": "builtins.eval", "setstate": "tests.distributed.safe_jobs.Marks"}


class Extended(Net):
    """A model with something more in its state dict."""

    extra: Any = 0

    def get_extra_state(self) -> Any:
        """Saved with the weights."""
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        """Not needed."""


@contextlib.contextmanager
def warnings_of_deepspeed() -> Iterator[list[str]]:
    """What DeepSpeed's logger is told."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


def attempt(engine: Any, folder: str, tag: str, **options: Any) -> str:
    """The text of the error that a load ends with."""
    try:
        engine.load_checkpoint(folder, tag=tag, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def attacked(folder: str, stage: int, dtype: str = "fp32", legacy: bool = False) -> dict[str, Any]:
    """Save harmful checkpoints with one engine and load each with another.

    Returns:
        `errors` by tag and options; `marks`, the files made meanwhile; `told`, warnings of the saves; `trusted`, the
        marks after loads with `unpickle_checkpoints`.
    """
    extra = {"checkpoint": {"checkpoint_serialization": not legacy}} if legacy else {}
    engine = build(config(stage, dtype, PARAMS, **extra), SHAPES, model=Extended(SHAPES))
    rank = torch.distributed.get_rank()
    engine.backward(engine(batches(1, rank)[0]))
    engine.step()
    optimizer, root = fira_of(engine), Path(folder)
    engine.save_checkpoint(folder, tag="good", client_state={"batch": 3})
    with warnings_of_deepspeed() as told:
        for kind in WANTED:
            engine.save_checkpoint(folder, tag=f"client-{kind}", client_state={"x": [evil(kind, root / f"m-c-{kind}")]})
    kinds = ("system",) if legacy else WANTED
    for kind in kinds:
        state = next(iter(optimizer.state.values()), {})
        if rank == 1 or stage == 0:
            # Of one rank: the others' files are as they should be.
            state["more"] = evil(kind, root / f"m-o-{kind}")
        engine.save_checkpoint(folder, tag=f"optimizer-{kind}")
        state.pop("more", None)
    engine.module.extra = evil("system", root / "m-module")
    engine.save_checkpoint(folder, tag="module-system")
    engine.destroy()
    result: dict[str, Any] = {"told": told, "errors": {}, "trusted": []}
    engine = build(config(stage, dtype, PARAMS, **extra), SHAPES, seed=3, model=Extended(SHAPES))
    tags = [f"client-{kind}" for kind in WANTED] + [f"optimizer-{kind}" for kind in kinds] + ["module-system"]
    for tag in tags:
        result["errors"][tag] = attempt(engine, folder, tag)
    for tag, options in {
        ("client-eval", "load_module_only"): {"load_module_only": True},
        ("module-system", "weights"): {"load_optimizer_states": False},
    }.items():
        result["errors"][tag] = attempt(engine, folder, tag[0], **options)
    torch.distributed.barrier()
    result["marks"] = sorted(path.name for path in root.glob("m-*"))
    result["good"] = attempt(engine, folder, "good")
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    result["scaler"] = None if scaler is None else f"{type(scaler).__module__}.{type(scaler).__name__}"
    fira_of(engine).unpickle_checkpoints = True
    for tag in ("client-system", "client-setstate") if stage < 3 else ():
        assert attempt(engine, folder, tag) == ""
    torch.distributed.barrier()
    result["trusted"] = sorted(path.name for path in root.glob("m-*"))
    engine.destroy()
    return result


def real_files(folder: str, cases: list[tuple[int, str, dict[str, Any]]]) -> None:
    """Save what DeepSpeed and we write, with client state of plain values and schedules of every kind."""
    for number, (stage, dtype, extra) in enumerate(cases):
        engine = build(config(stage, dtype, PARAMS, **extra), SHAPES)
        engine.backward(engine(batches(1, torch.distributed.get_rank())[0]))
        engine.step()
        engine.save_checkpoint(f"{folder}/{number}", client_state={"a": [1, {"b": torch.ones(2)}], "c": {1, 2}})
        engine.destroy()


def spoiled(folder: str, state_dtype: str) -> None:
    """Save checkpoints in which one number of a kind is not finite, under tags named after the kinds."""
    ds_config = config(2, "fp32", {**PARAMS, "state_dtype": state_dtype})
    engine = build(ds_config, [(80, 80), (6, 12)], model=Net([(80, 80), (6, 12)], width=400))
    engine.backward(engine(batches(1, torch.distributed.get_rank())[0]))
    engine.step()
    optimizer = fira_of(engine)
    engine.save_checkpoint(folder, tag="fine")
    coded = state_dtype == "int8"

    def found(key: str, projected: bool = True) -> torch.Tensor | None:
        """A state of this rank, of a projected tensor or another."""
        for state in optimizer.state.values():
            if projected == any(name.startswith("basis") for name in state):
                # The states of a cut matrix, or of one of several shapes, have a mark behind their name.
                return next((value for name, value in state.items() if name.partition(".")[0] == key), None)
        return None

    moments = "scales of moments" if coded else "moments"
    kinds = {
        "limiters": found("residual_norm"),
        "bases": found("basis"),
        moments: found("exp_avg_sq_scale" if coded else "exp_avg_sq"),
        f"{moments} of AdamW": found("exp_avg_scale" if coded else "exp_avg", projected=False),
        "master weights": optimizer.param_groups[0]["params"][0].data,
    }
    for tag, tensor in kinds.items():
        before = None if tensor is None else tensor.clone()
        if tensor is not None and torch.distributed.get_rank() == 1:
            tensor.view(-1)[-1 if "AdamW" not in tag else 0] = float("inf" if tag == "bases" else "nan")
        engine.save_checkpoint(folder, tag=tag)
        if tensor is not None:
            tensor.copy_(before)
    engine.destroy()
