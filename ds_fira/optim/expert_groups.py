"""Experts of DeepSpeed's MoE layers: they have param groups of their own, and ranks of their own that hold them.

Written against DeepSpeed 0.17 to 0.19. What it relies on, without an import: an expert's parameter has `allreduce` =
False and in `group_name` the key of its process groups, `ep_size_s` for s ranks that hold different experts; ZeRO knows
a param group of experts by the keys `moe` and `name`, of which the latter is that key. AutoEP (0.19) puts all experts
of a rank into one parameter, the same name on every rank, and notes in it which they are, for universal checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ds_fira.core.selection import EXPERTS

# Where AutoEP notes the shape of the layer's experts together, and the numbers of those in the parameter.
_NOTE, _SHAPE, _NUMBERS = "ds_autoep_uc_meta", "logical_shape", "local_experts"
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


def note_experts(module: nn.Module, optimizer: str) -> None:
    """Note in every parameter that holds some of a layer's experts which they are, and how many the layer has.

    Args:
        module: in which AutoEP has replaced the layers, or a module that it has left alone.
        optimizer: the name of the user's optimizer, for the error.

    Raises:
        ValueError: a parameter holds experts that do not follow each other.
    """
    for name, param in module.named_parameters():
        note = getattr(param, _NOTE, None)
        if note is None:
            continue
        numbers, total = list(note[_NUMBERS]), note[_SHAPE][0]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise ValueError(
                f"{optimizer}: {name} holds experts {numbers} of {total}, which have to follow each other; place them "
                "evenly over the ranks, in order."
            )
        setattr(param, EXPERTS, (numbers[0], total))
