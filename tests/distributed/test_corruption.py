"""Checkpoints that were harmed at random: refused or passed over on all ranks alike, or as they were saved, to the bit.

DS_FIRA_CORRUPTIONS is their number (default 40); DS_FIRA_CORRUPTION_SEED repeats a series, whose seed a failure shows.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.grids import full_if
from tests.ranks import Pools

COUNT = int(os.environ.get("DS_FIRA_CORRUPTIONS", "40"))
SEED = os.environ.get("DS_FIRA_CORRUPTION_SEED", str(time.time_ns() % 10**6))
STEPS = {"first": 1, "second": 2}


def outcome(ranks: list[dict[str, Any]], tag: str | None, changed: list[str]) -> str:
    """How a load ended, where it ended well.

    Raises:
        AssertionError: it did not.
    """
    first, second = ({key: value for key, value in one.items() if key != "warnings"} for one in ranks)
    assert first == second, "the ranks differ"
    if first["error"] is not None:
        kind, _, text = first["error"].partition(": ")
        assert kind in ("CheckpointError", "ValueError"), "another error than promised"
        assert text.startswith("FiraAdam: ")
        assert text.endswith(".")
        assert "\n" not in text
        assert len(text) < 2000
        assert first["steps"] == -1, "refused, but something was loaded"
        return "refused"
    assert first["path"] is not None, "nothing was loaded, and nothing said"
    [name] = first["holds"]
    assert first["steps"] == STEPS[name]
    if name == "second":
        assert first["path"] not in changed, "what has changed was loaded"
        return "as it was saved"
    assert tag is None, "another checkpoint than the one asked for"
    return "the one before"


@pytest.mark.timeout(120 + 2 * COUNT)
@pytest.mark.parametrize("stage", full_if((2).__eq__, [2, 3]))
def test_corrupted_checkpoints(stage: int, ranks: Pools, tmp_path: Path) -> None:
    """Nothing wrong is ever loaded, no rank decides otherwise than another, and what is passed over is named."""
    seeds = [f"{SEED}-{stage}-{number}" for number in range(COUNT // 2)]
    answers = ranks.run(
        2, "load_corrupted", "tests.distributed.corruption_jobs", folder=str(tmp_path), stage=stage, seeds=seeds
    )
    seen: Counter[str] = Counter()
    failures = []
    for one, other in zip(*answers, strict=True):
        for tag in (None, "second"):
            both = [one[str(tag)], other[str(tag)]]
            try:
                found = outcome(both, tag, one["changed"])
                if found == "the one before" and "'first'" not in one["harm"]:
                    assert any("not every checkpoint is complete" in text for text in both[0]["warnings"])
                seen[found] += 1
            except (AssertionError, ValueError) as error:
                failures.append(f"{one['seed']}: {one['harm']}; tag {tag}: {error}\n{both}")
    print(f"seed {SEED}, stage {stage}, {len(seeds)} corruptions: {dict(seen)}")
    assert not failures, f"DS_FIRA_CORRUPTION_SEED={SEED}: {len(failures)} of {2 * len(seeds)}\n" + "\n".join(failures)
    if len(seeds) >= 20:
        assert set(seen) == {"refused", "as it was saved", "the one before"}
