"""Part of stage 4: the step of a small model in a CUDA graph, beside the same steps without one."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from benchmarks.gpu_check.partition import GAP
from benchmarks.gpu_check.record import Check
from benchmarks.gpu_check.timing import device_seconds, host_seconds
from ds_fira import FiraAdam

# A LLaMA 60M, whose step is the host's to launch more than the device's to compute; and what it is rehearsed with.
LAYERS, HIDDEN, FEED_FORWARD, RANK = 8, 512, 1376, 128
REHEARSED = (1, 16, 48, 4)
# Steps before the capture, and steps whose bits are compared behind it.
FIRST, COMPARED = 3, 5


def optimizer_of(check: Check, capturable: bool) -> tuple[FiraAdam, list[Parameter]]:
    """An optimizer of separate weights and norms, with gradients that stay where they are."""
    layers, hidden, wide, rank = REHEARSED if check.rehearsal else (LAYERS, HIDDEN, FEED_FORWARD, RANK)
    generator = torch.Generator(check.device).manual_seed(0)

    def made(*shape: int) -> Parameter:
        param = Parameter(torch.randn(shape, generator=generator, device=check.device))
        param.grad = torch.randn(shape, generator=generator, device=check.device)
        return param

    shapes = [*[(hidden, hidden)] * 4, *[(wide, hidden)] * 2, (hidden, wide)] * layers
    weights, norms = [made(*shape) for shape in shapes], [made(hidden) for _ in range(2 * layers + 1)]
    groups = [{"params": weights, "rank": rank}, {"params": norms}]
    settings = {"lr": 1e-3, "weight_decay": 0.1, "update_proj_gap": GAP, "subspace": "randomized"}
    return FiraAdam(groups, capturable=capturable, **settings), [*weights, *norms]


def steps(optimizer: FiraAdam, count: int, graph: torch.cuda.CUDAGraph | None = None) -> None:
    """Make steps, each at another learning rate.

    Raises:
        RuntimeError: a step had to be made without the graph.
    """
    for _ in range(count):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        if graph is None:
            optimizer.step()
        elif not optimizer.replay(graph):
            raise RuntimeError("a step between refreshes was not replayed")


def capture_and_replay(check: Check) -> None:
    """The same bits, then time on the device and on the host; a rehearsal has the steps without a graph."""
    plain, expected = optimizer_of(check, capturable=False)
    ours, params = optimizer_of(check, capturable=True)
    facts = {"matrices": len(plain.param_groups[0]["params"])}
    for optimizer in (plain, ours):
        steps(optimizer, FIRST)
    if check.device.type != "cuda":
        check.fact("the same bits", all(map(torch.equal, params, expected)), of="steps before a capture")
        check.record("replay of a step", None, "ms", reason="a CUDA graph needs a GPU", **facts)
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    steps(plain, COMPARED)
    steps(ours, COMPARED, graph)
    check.fact("the same bits", all(map(torch.equal, params, expected)), of="replays")
    for what, call in (("replay of a step", lambda: ours.replay(graph)), ("the step without a graph", plain.step)):
        check.record(what, device_seconds(call, check.device) * 1e3, "ms", **facts)
    for what, call in (("host time of a replay", lambda: ours.replay(graph)), ("host time without", plain.step)):
        check.record(what, host_seconds(call, check.device) * 1e3, "ms", **facts)
