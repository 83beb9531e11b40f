"""Trainings in which one rank raises in a step while the others wait for it; see `tests.distributed.crash_jobs.Run`."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from ds_fira.sharding.lowrank.turn import Turn
from ds_fira.sharding.refresher import Refresher
from tests.distributed.zero_jobs import batches, build, config

SHAPES = [(24, 12), (12, 24), (16, 16), (10, 14)]
PARAMS = {"lr": 0.02, "rank": 3, "update_proj_gap": 2}
TEXT = "a fault\nof this rank alone"


class OwnError(Exception):
    """What a user's code may raise."""


def fail(folder: str, stage: int, odd: int, where: str, how: str, dtype: str = "fp32") -> None:
    """Train; in step 3 one rank raises.

    Args:
        folder: not used.
        stage: of ZeRO.
        odd: the rank that raises.
        where: "step", before it; "refresh", as it computes bases; "travelling", in the step, while a collective that it
            has started is under way; "after", when the step is made; "forward", in the model's own code.
        how: "dies", by the exception; "caught", the process lives on.
        dtype: of the config.
    """
    rank = torch.distributed.get_rank()
    engine = build(config(stage, dtype, dict(PARAMS)), SHAPES)
    print("starting at step 0", flush=True)

    def arm() -> None:
        if rank != odd:
            return

        def raises(*_: Any, **__: Any) -> None:
            print(f"failed at {time.time()}", flush=True)
            raise OwnError(TEXT)

        if where == "refresh":
            Refresher.refresh = raises
        elif where == "travelling":
            Turn._answer_early = raises
        elif where == "forward":
            engine.module.norm.register_forward_hook(raises)
        elif where == "after":
            engine.basic_optimizer.register_step_post_hook(raises)
        else:
            engine.basic_optimizer.register_step_pre_hook(raises)

    try:
        for step, tokens in enumerate(batches(20, rank), 1):
            if step == 3:
                arm()
            engine.backward(engine(tokens))
            engine.step()
            total = torch.ones(1)
            torch.distributed.all_reduce(total)  # of the user's own
    except OwnError:
        if how != "caught":
            raise
        print("caught", flush=True)
        time.sleep(25)
        os._exit(0)


def all_fail(stages: list[int]) -> list[tuple[str, float, int]]:
    """Every rank of a pool raises in step 2 of each engine and catches it; then engines train as if nothing had been.

    Returns:
        By stage the error's text, the seconds that the step took, the steps that the second engine made.
    """

    def raises(*_: Any, **__: Any) -> None:
        time.sleep(0.5 * torch.distributed.get_rank())  # not all at the same time
        raise OwnError(TEXT)

    told = []
    for stage in stages:
        engine = build(config(stage, "fp32", dict(PARAMS)), SHAPES)
        text, seconds = "", 0.0
        for step, tokens in enumerate(batches(2, torch.distributed.get_rank())):
            hook = engine.basic_optimizer.register_step_pre_hook(raises) if step == 1 else None
            engine.backward(engine(tokens))
            began = time.monotonic()
            try:
                engine.step()
            except OwnError as error:
                text, seconds = str(error), time.monotonic() - began
            if hook is not None:
                hook.remove()
        engine.destroy()
        told.append((text, seconds))
    time.sleep(4.0)  # longer than a failure may take to end a process
    made = []
    for stage in stages:
        engine = build(config(stage, "fp32", dict(PARAMS)), SHAPES)
        for tokens in batches(2, torch.distributed.get_rank()):
            engine.backward(engine(tokens))
            engine.step()
        made.append(engine.global_steps)
        engine.destroy()
    return [(*first, second) for first, second in zip(told, made, strict=True)]
