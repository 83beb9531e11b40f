"""A run saved at any step and resumed on as many ranks is the uninterrupted one, to the bit, in everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Pools
from tests.zero_jobs import config

# On two ranks the lone (5, 7) is cut, on three all but the pair are.
SHAPES = [(8, 6), (6, 9), (8, 6), (5, 7)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3, "weight_decay": 0.1}
STEPS = 6  # refreshes before steps 0 and 3
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
RANDOMIZED = {"subspace": "randomized", "refresh_moments": "rotate"}
TORCH = {"torch_schedule": True}
BACK = {"rollback": True}

CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "stage 0, fp32": case(0, "fp32", RANDOMIZED, **DECAY),
        "stage 2, fp16": case(2, "fp16", INT8, OVERFLOW, **DECAY),
        "stage 1, bf16": case(1, "bf16", BF16, TORCH),
    },
    2: {
        "stage 0, fp32": case(0, "fp32", {"stagger": True}, TORCH, gradient_accumulation_steps=2),
        "stage 0, bf16": case(0, "bf16", BF16, **DECAY),
        "stage 0, fp16": case(0, "fp16", RANDOMIZED, OVERFLOW, **DECAY),
        "stage 1, fp32": case(1, "fp32", {**INT8, **RANDOMIZED}, **DECAY),
        "stage 1, fp16": case(1, "fp16", {"stagger": True}, OVERFLOW | TORCH),
        "BF16_Optimizer": case(1, "bf16", BF16, TORCH, gradient_accumulation_steps=2, **FP32_SUMS),
        "stage 2, bf16": case(2, "bf16", {**INT8, "stagger": True}, gradient_accumulation_steps=2, **DECAY),
        "offload": case(2, "bf16", RANDOMIZED, TORCH, **OFFLOAD),
        "rolled back": case(2, "fp16", BF16, OVERFLOW | BACK, **DECAY),
    },
    3: {
        "stage 0, fp16": case(0, "fp16", INT8, OVERFLOW | BACK, **DECAY),
        "stage 1, bf16": case(1, "bf16", {**RANDOMIZED, "stagger": True}, TORCH),
        "stage 1, offload": case(1, "fp16", INT8, OVERFLOW, **OFFLOAD),
        "BF16_Optimizer": case(1, "bf16", {"exact_cuts": True}, **FP32_SUMS, **DECAY),
        "stage 2, fp32": case(2, "fp32", {**BF16, **RANDOMIZED}, TORCH),
        "stage 2, fp16": case(2, "fp16", RANDOMIZED, OVERFLOW | TORCH, gradient_accumulation_steps=2),
        "base cuts": case(2, "bf16", {**INT8, "exact_cuts": True}, TORCH),
        "round robin": case(2, "bf16", {"subspace": "gram", "scaling": "matrix"}, **ROUND_ROBIN),
        "paper": case(2, "fp32", {"formulation": "paper", "refresh_moments": "reset"}, BACK, **DECAY),
    },
}


@pytest.mark.parametrize("world_size", CASES)
def test_resume_at_every_step_is_exact(ranks: Pools, tmp_path: Path, world_size: int) -> None:
    """Weights, master weights, states, groups, scheduler, loss scale, counters, metrics, generators, losses."""
    results = ranks.run(
        world_size,
        "resume_everywhere",
        "tests.resume_jobs",
        cases=CASES[world_size],
        shapes=SHAPES,
        steps=STEPS,
        folder=str(tmp_path),
    )
    wrong = {(name, rank): result[name][0] for rank, result in enumerate(results) for name in result if result[name][0]}
    assert not wrong, wrong
