"""The norm of a gradient that the stages of a pipeline share: summed over them once, however many groups a stage has.

Written against DeepSpeed 0.17 to 0.19. What it relies on: `scaled_global_norm` of ZeRO's stages 1 and 2 sums the
squares of each param group over the stages of a pipeline by `_model_parallel_all_reduce`, group by group, and gives -1
for what is not finite. Stages that have more or fewer groups, as matrices of other shapes give them, would wait for
each other there for ever.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, distributed

from ds_fira.engine.deepspeed.save_load.calls import replaced
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.comm import Communicator

NOT_FINITE = -1.0


def norm_over_stages(
    scaled_global_norm: Callable[..., Tensor], wrapper: DeepSpeedZeroOptimizer, *args: object, **kwargs: object
) -> Tensor:
    """`scaled_global_norm`: the root of the sum of all stages' squares, in one collective of one number."""
    group = wrapper.model_parallel_group
    alone = group is None or distributed.get_world_size(group) == 1
    if alone or not isinstance(wrapper.optimizer, LowRankOptimizer):
        return scaled_global_norm(wrapper, *args, **kwargs)
    with replaced(wrapper, _model_parallel_all_reduce=lambda *_, **__: None):
        own = torch.as_tensor(scaled_global_norm(wrapper, *args, **kwargs))
    squares = torch.where(own == NOT_FINITE, torch.inf, own.double().square())
    norm = Communicator(group).start_all_reduce(squares).wait().sqrt().to(own.dtype)
    return torch.where(norm.isfinite(), norm, NOT_FINITE)
