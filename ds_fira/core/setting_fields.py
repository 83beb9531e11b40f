"""What the fields of settings are made of: types that say what is legal, a remedy beside each, and how to read both."""

from __future__ import annotations

from typing import Annotated, Literal, get_args, get_origin

import torch
from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo
from torch import Tensor


def one_number(value: object) -> object:
    """Refuse a truth value where a number belongs, and read a learning rate that torch users give as a tensor.

    Raises:
        ValueError: it is not one number.
    """
    # JSON's true would otherwise pass as the number 1.
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.numel() != 1 or value.dtype == torch.bool)):
        raise ValueError("not one number")
    return float(value) if isinstance(value, Tensor) else value


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Whole = Annotated[int, BeforeValidator(one_number)]


def setting(default: object, remedy: str | None = None, **bounds: float):
    """A field of the settings; the docstring under it says what it does, for the documentation.

    Args:
        default: its value where the user gives none.
        remedy: what a message tells the user to give instead of a value that is not legal; None where the type lists
            all that is legal.
        **bounds: `ge`, `gt`, `lt` or `min_length`, as pydantic's `Field` has them.
    """
    return Field(default, json_schema_extra={"remedy": remedy}, **bounds)


def meaning_of(field: FieldInfo) -> str:
    """What a setting does, in one line."""
    return " ".join((field.description or "of the rule").split())


def remedy_of(field: FieldInfo) -> str:
    """What a message tells the user to give for a field."""
    stated = (field.json_schema_extra or {}).get("remedy")
    if stated is not None:
        return stated
    if get_origin(field.annotation) is Literal:
        *first, last = map(repr, get_args(field.annotation))
        return f"choose {', '.join(first)} or {last}"
    return "give true or false"
