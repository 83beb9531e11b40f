"""`engine.offload_states` and `reload_states`: the states go where they are asked to, and training goes on to the bit.

A machine without a GPU has one device: that the memory of states is given up is shown with other memory of the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.compatibility.option_jobs import PARAMS, SHAPES
from tests.distributed.zero_jobs import config
from tests.grids import once
from tests.ranks import Pools

JOBS = "tests.distributed.offload_jobs"
ALL = {1: {"hp_params", "lp_params", "lp_grads", "optim_states"}}
ALL |= {2: ALL[1], 3: ALL[1] | {"contiguous_grad_buffer"}}


@pytest.mark.parametrize(
    ("stage", "include", "how"),
    [
        (1, ["optim_states"], {"pin_memory": False}),
        (2, None, {"pin_memory": True, "non_blocking": True}),
        (3, ["optim_states"], {"pin_memory": False, "non_blocking": True}),
        (3, ["hp_params", "lp_grads"], {"pin_memory": True}),
        (3, None, {"pin_memory": True}),
    ],
)
def test_states_leave_and_come_back(ranks: Pools, stage: int, include: list[str] | None, how: dict[str, bool]) -> None:
    ds_config = config(stage, "bf16", PARAMS)
    for found in ranks.run(2, "offload_and_reload", JOBS, ds_config=ds_config, shapes=SHAPES, include=include, **how):
        assert set(found["offloaded"]) == (ALL[stage] if include is None else set(include))
        assert found["same"]
        assert found["weights"]
        assert found["moments"]
        assert found["devices"] == ({"cpu"} if stage == 3 and "optim_states" in found["offloaded"] else set())


def test_a_run_that_is_partly_offloaded_resumes(ranks: Pools, tmp_path: Path) -> None:
    """`offload_optimizer.ratio`, whose training is on the compatibility page."""
    zero = {"zero_offload_optimizer": {"device": "cpu", "pin_memory": False, "ratio": 0.5}, "zero_sub_group_size": 50}
    job = {"ds_config": config(3, "bf16", PARAMS, **zero), "shapes": SHAPES, "folder": str(tmp_path)}
    assert ranks.run(2, "resume", steps=5, save_at=3, **job) == [True, True]


@pytest.mark.parametrize(("stage", "states"), once([2, 3], [{}, {"state_dtype": "int8"}]), ids=str)
def test_nothing_keeps_the_memory_that_states_had(ranks: Pools, stage: int, states: dict[str, Any]) -> None:
    """Views of states and rows of P borrowed from other ranks are made anew; a step reads nothing of what was."""
    ds_config = config(stage, "bf16", {**PARAMS, "update_proj_gap": 3, **states})
    for found in ranks.run(2, "other_memory", JOBS, ds_config=ds_config, shapes=SHAPES):
        assert found["same"]
        assert found["replaced"] > 0
        assert found["alive"] == 0
