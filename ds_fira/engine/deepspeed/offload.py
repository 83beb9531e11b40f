"""Let our optimizers do under `offload_optimizer` what DeepSpeed allows its own DeepSpeedCPUAdam alone.

`offload_optimizer.ratio` below 1 at stage 3 (DeepSpeed calls it Twin-Flow): some sub-groups are stepped on the GPU, by
an AdamW beside the Adam for the CPU. An optimizer of this package steps any tensor where it lies, and keeps its states
there, so it is both.

Master weights in bfloat16 or float16: torch's optimizers keep their states in the dtype of what they step. An optimizer
of this package has them in `state_dtype`, float32 by itself, and computes in float32. On a disk such masters have not
been tried, and DeepSpeed goes on refusing them.

Written against DeepSpeed 0.19. What it relies on:

- `DeepSpeedZeroOptimizer_Stage3.__init__` takes `init_optimizer` and `offload_ratio`, keeps that as `partial_offload`,
  and where it is not 1 wants DeepSpeedCPUAdam and makes `backup_optimizer`. `_create_fp32_partitions` reads it after
  that, and says in `subgroup_to_device` where each sub-group goes.
- `_optimizer_step` gives `backup_optimizer` those that are not on the CPU, in its `param_groups`.
- `_configure_master_weights` of a ZeRO wrapper takes `offload_enabled` and a validator for each dtype, which asks for
  the class of the optimizer; from what it returns the masters are made. A wrapper of stage 3 has `swap_optimizer` then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ds_fira.optim.base import LowRankOptimizer

_RATIO = "_ds_fira_offload_ratio"


def build(init: Callable[..., None], wrapper: DeepSpeedZeroOptimizer_Stage3, *args: object, **kwargs: object) -> None:
    """`__init__`: as without a ratio up to the point where the sub-groups are dealt out."""
    bound = inspect.signature(init).bind(wrapper, *args, **kwargs)
    if isinstance(bound.arguments.get("init_optimizer"), LowRankOptimizer):
        vars(wrapper)[_RATIO] = bound.arguments.get("offload_ratio", 1.0)
        bound.arguments["offload_ratio"] = 1.0
    init(*bound.args, **bound.kwargs)


def deal_out(create: Callable[..., None], wrapper: DeepSpeedZeroOptimizer_Stage3) -> None:
    """`_create_fp32_partitions`: with the ratio, and one optimizer for both places."""
    if _RATIO in vars(wrapper):
        wrapper.partial_offload = vars(wrapper).pop(_RATIO)
        wrapper.backup_optimizer = wrapper.optimizer
    create(wrapper)


def choose_master_dtype(configure: Callable[..., torch.dtype], wrapper: ZeROOptimizer, **given: object) -> torch.dtype:
    """`_configure_master_weights`: without the question for DeepSpeedCPUAdam, where the states are in host memory."""
    in_memory = given.get("offload_enabled") and not getattr(wrapper, "swap_optimizer", False)
    if isinstance(wrapper.optimizer, LowRankOptimizer) and in_memory:
        given |= dict.fromkeys(("bf16_offload_validator", "fp16_offload_validator"))
    return configure(wrapper, **given)
