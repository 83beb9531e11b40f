"""A low-rank step over a link of some latency, in processes over gloo: `benchmarks.communication.delayed`."""

from __future__ import annotations

import pytest

from benchmarks.communication.delayed import measure

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
def test_a_step_takes_few_round_trips_of_a_slow_link() -> None:
    """Three ranks, both sides: no less than the round trips that it counts, and at most 0.6 of what it took before."""
    rows = {row["case"]: row for row in measure(3, DELAY, repeats=3)}
    for case, before in ONE_AFTER_ANOTHER.items():
        row = rows[case]
        assert row["ms"] >= 1e3 * DELAY * row["round_trips"]
        assert row["ms"] <= 0.6 * 1e3 * DELAY * before, row
    # Without a limiter C needs no sums, but the parts of R do come first.
    assert rows["stage 2, normalized"]["round_trips"] == rows["stage 3, normalized"]["round_trips"] == 2
    assert rows["stage 2, one turn"]["round_trips"] == rows["stage 3, one turn"]["round_trips"] == 2
