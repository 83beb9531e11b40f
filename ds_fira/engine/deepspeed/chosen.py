"""Which optimizer a DeepSpeed engine trains with."""

from __future__ import annotations

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_fira.optim.base import LowRankOptimizer


def trains_ours(engine: DeepSpeedEngine) -> bool:
    """Whether an engine that is built trains with an optimizer of this package."""
    return isinstance(engine.basic_optimizer, LowRankOptimizer)
