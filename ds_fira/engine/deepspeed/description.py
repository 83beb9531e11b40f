"""What an engine is built of, in values that ranks compare, and a sentence about where they differ.

Written against DeepSpeed 0.19.8. What it relies on: `DeepSpeedConfig` keeps every setting, resolved, in attributes of
its own, most blocks of them as pydantic models.
"""

from __future__ import annotations

import enum
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from ds_fira.core.selection import shape_of

# Attributes of DeepSpeedConfig by the names they have in the JSON.
BLOCKS = {"zero_config": "zero_optimization", "float16_config": "fp16", "bfloat16_config": "bf16"}
BLOCKS |= {"scheduler_name": "scheduler.type", "scheduler_params": "scheduler.params"}
# What ranks may have otherwise, and what is described apart or stands twice in the config.
OWN = {
    *("global_rank", "world_size", "steps_per_print", "dump_state", "wall_clock_breakdown", "memory_breakdown"),
    *("log_level", "disable_python_gc", "monitor_config", "flops_profiler_config", "comms_config", "timers_config"),
    *("autotuning_config", "aio_config", "datastates_config", "zero_optimization_stage", "zero_enabled"),
    *("optimizer_name", "optimizer_params", "optimizer_legacy_fusion"),
}
SHOWN = 3  # differences in one sentence


class Description(TypedDict):
    """What one rank builds its engine of, in values that JSON has.

    Attributes:
        settings: by name.
        stage: of a pipeline this rank's, else 0; what follows is the same on the ranks of one stage.
        group_settings: of the param groups that were given, by name.
        parameters: of the module, each by its name and a text.
        groups: of every param group that was given, its parameters, each by its name.
    """

    settings: dict[str, object]
    stage: int
    group_settings: dict[str, object]
    parameters: list[list[str]]
    groups: list[list[list[str]]]


def describe_config(config: object) -> dict[str, object]:
    """The settings of a DeepSpeedConfig that all ranks have to share, by the names they have in the JSON."""
    found: dict[str, object] = {}
    for name, value in vars(config).items():
        if name not in OWN and not name.startswith("_"):
            found |= _flat(BLOCKS.get(name, name.removesuffix("_config")), value)
    return {name: value for name, value in found.items() if not name.endswith(("path", "_dir"))}


def describe_module(module: nn.Module) -> list[list[str]]:
    """Every parameter in the module's order: its name, and its shape, dtype and whether it is frozen."""
    return [
        [name, f"{shape_of(param)} {str(param.dtype)[6:]}{'' if param.requires_grad else ', frozen'}"]
        for name, param in module.named_parameters()
    ]


def describe_groups(module: nn.Module, items: Iterable[object]) -> tuple[dict[str, object], list[list[list[str]]]]:
    """The settings of param groups, and the names of their parameters.

    Args:
        module: whose parameters they are.
        items: parameters, (name, parameter) pairs or param groups, as an optimizer or an engine takes them.
    """
    names = {id(param): name for name, param in module.named_parameters()}
    items = [items] if isinstance(items, Tensor | dict) else list(items)
    groups = items if any(isinstance(item, dict) for item in items) else [{"params": items}]
    settings: dict[str, object] = {}
    members = []
    for number, group in enumerate(group for group in groups if isinstance(group, dict)):
        for name, value in group.items():
            if name not in ("params", "param_names"):
                settings |= _flat(f"param group {number}: {name}", value)
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        params = [item[1] if isinstance(item, tuple) else item for item in params]
        members.append([[names.get(id(param), f"a tensor {shape_of(param)}")] for param in params])
    return settings, members


def _flat(name: str, value: object) -> dict[str, object]:
    """A setting, or those of a block by dotted names."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, Mapping) and value:
        return {key: item for inner, each in value.items() for key, item in _flat(f"{name}.{inner}", each).items()}
    return {name: plain(value)}


def plain(value: object) -> object:
    """A value as JSON has it; of an object only its type, since its text may be another in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, enum.Enum | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        items = [plain(item) for item in value]
        return items if isinstance(value, Sequence) else sorted(items, key=repr)
    return value.__name__ if isinstance(value, type) else type(value).__name__


