"""A run saved at any step and resumed on as many ranks is the uninterrupted one, to the bit, in everything."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_fira.engine.deepspeed.save_load.client_state import rng_state, set_rng_state
from tests.distributed.zero_jobs import config
from tests.ranks import Pools

# On two ranks the lone (5, 7) is cut, on three all but the pair are.
SHAPES = [(8, 6), (6, 9), (8, 6), (5, 7)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3, "weight_decay": 0.1}
STEPS = 5  # refreshes before steps 0 and 3
OVERFLOW = {"overflow_at": 2}  # then a checkpoint is saved right after the step that was skipped, before a refresh
DECAY = {
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 2, "total_num_steps": 8},
    }
}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"zero_offload_optimizer": {"device": "cpu"}}
ROUND_ROBIN = {"zero_round_robin_gradients": True}


def case(stage: int, dtype: str, params: dict[str, Any] | None = None, how: dict[str, Any] | None = None, **extra: Any):
    """One run: the arguments of `resume_one`."""
    return {"ds_config": config(stage, dtype, {**PARAMS, **(params or {})}, **extra), **(how or {})}


BF16, INT8 = {"state_dtype": "bfloat16"}, {"state_dtype": "int8"}
PRESET = {"preset": "recommended"}
RANDOMIZED = {"subspace": "randomized", "refresh_moments": "rotate"}
TORCH = {"torch_schedule": True}
BACK = {"rollback": True}
FLOAT16 = {"torch_autocast": {"enabled": True, "dtype": "float16"}}

CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "stage 0, fp32": case(0, "fp32", RANDOMIZED, **DECAY),
        "stage 2, fp16": case(2, "fp16", INT8, OVERFLOW, **DECAY),
    },
    2: {
        "stage 0, bf16": case(0, "bf16", BF16, TORCH, gradient_accumulation_steps=2),
        "stage 0, fp16": case(0, "fp16", {**RANDOMIZED, "stagger": True}, OVERFLOW, **DECAY),
        "stage 1, fp32": case(1, "fp32", {**INT8, **RANDOMIZED}, **DECAY),
        "BF16_Optimizer": case(1, "bf16", BF16, TORCH, gradient_accumulation_steps=2, **FP32_SUMS),
        "stage 2, bf16": case(2, "bf16", {**INT8, **PRESET, "stagger": True}, gradient_accumulation_steps=2, **DECAY),
        "float16 autocast, stage 0": case(0, "fp32", BF16, **FLOAT16, **DECAY),
        "float16 autocast, stage 2": case(2, "fp32", {}, OVERFLOW, **FLOAT16, **DECAY),
        "rolled back": case(2, "fp16", BF16, OVERFLOW | BACK, **DECAY),
        "bf16 masters, offload": case(2, "bf16", {}, bf16={"bf16_master_weights_and_grads": True}, **OFFLOAD),
        "fp16 masters, offload": case(1, "fp16", {}, OVERFLOW, fp16={"fp16_master_weights_and_grads": True}, **OFFLOAD),
    },
    3: {
        "stage 0, fp32": case(0, "fp32", {"stagger": True}, TORCH),
        "stage 1, bf16": case(1, "bf16", {**RANDOMIZED, "stagger": True}, BACK, **OFFLOAD),
        "stage 1, fp16": case(1, "fp16", INT8, OVERFLOW | TORCH),
        "stage 2, fp32": case(2, "fp32", {**BF16, **RANDOMIZED}, TORCH),
        "base cuts": case(2, "fp16", {**INT8, "exact_cuts": True}, OVERFLOW, **OFFLOAD, **DECAY),
        "normalized, matrix": case(1, "fp16", {"residual": "normalized", "scaling": "matrix"}, OVERFLOW | BACK),
        "paper": case(2, "bf16", {"formulation": "paper", "refresh_moments": "reset"}, **DECAY, **ROUND_ROBIN),
    },
}


FAST = ("normalized, matrix", "stage 2, bf16", "BF16_Optimizer", "float16 autocast, stage 2")


@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        pytest.param(size, name, marks=() if name in FAST else pytest.mark.full)
        for size in CASES
        for name in CASES[size]
    ],
)
def test_resume_at_every_step_is_exact(ranks: Pools, tmp_path: Path, world_size: int, name: str) -> None:
    """Weights, master weights, states, groups, scheduler, loss scale, counters, metrics, generators, losses."""
    arguments = {**CASES[world_size][name], "shapes": SHAPES, "steps": STEPS, "folder": str(tmp_path)}
    results = ranks.run(world_size, "resume_everywhere", "tests.distributed.resume_jobs", **arguments)
    assert [wrong for wrong, _ in results] == [[]] * world_size
    if "overflow_at" in arguments:
        skipped = {last["counts"][2] for _, last in results}
        # Under autocast one more, for which torch's first scale is too large.
        assert skipped == ({2} if "autocast" in name else {1}), "no step was skipped"


@pytest.fixture(scope="module")
def saved(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """Four steps on two ranks at stage 0, whose checkpoints DeepSpeed loads on any number of ranks."""
    folder = str(tmp_path_factory.mktemp("saved"))
    arguments = {"ds_config": config(0, "fp32", PARAMS), "shapes": SHAPES, "folder": folder}
    return folder, ranks.run(2, "save_here", "tests.distributed.resume_jobs", steps=4, **arguments)


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_ranks_goes_on_counting(ranks: Pools, saved: Any, world_size: int) -> None:
    """Counters are those of the whole run; each rank has the generators that its number had, the third its own."""
    folder, there = saved
    arguments = {"ds_config": config(0, "fp32", PARAMS), "shapes": SHAPES, "folder": folder}
    for rank, here in enumerate(ranks.run(world_size, "load_here", "tests.distributed.resume_jobs", **arguments)):
        assert here["metrics"] == there[0]["metrics"]
        assert here["metrics"]["matrix_steps"] == 4 * len(SHAPES)
        assert here["trained"]["matrix_steps"] == 6 * len(SHAPES)
        expected = there[rank]["random"] if rank < 2 else here["before"]
        assert torch.equal(here["random"], expected)


@pytest.mark.parametrize("how", [{"load_optimizer_states": False}, {"load_module_only": True}])
def test_weights_alone_leave_generators_and_counters(ranks: Pools, saved: Any, how: dict[str, Any]) -> None:
    """A new run from old weights is a new run."""
    arguments = {"ds_config": config(0, "fp32", PARAMS), "shapes": SHAPES, "folder": saved[0]}
    for here in ranks.run(2, "load_here", "tests.distributed.resume_jobs", **arguments, **how):
        assert here["metrics"]["matrix_steps"] == 0
        assert torch.equal(here["random"], here["before"])


def test_the_first_event_after_a_resume_is_of_its_steps(ranks: Pools, saved: Any, tmp_path: Path) -> None:
    """Not of the whole run that was loaded, whose counters go on in `ds_fira.metrics`."""
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "x"}, "steps_per_print": 2}
    arguments = {"ds_config": config(0, "fp32", PARAMS, **monitor), "shapes": SHAPES, "folder": saved[0]}
    (first, _) = ranks.run(2, "load_here", "tests.distributed.resume_jobs", **arguments)
    rows = (tmp_path / "x" / "Train_Fira_refreshes.csv").read_text().split()
    assert [float(row.split(",")[-1]) for row in rows[1:]] == [0.0], rows
    assert first["trained"]["refreshes"] == 2 * len(SHAPES)


def test_generators_come_back_as_they_were(tmp_path: Path) -> None:
    """All three, through a file read with `weights_only`; also with half of a pair of normal numbers drawn."""
    random.gauss(0.0, 1.0)
    np.random.standard_normal()
    torch.save(rng_state(), tmp_path / "state.pt")

    def draw() -> list[Any]:
        return [random.random(), random.gauss(0.0, 1.0), *np.random.standard_normal(3), *torch.randn(20).tolist()]

    expected = draw()
    assert draw() != expected
    set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected
