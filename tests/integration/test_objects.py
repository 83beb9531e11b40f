"""A FiraAdam object through accelerate and the Trainer: it trains, under offload too, or every rank hears why not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compatibility.option_jobs import STEP_LIMIT
from tests.integration.object_jobs import OFFLOAD, STEPS
from tests.ranks import Pools

JOBS = "tests.integration.object_jobs"
ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
FIRA = {"type": "FiraAdam", "params": {"lr": 0.01, "rank": 4}}


@pytest.mark.parametrize(
    ("zero", "compiled", "scheduled"),
    [
        ({"stage": 2}, True, False),
        (OFFLOAD, False, True),
        ({**OFFLOAD, "stage": 3}, False, False),
        pytest.param(OFFLOAD, True, False, marks=pytest.mark.full),
    ],
)
def test_accelerate(ranks: Pools, zero: dict[str, Any], compiled: bool, scheduled: bool) -> None:
    """`accelerator.prepare(model, FiraAdam(...))` is one process with that FiraAdam, whatever accelerate makes."""
    for found in ranks.run(2, "accelerate_object", JOBS, zero=zero, compiled=compiled, scheduled=scheduled):
        assert found["name"] == "FiraAdam"
        assert found["steps"] == [STEPS]
        assert not {"bias_correction", "amsgrad"} & set(found["keys"])  # of DeepSpeed's Adam
        assert found["lrs"] == pytest.approx([0.05 / (1 + 2 * STEPS) if scheduled else 0.05])
        if zero["stage"] < 3:
            for weight, alone in zip(found["weights"], found["alone"], strict=True):
                assert (weight - alone).norm() <= STEP_LIMIT["float32"] * alone.norm()


@pytest.mark.parametrize(
    ("blocks", "instead"),
    [
        ({"optimizer": ADAMW, "zero_optimization": {"stage": 1}}, "adamw"),  # as DeepSpeed writes it
        ({"optimizer": FIRA, "zero_optimization": {"stage": 1}}, "FiraAdam"),
        ({"zero_optimization": {"stage": 2}}, "AdamW"),
        ({"zero_optimization": OFFLOAD}, "DeepSpeedCPUAdam"),
    ],
)
def test_the_trainer_drops_an_object(ranks: Pools, blocks: dict[str, Any], instead: str) -> None:
    """`Trainer(optimizers=(FiraAdam(...), None))` stops on every rank and says what would have trained."""
    for said, losses in ranks.run(2, "trainer_object", JOBS, blocks=blocks):
        assert said.startswith("RefusedOptimizer: FiraAdam: under DeepSpeed the Trainer drops the FiraAdam object")
        assert f"would train with {instead}; give it" in said
        assert said.count(". ") == 0
        assert losses == []


def test_a_trainer_without_an_object(ranks: Pools) -> None:
    """The same config by itself trains, while a FiraAdam of other parameters is there."""
    blocks = {"optimizer": ADAMW, "zero_optimization": {"stage": 1}}
    for said, losses in ranks.run(2, "trainer_object", JOBS, blocks=blocks, elsewhere=True):
        assert said == "AdamW"
        assert len(losses) == STEPS
