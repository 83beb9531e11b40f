"""Experts of DeepSpeed's MoE layers: they have param groups of their own, and ranks of their own that hold them.

Written against DeepSpeed 0.17 to 0.19. What it relies on, without an import: an expert's parameter has `allreduce` =
False and in `group_name` the key of its process groups, `ep_size_s` for s ranks that hold different experts; ZeRO knows
a param group of experts by the keys `moe` and `name`, of which the latter is that key.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_PREFIX = "ep_size_"
ALL_ALIKE = f"{_PREFIX}1"  # all ranks hold the same experts


def keys_of(param: Tensor) -> dict[str, object]:
    """The keys that a param group of a parameter has to have; none where it is no expert."""
    return {} if getattr(param, "allreduce", True) else {"moe": True, "name": param.group_name}


def holders_key(group: Mapping[str, object]) -> str | None:
    """What the param groups of the same ranks share: the key of experts, None of all other parameters."""
    return str(group["name"]) if group.get("moe") else None


def ranks_of(group: Mapping[str, object], dp_size: int) -> int:
    """How many of the data-parallel ranks hold the parameters of a param group.

    Raises:
        ValueError: they are experts, and cannot be shared out evenly.
    """
    key = holders_key(group)
    if key is None:
        return dp_size
    size = int(key.removeprefix(_PREFIX))
    if dp_size % size:
        raise ValueError(
            f"ep_size = {size} of an MoE layer shares its experts out over {size} ranks at a time, and there are "
            f"{dp_size}; give an ep_size that divides them."
        )
    return dp_size // size
