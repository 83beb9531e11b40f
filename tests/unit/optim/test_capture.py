"""Steps in a CUDA graph; without a GPU a record of one step's launches stands for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fira import FiraAdam, GaLoreAdam
from ds_fira.optim.base import LowRankOptimizer
from tests.reference.gradients import make_gradients, make_weight

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("kernels_allowed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Two that are a batch; two under AdamW, one with as many elements as are stored in 8 bits.
SHAPES = [(9, 20), (9, 20), (3, 7), (1, 4100)]
# Captured before the first of the steps that are replayed, and before the last, whose gradients have a NaN.
GAP, STEPS, CAPTURED, AGAIN, REPLAYED = 3, 5, 1, 4, [1, 2, 4]
FORMS: list[dict[str, Any]] = [
    {},
    {"formulation": "paper", "scaling": "matrix", "residual_warmup": 5, "limiter": "none"},
    {"residual": "normalized", "residual_warmup": 3, "alpha": 2.0},
    {"residual": "normalized", "scaling": "matrix", "limiter": "growth"},
    {"kind": GaLoreAdam},
]


def build(lr: float | Tensor, kind: type[LowRankOptimizer] = FiraAdam, **settings: Any):
    """An optimizer and its parameters, whose gradients are there and stay where they are."""
    params = [Parameter(make_weight(shape, seed=i).to(DEVICE)) for i, shape in enumerate(SHAPES)]
    for param in params:
        param.grad = torch.zeros_like(param)
    groups = [{"params": params[:2], "rank": 3}, {"params": params[2:], "betas": (0.8, 0.95)}]
    options = {"weight_decay": 0.1, "alpha": 0.5, "update_proj_gap": GAP, "matmul_precision": "float32", **settings}
    return kind(groups, lr=lr, **options), params


def fill(params: list[Parameter], step: int) -> None:
    """The gradients of a step, in the same memory as those before; one of them has a NaN once."""
    for place, (param, shape) in enumerate(zip(params, SHAPES, strict=True)):
        param.grad.copy_(make_gradients(shape, STEPS, seed=place)[step])
    if step == AGAIN:
        params[0].grad[1, 2] = params[-1].grad[0, 3] = torch.nan


def schedule(optimizer: LowRankOptimizer, step: int) -> None:
    """Another learning rate in every step, as torch's schedulers set them."""
    for group in optimizer.param_groups:
        value = 0.01 * (1 + step) / (1 + 0.3 * step * step)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def captured(optimizer: LowRankOptimizer):
    """A graph of the step that would be made now."""
    if DEVICE.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        return graph
    # Imported here, as it imports Triton.
    from tests.unit.optim.recorded_graph import RecordedGraph

    graph = RecordedGraph()
    with graph.recording():
        optimizer.step()
    return graph


def train(lr: float | Tensor, replays: bool, **settings: Any):
    """Some steps, of which the first and the refreshes are made by `step` anyway."""
    optimizer, params = build(lr, capturable=replays, **settings)
    graph, made = None, []
    for step in range(STEPS):
        schedule(optimizer, step)
        if replays and step == CAPTURED:
            graph = captured(optimizer)
        if replays and step == AGAIN and DEVICE.type == "cpu":
            # At other counts and learning rates all is launched with the same arguments.
            assert captured(optimizer).told() == graph.told()
        fill(params, step)
        if graph is not None and optimizer.replay(graph):
            made.append(step)
        else:
            optimizer.step()
    return optimizer, params, made


@pytest.mark.parametrize(
    ("form", "state_dtype", "tensor"),
    [
        (FORMS[0], "float32", False),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                (FORMS[2], "int8", True),
                (FORMS[1], "bfloat16", True),
                (FORMS[3], "float32", False),
                (FORMS[4], "int8", False),
            )
        ),
    ],
    ids=["scaled", "normalized", "paper", "normalized by matrix", "GaLore"],
)
def test_a_replay_is_the_step(form: dict[str, Any], state_dtype: str, tensor: bool) -> None:
    """Weights and states to the bit, metrics, over schedules, refreshes and a gradient that is not finite."""
    lr: Callable[[], Any] = lambda: torch.tensor(0.01, device=DEVICE) if tensor else 0.01  # noqa: E731
    theirs, expected, _ = train(lr(), replays=False, state_dtype=state_dtype, **form)
    ours, found, made = train(lr(), replays=True, state_dtype=state_dtype, **form)
    assert made == REPLAYED
    for mine, wanted in zip(found, expected, strict=True):
        assert torch.equal(mine, wanted)
        for key, value in theirs.state[wanted].items():
            assert torch.equal(ours.state[mine][key], value), key
    mine, wanted = (replace(each.metrics.totals(), refresh_seconds=0.0) for each in (ours, theirs))
    assert mine == wanted
    assert mine.steps == STEPS
