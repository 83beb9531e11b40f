"""One model on a number of ranks: its plan, its steps and their time; where the exchange grows, and what moves it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.communication.scale_models import MODELS, Plan, plan
from benchmarks.communication.scale_step import Exchange, GroupModel, Link

DOUBLINGS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
LIMIT = 0.05


@dataclass(frozen=True)
class Step:
    """What trains a model: tokens, and how fast.

    Attributes:
        tokens: of a rank in a step.
        batch: tokens of all ranks in a step, where these are fixed instead.
        flops: of a rank in a second, at most.
        mfu: share of them that a step reaches.
    """

    tokens: int = 8192
    batch: int = 2**22
    flops: float = 989e12
    mfu: float = 0.4

    def seconds(self, model: str, ranks: int, fixed_batch: bool = False) -> float:
        """Of a step without what an optimizer sends."""
        tokens = self.batch / ranks if fixed_batch else self.tokens
        return 6 * MODELS[model].parameters(active=True) * tokens / (self.flops * self.mfu)


@dataclass(frozen=True)
class Row:
    """One model on a number of ranks; bytes of float32, of the rank that has most.

    Attributes:
        seconds: of a process to plan.
        state: bytes of the fullest rank.
        imbalance: that over the mean.
        copies: states of all ranks over the paper's formula.
        sent, received: bytes in a step between refreshes.
        refresh_sent, refresh_received: bytes in a step that renews every basis.
        collectives, messages: in a step between refreshes; messages are ranks that the busiest one talks to.
        exchange, refresh: seconds by the model of the links, of both kinds of steps.
        mean: seconds of a step with its part of a refresh.
        step: seconds of a step without the exchange, with fixed tokens a rank.
    """

    model: str
    mode: str
    ranks: int
    rank: int
    matrices: int
    seconds: float
    state: int
    imbalance: float
    copies: float
    sent: float
    received: float
    refresh_sent: float
    refresh_received: float
    collectives: int
    refresh_collectives: int
    messages: int
    exchange: float
    refresh: float
    mean: float
    step: float


@cache
def exchanged(
    model: str, mode: str, ranks: int, link: Link, rank: int | None, gap: int
) -> tuple[Plan, np.ndarray, list[Exchange]]:
    """The plan of ranks that share matrices, bytes of state by rank, and a step without a refresh and one with."""
    made, found = plan(model, ranks, mode, rank, gap), []
    for refresh in (False, True):
        exchange = Exchange(made.ranks, link)
        for layout, settings in made.layouts:
            GroupModel(layout, settings).step(exchange, refresh)
        found.append(exchange)
    return made, 4 * made.states(), found


def row(model: str, mode: str, ranks: int, link: Link, step: Step, rank: int | None = None, gap: int = 200) -> Row:
    """Plan a model and count what its steps send."""
    sharing = min(ranks, int(mode.removeprefix("hsdp"))) if mode.startswith("hsdp") else ranks
    made, states, found = exchanged(model, mode, sharing, link, rank, gap)
    usual, renewing = found
    return Row(
        model=model,
        mode=mode,
        ranks=ranks,
        rank=rank or MODELS[model].rank,
        matrices=made.matrices,
        seconds=made.seconds,
        state=int(states.max()),
        imbalance=float(states.max() / states.mean()),
        copies=float(states.sum() / (4 * made.formula)),
        sent=float(usual.sent.max()),
        received=float(usual.received.max()),
        refresh_sent=float(renewing.sent.max()),
        refresh_received=float(renewing.received.max()),
        collectives=usual.collectives,
        refresh_collectives=renewing.collectives,
        messages=usual.messages,
        exchange=usual.now,
        refresh=renewing.now,
        mean=usual.now + (renewing.now - usual.now) / gap,
        step=step.seconds(model, ranks),
    )


def knee(model: str, mode: str, link: Link, step: Step, fixed_batch: bool, **changed: int) -> int | None:
    """The fewest ranks, doubled from 8 to 2048, from which on the exchange takes more than `LIMIT` of a step."""
    for ranks in DOUBLINGS:
        if row(model, mode, ranks, link, step, **changed).mean > LIMIT * step.seconds(model, ranks, fixed_batch):
            return ranks
    return None


def moves(model: str, mode: str, ranks: int, link: Link, step: Step) -> Iterator[tuple[str, Row, float]]:
    """What changes the share that the exchange has of a step: its name, the row, and the share."""
    usual, gap = MODELS[model].rank, 200
    cases: list[tuple[str, str, dict[str, int], int]] = [
        (f"rank {usual}, gap {gap}", mode, {}, 1),
        (f"rank {usual // 2}", mode, {"rank": usual // 2}, 1),
        (f"rank {usual // 4}", mode, {"rank": usual // 4}, 1),
        ("gap 50", mode, {"gap": 50}, 1),
        ("gap 1000", mode, {"gap": 1000}, 1),
        ("HSDP, shards over 64", "hsdp64", {}, 1),
        ("HSDP, shards over 8", "hsdp8", {}, 1),
        ("4 times the tokens", mode, {}, 4),
    ]
    for name, chosen, changed, times in cases:
        found = row(model, chosen, ranks, link, step, **changed)
        yield name, found, found.mean / (times * found.step)
