"""Schedulers with a value a group where accelerate or the Trainer hands the optimizer to DeepSpeed."""

from __future__ import annotations

import pytest

from tests.integration.group_jobs import STEPS, expected

JOBS = "tests.integration.group_jobs"


def follows(found: list[tuple[list[float], set[tuple[float, ...]]]]) -> bool:
    """Whether the groups, and each of their parts, had the rates of the schedule at every step."""
    wanted = expected()
    assert [shown for shown, _ in found] == [pytest.approx(rates) for rates in wanted]
    assert [len(stepped) for _, stepped in found] == [2] * STEPS
    assert [sorted(stepped) for _, stepped in found] == [list(enumerate(shown)) for shown, _ in found]
    return True


@pytest.mark.parametrize("way", ["json", "objects"])
def test_accelerate(ranks, way):
    assert all(follows(found) for found in ranks.run(2, "accelerate_groups", JOBS, way=way))


def test_the_trainer(ranks, tmp_path):
    assert all(follows(found) for found in ranks.run(2, "trainer_groups", JOBS, folder=str(tmp_path)))
