"""`offload_optimizer.ratio` below 1 at stage 3 (DeepSpeed calls it Twin-Flow): some sub-groups are stepped on the GPU.

DeepSpeed steps those by an AdamW of its own beside its Adam for the CPU, and takes no other pair. An optimizer of this
package steps any tensor where it lies, and keeps its states there, so it is both.

Written against DeepSpeed 0.19. What it relies on:

- `DeepSpeedZeroOptimizer_Stage3.__init__` takes `init_optimizer` and `offload_ratio`, keeps that as `partial_offload`,
  and where it is not 1 wants DeepSpeedCPUAdam and makes `backup_optimizer`. `_create_fp32_partitions` reads it after
  that, and says in `subgroup_to_device` where each sub-group goes.
- `_optimizer_step` gives `backup_optimizer` those that are not on the CPU, in its `param_groups`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

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
