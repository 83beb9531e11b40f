"""What the benchmarks of speed count in, and what they need to start."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.speed import step, training
from ds_fira import FiraAdam
from ds_fira.core.precision import matmul_precision


def test_what_starts_with_a_process_is_no_part_of_a_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is timed as a refresh is the second one, with the states of none before it."""
    param = nn.Parameter(torch.zeros(8, 12))
    param.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    optimizer, states, timed = FiraAdam([param], rank=2), [], []
    optimizer.register_step_pre_hook(lambda *_: states.append(len(optimizer.state)))

    def seconds(call: Callable[[], object], device: torch.device) -> float:
        timed.append(len(states))
        call()
        return 3.0

    monkeypatch.setattr(step, "seconds", seconds)
    _, refresh = step.step_and_refresh(optimizer, 3, torch.device("cpu"))
    assert (timed, states) == ([1], [0, 0, 1, 1, 1])
    assert refresh <= 3.0


def test_peers_are_stepped_in_every_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    class Peer(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            found.append(torch.backends.cuda.matmul.fp32_precision)

    monkeypatch.setitem(step.PEERS, "AdamW", lambda param, rank: Peer([param]))
    steps = step.peer_steps(["AdamW"], (4, 6), 2, torch.device("cpu"), ("float32", "tf32"))
    found.clear()
    with matmul_precision("tf32"):  # whatever the user has set
        for each in steps.values():
            each()
    assert list(steps) == ["AdamW", "AdamW tf32"]
    assert found == ["ieee", "tf32"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_needs_no_program_beside_python(processes: int) -> None:
    python, *module = training.launcher(processes)
    assert python == sys.executable
    assert module[:1] == ([] if processes == 1 else ["-m"])
    assert all(importlib.util.find_spec(name) is not None for name in module[1:2])
