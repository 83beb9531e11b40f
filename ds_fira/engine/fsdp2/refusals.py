"""Settings that FiraAdam refuses where FSDP2 has sharded its parameters."""

from __future__ import annotations

from collections.abc import Sequence

from ds_fira.optim.attachment import StandIn
from ds_fira.optim.base import LowRankOptimizer


def refuse_settings(optimizer: LowRankOptimizer) -> None:
    """Stop where a setting does not go with sharded parameters.

    Raises:
        ValueError: it does not.
    """
    name = optimizer.algorithm.name
    if any(group["capturable"] for group in optimizer.param_groups):
        raise ValueError(
            f"{name}: capturable = True is not supported with parameters sharded by FSDP2, whose step has the host "
            "read norms; remove it."
        )
    if optimizer.recorder is not None:
        raise ValueError(
            f"{name}: record_scaling_factors = {optimizer.recorder.every} is not supported with parameters sharded by "
            "FSDP2; remove it, or record under DeepSpeed's ZeRO."
        )


def refuse_rule(optimizer: LowRankOptimizer, unprojected: Sequence[StandIn]) -> None:
    """Stop where a rule that reads whole tensors would step parameters that are not projected.

    Raises:
        ValueError: it would.
    """
    rule = optimizer.algorithm.rule
    if rule is not None and not rule.elementwise and unprojected:
        raise ValueError(
            f"{optimizer.algorithm.name}: FSDP2 takes the parameters that are not projected apart, and "
            f"{rule.__name__}.elementwise = False says that they cannot be; train only projected parameters."
        )
