"""The settings of a param group: name, type, range, default, meaning and remedy of each, stated once.

The constructor, the JSON config, the checks and the table of the documentation are made from these fields. A step reads
them as attributes of one frozen `GroupSettings`, which `GroupSettings.of` makes of a param group's dict once a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool
from torch import Tensor

from ds_fira.core.algorithms import ADAM_STATES, DRAWN, algorithm_of
from ds_fira.core.precision import precision_of
from ds_fira.core.residuals import RESIDUALS, ResidualForm
from ds_fira.core.rules import Kind, Rule
from ds_fira.core.setting_fields import Beta, Whole, one_number, setting
from ds_fira.core.subspace import Side, basis_shape, projection_side, refresh_offset

# A param group as `torch.optim` holds it: its parameters and its settings.
ParamGroup = dict[str, object]


class GroupSettings(BaseModel):
    """Every setting that a param group may have for itself, checked."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, arbitrary_types_allowed=True
    )

    lr: Annotated[float, BeforeValidator(one_number)] = setting(
        1e-3, "give a learning rate of at least 0, such as 0.01", ge=0.0
    )
    """learning rate; a tensor of one element is read in every step, with `capturable` on its device"""
    betas: tuple[Beta, Beta] = setting(
        (0.9, 0.999), "give two numbers from 0 up to but not including 1, such as [0.9, 0.999]"
    )
    """decay rates of the moments"""
    eps: float = setting(1e-6, "give a number of at least 0, such as 1e-6", ge=0.0)
    """added to sqrt(V)"""
    weight_decay: float = setting(0.0, "give a number of at least 0", ge=0.0)
    """decoupled, applied after the update"""
    vector_lr_scale: float = setting(1.0, "give a number of at least 0, such as 0.1", ge=0.0)
    """multiplies the learning rate of parameters of one dimension, norms and biases; their weight decay goes by `lr`"""
    rank: Whole | None = setting(None, "give a whole number of at least 1, such as 128", ge=1)
    """subspace rank of the weights to project, in all groups that do not say `rank = None`; not used where some group
    has a rank of its own
    """
    update_proj_gap: Whole = setting(200, "give a whole number of steps of at least 1, such as 200", ge=1)
    """steps from one refresh of the subspace to the next"""
    alpha: float = setting(1.0, "give a number above 0, such as 0.25 or 1.0", gt=0.0)
    """scale of the back-projection (released), or of the whole update (paper)"""
    proj_type: Literal["std", "reverse_std", "left", "right"] = setting("std")
    """the projected side: "std" the smaller, "reverse_std" the larger, "left", "right" """
    gamma: float = setting(1.01, "give a number above 1, such as 1.01", gt=1.0)
    """the limiter's largest growth of the residual norm from one step to the next"""
    residual: Literal["scaled", "normalized", "none"] = setting("scaled")
    """the part of the gradient outside the subspace in the update: "scaled" by the base optimizer's factor (the paper),
    "normalized" by a running average of its own square, or "none" (GaLore)
    """
    residual_beta: Beta = setting(0.9, "give a number from 0 up to but not including 1, such as 0.9")
    """decay rate of the average that a "normalized" residual is divided by; 0 divides it by its own norm, and keeps no
    average
    """
    residual_warmup: Whole = setting(0, "give a whole number of steps of at least 0, such as 200", ge=0)
    """steps over which the residual grows, linearly, to its size; 0 for its size at once"""
    residual_scale: float = setting(1.0, "give a number of at least 0, such as 1.0", ge=0.0)
    """multiplies the residual in the update; 1 is the paper"""
    scaling: Literal["column", "matrix", "none"] = setting("column")
    """the factor of the residual per "column", per "matrix", or "none" (1)"""
    limiter: Literal["growth", "none"] | None = setting(None, "choose 'growth' or 'none', or leave it out")
    """"growth", the norm-growth limiter of the residual, or "none"; None is "growth" for a "scaled" residual and "none"
    for the others
    """
    formulation: Literal["released", "paper"] = setting("released")
    """"released", the code behind the published figures (PyPI `fira` 1.0.2), or "paper", Algorithm 1"""
    subspace: Literal["svd", "gram", "randomized"] = setting("svd")
    """how a basis is computed: "svd" exactly, "gram" from the Gram matrix, "randomized" by block power iteration"""
    refresh_moments: Literal["keep", "rotate", "reset"] = setting("keep")
    """what a refresh does to the moments: "keep" them (the paper), "rotate" them into the new basis, "reset" them"""
    refresh_limiter: Literal["keep", "reset"] = setting("keep")
    """what a refresh does to the residual norm that the limiter remembers: "keep" it (the paper), or "reset" it, so
    that the first step in a new subspace is not limited
    """
    stagger: StrictBool = setting(False)
    """whether the matrices refresh on different steps, spread over the gap"""
    state_dtype: Literal["float32", "bfloat16", "int8"] = setting("float32")
    """how basis and moments are stored: "float32" (float64 for float64 weights), "bfloat16", or "int8" (`pip install
    ds_fira[int8]`)
    """
    weight_rounding: Literal["nearest", "stochastic"] = setting("nearest")
    """how a step rounds weights in bfloat16: to the "nearest", where small steps are lost, or "stochastic", up or down
    by chance, so that they arrive on average; without effect on other dtypes, master weights in float32 among them
    """
    matmul_precision: Literal["float32", "tf32", "bfloat16"] | None = setting(
        None, "choose 'float32', 'tf32' or 'bfloat16', or leave it out"
    )
    """the precision of the matrix products of a step; None is "bfloat16" on a GPU that has it and "tf32" elsewhere,
    which is float32 on a CPU
    """
    exact_cuts: StrictBool = setting(False)
    """whether a matrix that ZeRO splits is stepped whole on its owner, equal to the bit to a matrix that is not split,
    even where exchanging low-rank data is cheaper
    """
    project_full_rank: StrictBool = setting(False)
    """whether a matrix whose rank is at or above its smaller side is projected, as the released code does, though its
    states are then larger; else it is stepped unprojected, with lr x alpha
    """
    capturable: StrictBool = setting(False)
    """whether a CUDA graph can capture the steps between refreshes, of an optimizer without an engine, whose `replay`
    makes them (docs/performance.md)
    """
    rule: Rule | None = Field(None, exclude=True, repr=False)
    # Where the kernels read the learning rate of a capturable group, whatever `lr` says.
    lr_tensor: Tensor | None = Field(None, exclude=True, repr=False)
    # Where its tensors are stepped.
    device: torch.device = Field(torch.device("cpu"), exclude=True, repr=False)

    @classmethod
    def of(cls, group: Mapping[str, object]) -> GroupSettings:
        """The settings of a param group, whose values were checked when they were given.

        Args:
            group: as `torch.optim` holds it; a setting that it lacks has its default. A learning rate in a tensor is
                read now.
        """
        algorithm = algorithm_of(group)
        values = {name: group.get(name, default) for name, default in {**_DEFAULTS, **algorithm.fixed}.items()}
        if isinstance(values["lr"], Tensor):
            # The host must not wait for it where a step reads it on the device; `learning_rate` does when it is asked.
            on_device = values["capturable"]
            values["lr_tensor"] = values["lr"] if on_device else None
            values["lr"] = math.nan if on_device else float(values["lr"])
        values["betas"] = tuple(values["betas"])
        params = group.get("params")
        # A group that is being made may hold pairs with names, or something that can be read once.
        if isinstance(params, list) and params and isinstance(params[0], Tensor):
            values["device"] = params[0].device
        kind = algorithm.rule
        if kind is not None:
            values["rule"] = kind.model_construct(**{name: group[name] for name in kind.model_fields})
        # Not `model_construct`, which takes five times as long: a step does this for every group.
        return _DEFAULT_SETTINGS.model_copy(update=values)

    @property
    def residual_form(self) -> ResidualForm:
        """What the residual is made of, and what goes with it."""
        return RESIDUALS[self.residual]

    @property
    def alpha_is_outside(self) -> bool:
        """Whether alpha multiplies the whole update, and the bias correction N alone, as in the paper's formulation.

        The released one has alpha in the residual and before P N, and the bias correction in the step size.
        """
        return self.formulation == "paper" or self.residual_form.alpha_is_outside

    @property
    def inner_alpha(self) -> float:
        """The alpha that multiplies P R inside the step: 1 where alpha multiplies the whole update instead; or 0."""
        if self.residual_form.is_update:
            return 0.0
        return 1.0 if self.alpha_is_outside else self.alpha

    @property
    def residual_factor(self) -> float:
        """What multiplies S in the update: `residual_scale`, and alpha where S is the whole of it."""
        return self.alpha if self.residual_form.is_update else self.residual_scale

    def unprojected_scale(self, vector: bool) -> float:
        """What multiplies the step of a parameter that is not projected, and not its weight decay.

        Args:
            vector: whether it has at most one dimension. In a group with a rank all step as projected matrices do.
        """
        if self.rank is not None:
            return self.alpha
        return self.vector_lr_scale if vector else 1.0

    @property
    def draws_basis(self) -> bool:
        """Whether bases are drawn in every step, and no state."""
        return self.subspace == DRAWN

    def basis_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the stored basis of a matrix of shape (m, n); without rows where it is drawn."""
        return basis_shape(shape, self.rank, self.side_of(shape), drawn=self.draws_basis)

    def update_rank(self, rank: int) -> int:
        """The rank of C, the part of the update in the subspace, for a matrix of rank r: r, or 0 without one."""
        return 0 if self.residual_form.is_update else rank

    @property
    def state_kinds(self) -> Mapping[str, Kind]:
        """The base optimizer's states of a matrix by name, and what a refresh may do to each."""
        return ADAM_STATES if self.rule is None else type(self.rule).states

    def side_of(self, shape: tuple[int, int]) -> Side:
        """The side on which a matrix of shape (m, n) is projected."""
        return projection_side(shape, self.proj_type, self.formulation)

    def refresh_offset_of(self, index: int) -> int:
        """Steps by which the refreshes of the matrix with this number in the model are moved; 0 without `stagger`."""
        return refresh_offset(index, self.update_proj_gap) if self.stagger else 0

    @property
    def decay_factor(self) -> float:
        """The share of a weight that decoupled weight decay leaves in one step, 1 - lr * weight_decay."""
        return 1.0 - self.learning_rate * self.weight_decay

    @property
    def learning_rate(self) -> float:
        """The learning rate, which the host waits for where it lies on a device."""
        return self.lr if self.lr_tensor is None else float(self.lr_tensor)

    @property
    def has_one_factor(self) -> bool:
        """Whether one factor of the residual is for all columns or rows of a matrix."""
        return self.residual_form.factors is not None and self.scaling != "column"

    @property
    def chosen_limiter(self) -> str:
        """The limiter, where none was given the one that goes with the residual."""
        form = self.residual_form
        return form.limiter if self.limiter is None or form.factors is None else self.limiter

    @property
    def chosen_precision(self) -> str:
        """The precision of the products, where none was given that of the device on which they are made."""
        return self.matmul_precision or precision_of(self.device)

    @property
    def rounds_stochastically(self) -> bool:
        """Whether a step rounds weights in bfloat16 by chance."""
        return self.weight_rounding == "stochastic"

    def weight_seed(self, step: int | Tensor) -> int | Tensor | None:
        """The seed by which a step, counted from 1, rounds weights in bfloat16; None to round to the nearest."""
        return -step if self.rounds_stochastically else None

    @property
    def chosen(self) -> dict[str, str]:
        """The settings that may be left to others, by name, as they act."""
        return {"limiter": self.chosen_limiter, "matmul_precision": self.chosen_precision}

    @property
    def has_limiter(self) -> bool:
        """Whether the growth of the residual is limited, so that its norm is needed in every step."""
        return self.chosen_limiter == "growth"

    @property
    def measures_residual(self) -> bool:
        """Whether |S| is summed from the residual itself where the difference of squares has lost its digits."""
        return self.has_limiter and self.residual_form.cancels

    def averages_of(self, entries: int) -> int:
        """Numbers in p, the average of a normalized residual's squares, for so many columns or rows; 0 for no p."""
        if not self.residual_form.averages or self.residual_beta == 0.0:
            return 0
        return 1 if self.scaling == "matrix" else entries

    @property
    def contradiction(self) -> str | None:
        """Which of its settings do not go together and what to do, in the words behind a place; None where all do."""
        residual = f"residual = {self.residual!r}"
        if self.residual_form.needs_scaling and self.scaling == "none":
            what = "the gradient" if self.residual_form.is_update else residual
            return f"scaling = 'none' leaves {what} without a factor; choose 'column' or 'matrix'."
        if self.residual_form.factors is None and self.limiter == "growth":
            return f"limiter = 'growth' has nothing to limit with {residual}; leave it out."
        return None


# The names of the settings; not `rule`, an algorithm's base optimizer, and places, which are excluded as it is.
GROUP_FIELDS = tuple(name for name, field in GroupSettings.model_fields.items() if not field.exclude)
_DEFAULTS = {name: GroupSettings.model_fields[name].default for name in GROUP_FIELDS}
_DEFAULT_SETTINGS = GroupSettings()