def describe_difference(descriptions: Mapping[int, Description]) -> str | None:
    """What ranks have otherwise than others, for a message; None where nothing differs.

    Args:
        descriptions: of every rank.
    """
    stages: dict[int, dict[int, Description]] = {}
    for rank, each in descriptions.items():
        stages.setdefault(each["stage"], {})[rank] = each
    found = _differing_settings({rank: each["settings"] for rank, each in descriptions.items()})
    for held in stages.values():
        found += _differing_settings({rank: each["group_settings"] for rank, each in held.items()})
        found += _differing_parameters(held)
    if not found:
        return None
    more = f", and {len(found) - SHOWN} more differences" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def _differing_settings(settings: Mapping[int, Mapping[str, object]]) -> list[str]:
    """Each setting that ranks have otherwise than others."""
    names = list(dict.fromkeys(name for each in settings.values() for name in each))
    # What some ranks have not set may follow from what they have set otherwise, as all that a preset gives.
    names.sort(key=lambda name: not all(name in each for each in settings.values()))
    found = []
    for name in names:
        values = {rank: _shown(each[name]) if name in each else "not set" for rank, each in settings.items()}
        if len(set(values.values())) > 1:
            found.append(f"{name} is {_by_rank(values)}")
    return found


def _differing_parameters(descriptions: Mapping[int, Description]) -> list[str]:
    """Where the parameters of ranks that hold the same, or their param groups, differ."""
    found = _differing_lists("the model's", {rank: each["parameters"] for rank, each in descriptions.items()})
    given = {rank: each["groups"] for rank, each in descriptions.items()}
    counts = {rank: f"{len(groups)}" for rank, groups in given.items()}
    if len(set(counts.values())) > 1:
        found.append(f"the number of param groups is {_by_rank(counts)}")
    else:
        for number, lists in enumerate(zip(*given.values(), strict=True)):
            where = "the given" if set(counts.values()) == {"1"} else f"param group {number}'s"
            found += _differing_lists(where, dict(zip(given, lists, strict=True)))
    return found


def _differing_lists(whose: str, lists: Mapping[int, list[list[str]]]) -> list[str]:
    """Where lists of parameters first differ: those that some ranks lack, else the first that is another one."""
    usual = _usual({rank: json.dumps(each) for rank, each in lists.items()})
    names = {rank: [entry[0] for entry in each] for rank, each in lists.items()}
    odd = next((rank for rank, each in lists.items() if each != lists[usual]), None)
    if odd is None:
        return []
    parts = []
    for verb, has, lacks, opposite in (("lacks", usual, odd, "has"), ("has", odd, usual, "lacks")):
        found = [name for name in names[has] if name not in names[lacks]]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            parts.append(f"{verb} {found[0]}{more}, which rank {usual} {opposite}")
    if parts:
        return [f"of {whose} parameters rank {odd} {' and '.join(parts)}"]
    pairs = zip(lists[odd], lists[usual], strict=False)
    place = next((i for i, (one, other) in enumerate(pairs) if one != other), -1)
    entries = {rank: " ".join(items[place]) if items[place:] else "none" for rank, items in lists.items()}
    return [f"{whose} parameter {place} is {_by_rank(entries)}"]


def _shown(value: object) -> str:
    """A value for a message; a long one with a number that tells it from others that begin alike."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... (CRC-32 {zlib.crc32(text.encode()):08x})"


def _usual(values: Mapping[int, str]) -> int:
    """A rank that has the most frequent value; the lowest of those."""
    items = list(values.values())
    return max(values, key=lambda rank: (items.count(values[rank]), -rank))


def _by_rank(values: Mapping[int, str]) -> str:
    """Values with the ranks that have them, the odd ones first, as in "0.5 on rank 1 and 0.25 on the others"."""
    usual = values[_usual(values)]
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    odd = [f"{value} on {_named(found)}" for value, found in ranks.items() if value != usual]
    shown = odd[:SHOWN] + ([f"others on {len(odd) - SHOWN} more ranks"] if len(odd) > SHOWN else [])
    rest = ranks[usual]
    return ", ".join(shown) + f" and {usual} on " + (_named(rest) if len(rest) <= 2 else "the others")


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
