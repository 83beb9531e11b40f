"""What docs/numerics.md says of 8-bit states and of AdamW's part holds."""

from __future__ import annotations

import pytest

from benchmarks.quality.adamw_eps import differences
from benchmarks.quality.int8_scales import RANK, step_error

# The largest error of a step by the quotient of the largest and smallest scale of columns or rows.
INT8_BOUNDS = {1.0: 0.05, 100.0: 0.12, 1e4: 0.30}


@pytest.mark.parametrize("spread", INT8_BOUNDS)
@pytest.mark.parametrize(("side", "rank"), [("left", RANK), ("right", RANK), ("left", None), ("right", None)])
def test_int8_states_stay_within_the_bound_for_a_spread_of_scales(side: str, rank: int | None, spread: float) -> None:
    pytest.importorskip("bitsandbytes")
    error = step_error(spread, side, rank)
    assert 0.01 < error < INT8_BOUNDS[spread]


@pytest.mark.parametrize("spread", [1.0, 1e6])
def test_bfloat16_states_do_not_mind_the_spread(spread: float) -> None:
    assert 0.001 < step_error(spread, "left", state_dtype="bfloat16") < 0.01


def test_neighbours_of_like_scales_are_better_off() -> None:
    """A block sees 256 neighbours, not the whole matrix."""
    pytest.importorskip("bitsandbytes")
    assert step_error(1e4, "left", order="sorted") < 0.5 * step_error(1e4, "left", order="mixed")


@pytest.mark.parametrize(("size", "first", "last"), [(1.0, 1.1e-3, 1e-4), (1e-3, 0.2, 0.01), (1e-5, 0.8, 0.2)], ids=str)
def test_adamws_part_is_this_far_from_torchs(size: float, first: float, last: float) -> None:
    """With one eps of 1e-6: after one step and after a thousand."""
    found = differences(size)
    assert first / 2 < found[0] < first
    assert last / 5 < found[-1] < last
    assert found == sorted(found, reverse=True)
