"""What a user sees of the settings, made from their fields: constructor arguments, docstring, table of the docs.

So a new setting is one field of `GroupSettings` or of `Settings`, and stands everywhere.
"""

from __future__ import annotations

import functools
import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from inspect import Parameter
from typing import get_type_hints

from pydantic.fields import FieldInfo
from torch import Tensor, nn
from torch.optim import AdamW

from ds_fira.core.algorithms import RELATIVES, Algorithm
from ds_fira.core.setting_fields import meaning_of, remedy_of
from ds_fira.core.settings import ParamGroup
from ds_fira.optim.settings import NOT_OF_GROUPS, TORCH_OPTIONS, Settings, legal_settings

# Arguments that may be given by position, as in torch's AdamW, where the base optimizer is Adam.
POSITIONAL = ("lr", "betas", "eps", "weight_decay")
# A setting of DeepSpeed configs alone.
OF_CONFIGS = "max_group_bytes"
Params = nn.Module | Tensor | Iterable[Tensor | tuple[str, Tensor] | ParamGroup]


@functools.cache
def _hints() -> dict[str, object]:
    """The types of the settings that every algorithm has; resolving their names takes milliseconds."""
    return get_type_hints(Settings)


def _fields(algorithm: Algorithm) -> dict[str, tuple[FieldInfo, object]]:
    """The constructor's settings, each with its field and its type."""
    own = {} if algorithm.rule is None else algorithm.rule.model_fields
    hints = _hints() | {name: field.annotation for name, field in own.items()}
    fields = {**Settings.model_fields, **own}
    return {name: (fields[name], hints[name]) for name in legal_settings(algorithm) if name != OF_CONFIGS}


def signature_of(algorithm: Algorithm) -> inspect.Signature:
    """The signature of an optimizer's constructor: the parameters, its settings, torch's options that are off."""
    arguments = {"params": Parameter("params", Parameter.POSITIONAL_OR_KEYWORD, annotation=Params)}
    for name, (field, hint) in _fields(algorithm).items():
        by_place = algorithm.rule is None and name in POSITIONAL
        kind = Parameter.POSITIONAL_OR_KEYWORD if by_place else Parameter.KEYWORD_ONLY
        arguments[name] = Parameter(name, kind, default=field.default, annotation=hint)
    torchs = inspect.signature(AdamW).parameters
    arguments |= {name: torchs[name].replace(kind=Parameter.KEYWORD_ONLY) for name in TORCH_OPTIONS}
    return inspect.Signature(list(arguments.values()))


def documented(text: str, algorithm: Algorithm) -> str:
    """The docstring of an optimizer with its arguments, ahead of what it raises."""
    groups_may = ", ".join(f"`{name}`" for name in NOT_OF_GROUPS if name != OF_CONFIGS)
    meanings = {
        "params": "the model, parameters, (name, parameter) pairs, or param groups; groups may set every argument "
        f"but {groups_may} for themselves.",
        **{name: f"{meaning_of(field)}." for name, (field, _) in _fields(algorithm).items()},
        ", ".join(TORCH_OPTIONS): "torch's; only False and None.",
    }
    lines = [
        line
        for name, meaning in meanings.items()
        for line in textwrap.wrap(f"{name}: {meaning}", 120, initial_indent=" " * 8, subsequent_indent=" " * 12)
    ]
    before, raises, after = text.partition("    Raises:\n")
    return before + "\n".join(["    Args:", *lines, "", ""]) + raises + after


def bind(algorithm: Algorithm, positional: tuple[object, ...], given: Mapping[str, object]) -> dict[str, object]:
    """The settings of a call by name; those that nobody knows among them, for `check_params` to refuse.

    Raises:
        TypeError: there are too many positional arguments, or one of them is given by name too.
        ValueError: a setting of configs alone is given.
    """
    if OF_CONFIGS in given:
        raise ValueError(
            f"{algorithm.name}: {OF_CONFIGS} = {given[OF_CONFIGS]!r} is a setting of DeepSpeed configs; remove it here."
        )
    signature = signature_of(algorithm)
    known = {name: value for name, value in given.items() if name in signature.parameters}
    bound = signature.bind(None, *positional, **known).arguments
    return {**{name: value for name, value in bound.items() if name != "params"}, **given}


def settings_table() -> str:
    """All settings as a Markdown table: name, legal values, default and meaning of each."""
    rows = [["setting", "legal values", "default", "meaning"], ["---"] * 4]
    for name in legal_settings():
        field = Settings.model_fields[name]
        legal = remedy_of(field).partition(" ")[2]
        default = f"`{json.dumps(field.default)}`"
        rows.append([f"`{name}`", legal, default, meaning_of(field)])

    def listed(names: Iterable[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    notes = (
        f"A param group may set every one of them for itself but {listed(NOT_OF_GROUPS)}.",
        f"`{OF_CONFIGS}` stands in configs alone.",
        *(f"{algorithm.name} has no {listed(algorithm.without)}." for algorithm in RELATIVES),
    )
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", *notes])
