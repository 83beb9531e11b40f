"""A low-rank step over a link of some latency, in processes over gloo: `benchmarks.communication.delayed`."""

from __future__ import annotations

import pytest

from benchmarks.communication.delayed import CASES, measure, plan
from benchmarks.communication.scale_step import Exchange, GroupModel, Link
from ds_fira.sharding.lowrank import step

DELAY = 0.3  # seconds: long, so that what else the machine does is short beside it
# Round trips where each phase waits for itself, as the step was made before its collectives overlapped.
ONE_AFTER_ANOTHER = {
    "stage 2, one turn": 4,
    "stage 3, one turn": 5,
    "stage 2, four turns": 9,
    "stage 3, four turns": 12,
}


@pytest.mark.full
@pytest.mark.timeout(400)
def test_a_step_takes_few_round_trips_of_a_slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, both sides: the round trips that it counts, what a model says, and at most 0.6 of before."""
    rows = {row["case"]: row for row in measure(3, DELAY, repeats=3)}
    # The model of docs/scale.md, with nothing but this latency.
    link = Link(start=DELAY, message=0.0, bandwidth=1e18, inside=1e18, serial=False)
    monkeypatch.setattr(step, "MAX_STEP_NUMEL", step.MAX_STEP_NUMEL)  # which `plan` sets
    for case in CASES:
        exchange, row = Exchange(3, link), rows[case[0]]
        GroupModel(*plan(3, *case)).step(exchange)
        assert exchange.collectives == row["collectives"]
        assert 1e3 * exchange.now == pytest.approx(row["ms"] - row["ms_without_delay"], rel=0.1)
    for case, before in ONE_AFTER_ANOTHER.items():
        row = rows[case]
        assert row["ms"] >= 1e3 * DELAY * row["round_trips"]
        assert row["ms"] <= 0.6 * 1e3 * DELAY * before, row
    # Without a limiter C needs no sums, but the parts of R do come first.
    assert rows["stage 2, normalized"]["round_trips"] == rows["stage 3, normalized"]["round_trips"] == 2
    assert rows["stage 2, one turn"]["round_trips"] == rows["stage 3, one turn"]["round_trips"] == 2
