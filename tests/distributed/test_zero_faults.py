"""Faults of single steps in real engines on several ranks: nothing is left of them but the steps that they cost."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.fault_jobs import FAULTS, Outcome
from tests.distributed.zero_jobs import config
from tests.ranks import Pools

SHAPES = [(8, 6), (6, 9), (8, 6), (5, 7)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3}
STEPS, WHEN = 14, [3, 4]  # a refresh, and the step behind it
# Where DeepSpeed looks for gradients that are not finite, it skips the whole step.
OPEN = {"bf16": {"check_grad_overflow": False}}
CLIPPED = {"gradient_clipping": 1.0}
FLOAT32_BASIS, COMPRESSED_BASIS = 2e-6, 1e-2

# Where the way of a step is one that the other runs have too.
FEW = ("nan", "subnormal", "repeated", "spike")
# World size, stage, dtype, FiraAdam's settings, DeepSpeed's, the largest |P'P - 1|.
RUNS: dict[str, tuple[int, int, str, dict[str, Any], dict[str, Any], float]] = {
    "stage 0": (2, 0, "fp32", {}, {}, FLOAT32_BASIS),
    "whole, stage 2": (2, 2, "bf16", {"exact_cuts": True}, OPEN | CLIPPED, FLOAT32_BASIS),
    "low-rank, stage 1": (
        *(3, 1, "bf16"),
        {"subspace": "randomized", "refresh_moments": "rotate", "state_dtype": "bfloat16"},
        *(OPEN, COMPRESSED_BASIS),
    ),
    "low-rank, stage 2": (3, 2, "fp32", {"subspace": "gram", "state_dtype": "int8"}, {}, COMPRESSED_BASIS),
    "gathered, BF16_Optimizer": (
        *(3, 1, "bf16", {"exact_cuts": True, "subspace": "randomized"}),
        *({"data_types": {"grad_accum_dtype": "fp32"}, **CLIPPED}, FLOAT32_BASIS),
    ),
}


FAST = ("stage 0", "lean cuts, stage 2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.full) for n in RUNS])
def test_training_recovers_from_two_faulty_steps(ranks: Pools, name: str) -> None:
    """Finite, orthonormal, alike on all ranks, and never more than four steps behind the run without the fault."""
    world_size, stage, dtype, params, extra, tolerance = RUNS[name]
    kinds = FEW if "exact_cuts" in params else tuple(FAULTS)
    results = ranks.run(
        world_size,
        "train_through",
        "tests.distributed.fault_jobs",
        ds_config=config(stage, dtype, {**PARAMS, **params}, **extra),
        shapes=SHAPES,
        steps=STEPS,
        when=WHEN,
        kinds=list(kinds),
    )
    untouched = results[0]["none"].losses
    skipped = 0
    for kind in kinds:
        told: list[Outcome] = [result[kind] for result in results]
        assert all(one.finite for one in told), kind
        assert max(one.skew for one in told) < tolerance, kind
        assert all(one.hashes == told[0].hashes for one in told), f"{kind}: the ranks drifted apart"
        losses = told[0].losses
        assert losses[: WHEN[0] + 1] == untouched[: WHEN[0] + 1]
        assert losses[STEPS - 1] != untouched[STEPS - 1], f"{kind}: there was no fault"
        # A faulty step is lost, and the moments that it leaves or interrupts cost about as much again.
        assert losses[STEPS - 1] <= untouched[STEPS - 1 - 2 * len(WHEN)], (kind, losses, untouched)
        steps = {count for one in told for count in one.steps}
        assert steps <= {STEPS - len(WHEN), STEPS}, (kind, steps)
        skipped += min(steps) < STEPS
    assert skipped, "NaN was counted as a step"


@pytest.mark.parametrize(
    ("world_size", "stage", "params"),
    [(2, 0, {}), (3, 1, {}), (3, 2, {"exact_cuts": True, "state_dtype": "int8"}), (2, 2, {"stagger": True})],
)
def test_an_fp16_overflow_changes_nothing(ranks: Pools, world_size: int, stage: int, params: dict[str, Any]) -> None:
    """At the first step, before, at and after a refresh: all that changes is what DeepSpeed counts."""
    results = ranks.run(
        world_size,
        "overflow",
        "tests.distributed.fault_jobs",
        ds_config=config(stage, "fp16", {**PARAMS, **params}),
        shapes=SHAPES,
        steps=7,
        at=[0, 3, 4, 6],
    )
    for changed in results:
        for differing in changed:
            assert {entry.split(": ")[1] for entry in differing} == {"counts", "loss scale"}


@pytest.mark.parametrize(
    ("stage", "dtype", "how", "still"),
    [
        (0, "fp32", "frozen", True),  # no gradient, no step
        (0, "bf16", "frozen", False),  # DeepSpeed hands out zeros: the moments go on
        (1, "bf16", "frozen", False),
        (2, "fp32", "frozen", False),
        (0, "bf16", "unused", False),
        (2, "bf16", "unused", False),
        (0, "fp32", "unused on one", False),
    ],
)
def test_a_weight_that_pauses(ranks: Pools, stage: int, dtype: str, how: str, still: bool) -> None:
    """Frozen and thawed, or left out of some forward passes, over a refresh: it goes on, and ranks stay alike."""
    pause = range(2, 5)
    results = ranks.run(
        2,
        "train_with_pauses",
        "tests.distributed.fault_jobs",
        ds_config=config(stage, dtype, PARAMS),
        shapes=SHAPES,
        steps=7,
        pause=pause,
        how=how,
    )
    for found, moved in results:
        assert found.finite
        assert found.skew < FLOAT32_BASIS
        assert found.hashes == results[0][0].hashes
        assert [moved[step] == 0.0 for step in pause] == [still] * len(pause)
        assert min(moved[: pause.start] + moved[pause.stop :]) > 0.0
        assert found.losses[-1] < found.losses[1]
