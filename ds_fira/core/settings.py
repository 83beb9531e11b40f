"""The settings of a param group: name, type, range, default, meaning and remedy of each, stated once.

The constructor, the JSON config, the checks and the table of the documentation are made from these fields. A step reads
them as attributes of one frozen `GroupSettings`, which `GroupSettings.of` makes of a param group's dict once a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator
from torch import Tensor

from ds_fira.core.algorithms import algorithm_of
from ds_fira.core.rules import Rule

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
YES_OR_NO = {"remedy": "give true or false"}


def advice(sentence: str) -> dict[str, str]:
    """What a message tells the user to give instead of a value that is not legal; kept with the field."""
    return {"remedy": sentence}


class GroupSettings(BaseModel):
    """Every setting that a param group may have for itself, checked; `description` says what it does."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    lr: float = Field(
        1e-3,
        ge=0.0,
        description="learning rate; a tensor of one element is read in every step",
        json_schema_extra=advice("give a learning rate of at least 0, such as 0.01"),
    )
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999),
        description="decay rates of the moments",
        json_schema_extra=advice("give two numbers from 0 up to but not including 1, such as [0.9, 0.999]"),
    )
    eps: float = Field(
        1e-6,
        ge=0.0,
        description="added to sqrt(V)",
        json_schema_extra=advice("give a number of at least 0, such as 1e-6"),
    )
    weight_decay: float = Field(
        0.0,
        ge=0.0,
        description="decoupled, applied after the update",
        json_schema_extra=advice("give a number of at least 0"),
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="subspace rank of the weights to project, in all groups that do not say `rank = None`; not used "
        "where some group has a rank of its own",
        json_schema_extra=advice("give a whole number of at least 1, such as 128"),
    )
    update_proj_gap: int = Field(
        200,
        ge=1,
        description="steps from one refresh of the subspace to the next",
        json_schema_extra=advice("give a whole number of steps of at least 1, such as 200"),
    )
    alpha: float = Field(
        1.0,
        gt=0.0,
        description="scale of the back-projection (released), or of the whole update (paper)",
        json_schema_extra=advice("give a number above 0, such as 0.25 or 1.0"),
    )
    proj_type: Literal["std", "reverse_std", "left", "right"] = Field(
        "std",
        description='the projected side: "std" the smaller, "reverse_std" the larger, "left", "right"',
        json_schema_extra=advice("choose 'std', 'reverse_std', 'left' or 'right'"),
    )
    gamma: float = Field(
        1.01,
        gt=1.0,
        description="the limiter's largest growth of the residual norm from one step to the next",
        json_schema_extra=advice("give a number above 1, such as 1.01"),
    )
    residual_scale: float = Field(
        1.0,
        ge=0.0,
        description="multiplies the scaled residual in the update; 1 is the paper",
        json_schema_extra=advice("give a number of at least 0, such as 1.0"),
    )
    scaling: Literal["column", "matrix", "none"] = Field(
        "column",
        description='the scaling factor per "column", per "matrix", or "none" (1)',
        json_schema_extra=advice("choose 'column', 'matrix' or 'none'"),
    )
    limiter: Literal["growth", "none"] = Field(
        "growth",
        description='"growth", the norm-growth limiter of the residual, or "none"',
        json_schema_extra=advice("choose 'growth' or 'none'"),
    )
    formulation: Literal["released", "paper"] = Field(
        "released",
        description='"released" makes the steps of PyPI `fira`, "paper" those of Algorithm 1',
        json_schema_extra=advice("choose 'released' or 'paper'"),
    )
    subspace: Literal["svd", "gram", "randomized"] = Field(
        "svd",
        description='how a basis is computed: "svd" exactly, "gram" from the Gram matrix, "randomized" by block power '
        "iteration",
        json_schema_extra=advice("choose 'svd', 'gram' or 'randomized'"),
    )
    refresh_moments: Literal["keep", "rotate", "reset"] = Field(
        "keep",
        description='what a refresh does to the moments: "keep" them, "rotate" them into the new basis, "reset" them',
        json_schema_extra=advice("choose 'keep', 'rotate' or 'reset'"),
    )
    refresh_limiter: Literal["keep", "reset"] = Field(
        "keep",
        description='what a refresh does to the residual norm that the limiter remembers: "keep" or "reset" it',
        json_schema_extra=advice("choose 'keep' or 'reset'"),
    )
    stagger: StrictBool = Field(
        False,
        description="whether the matrices refresh on different steps, spread over the gap",
        json_schema_extra=YES_OR_NO,
    )
    state_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="how basis and moments are stored",
        json_schema_extra=advice("choose 'float32', 'bfloat16' or 'int8'"),
    )
    matmul_precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "tf32",
        description="the precision of the matrix products of a step",
        json_schema_extra=advice("choose 'float32', 'tf32' or 'bfloat16'"),
    )
    exact_cuts: StrictBool = Field(
        False,
        description="whether a matrix that ZeRO splits is stepped whole on its owner, equal to the bit to a matrix "
        "that is not split, even where exchanging low-rank data is cheaper",
        json_schema_extra=YES_OR_NO,
    )
    project_full_rank: StrictBool = Field(
        False,
        description="whether a matrix whose rank is at or above its smaller side is projected, as the released code "
        "does, though its states are then larger; else it is stepped unprojected, with lr x alpha",
        json_schema_extra=YES_OR_NO,
    )
    rule: Rule | None = Field(None, exclude=True, repr=False)

    @field_validator("rank", "update_proj_gap", "lr", mode="before")
    @classmethod
    def _one_number(cls, value: object) -> object:
        return one_number(value)

    @classmethod
    def of(cls, group: Mapping[str, object]) -> GroupSettings:
        """The settings of a param group, whose values were checked when they were given.

        Args:
            group: as `torch.optim` holds it; a setting that it lacks has its default. A learning rate in a tensor is
                read now.
        """
        values = {name: group.get(name, default) for name, default in _DEFAULTS.items()}
        if isinstance(values["lr"], Tensor):
            values["lr"] = float(values["lr"])
        values["betas"] = tuple(values["betas"])
        kind = algorithm_of(group).rule
        if kind is not None:
            values["rule"] = kind.model_construct(**{name: group[name] for name in kind.model_fields})
        return cls.model_construct(**values)

    @property
    def inner_alpha(self) -> float:
        """The alpha that multiplies P R inside the step: alpha in the released formulation.

        In the paper's it is 1, and alpha multiplies the whole update instead.
        """
        return 1.0 if self.formulation == "paper" else self.alpha

    @property
    def decay_factor(self) -> float:
        """The share of a weight that decoupled weight decay leaves in one step, 1 - lr * weight_decay."""
        return 1.0 - self.lr * self.weight_decay

    @property
    def without_residual(self) -> bool:
        """Whether no step has a residual in it nor keeps its norm, so that none of it has to be computed."""
        return self.residual_scale == 0.0 and self.limiter == "none"


def one_number(value: object) -> object:
    """Refuse a truth value where a number belongs, and read a learning rate that torch users give as a tensor.

    Raises:
        ValueError: it is not one number.
    """
    # JSON's true would otherwise pass as the number 1.
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.numel() != 1 or value.dtype == torch.bool)):
        raise ValueError("not one number")
    return float(value) if isinstance(value, Tensor) else value


# The names of the settings; `rule` is an algorithm's base optimizer, no setting.
GROUP_FIELDS = tuple(name for name in GroupSettings.model_fields if name != "rule")
_DEFAULTS = {name: GroupSettings.model_fields[name].default for name in GROUP_FIELDS}
