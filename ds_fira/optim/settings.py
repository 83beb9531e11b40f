"""The settings of FiraAdam: their types, ranges and defaults, checked in one place.

A JSON config, a param group and the constructor all go through `Settings`, so a wrong value stops with the same
sentence wherever it came from.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator
from torch import Tensor

from ds_fira.core.algorithms import FIRA_ADAM, Algorithm
from ds_fira.core.quantization import require_library
from ds_fira.core.rules import Rule

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

REMEDIES = {
    "lr": "give a learning rate of at least 0, such as 0.01",
    "betas": "give two numbers from 0 up to but not including 1, such as [0.9, 0.999]",
    "eps": "give a number of at least 0, such as 1e-6",
    "weight_decay": "give a number of at least 0",
    "rank": "give a whole number of at least 1, such as 128",
    "update_proj_gap": "give a whole number of steps of at least 1, such as 200",
    "alpha": "give a number above 0, such as 0.25 or 1.0",
    "proj_type": "choose 'std', 'reverse_std', 'left' or 'right'",
    "gamma": "give a number above 1, such as 1.01",
    "residual_scale": "give a number of at least 0, such as 1.0",
    "scaling": "choose 'column', 'matrix' or 'none'",
    "limiter": "choose 'growth' or 'none'",
    "formulation": "choose 'released' or 'paper'",
    "subspace": "choose 'svd', 'gram' or 'randomized'",
    "refresh_moments": "choose 'keep', 'rotate' or 'reset'",
    "refresh_limiter": "choose 'keep' or 'reset'",
    "stagger": "give true or false",
    "state_dtype": "choose 'float32', 'bfloat16' or 'int8'",
    "matmul_precision": "choose 'float32', 'tf32' or 'bfloat16'",
    "exact_cuts": "give true or false",
    "project_full_rank": "give true or false",
    "max_group_bytes": "give a whole number of bytes of at least 1, such as 1073741824",
    "check_sync_every": "give a whole number of steps, such as 100, or 0 for no check",
    "record_scaling_factors": "give a whole number of steps, such as 10, 1 for every step, or 0 for no record",
    "unpickle_checkpoints": "give true to let checkpoints run the code in them, or false",
    "target_modules": "give parts of module names, such as ['q_proj', 'mlp'], or leave it out for every linear layer",
}


class Settings(BaseModel):
    """Every hyper-parameter of `FiraAdam`, with its default and its legal range.

    `lr`, `betas`, `eps` and `weight_decay` are AdamW's. The rest belongs to projected groups: `rank` (of the weights
    to project), `update_proj_gap` in steps, `alpha` (GaLore's scale of the back-projection), `proj_type` (which side is
    projected), `gamma` (the limiter's largest growth of the residual norm from one step to the next),
    `residual_scale` (multiplies the scaled residual in the update; the paper has 1), `scaling`, `limiter`,
    `formulation`, `subspace` (how a basis is computed), `refresh_moments` (what a refresh does to the moments),
    `refresh_limiter` (what it does to the limiter's residual norm), `stagger` (matrices refresh on different steps),
    `state_dtype`, `matmul_precision`, `exact_cuts` (whole steps for cut matrices), `project_full_rank` (also where the
    rank saves nothing: `ds_fira.sharding.projection`) and `target_modules` (substrings of the names of the modules to
    project). `max_group_bytes` caps the float32 gradients of one param group on one rank, which ZeRO copies at a time.
    `check_sync_every` is the number of steps from one comparison of the replicated weights
    over the ranks to the next, 0 for none, None for `ds_fira.engine.deepspeed.weight_sync.DEFAULT` at stage 0 and none
    elsewhere; `record_scaling_factors` those from one record of the scaling factors to the next
    (`ds_fira.scaling_factors`), 0 for none. `unpickle_checkpoints` lets a checkpoint that is loaded run what stands in
    its files, as DeepSpeed does; without it only tensors and plain values are read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    lr: float = Field(1e-3, ge=0.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-6, ge=0.0)
    weight_decay: float = Field(0.0, ge=0.0)
    rank: int | None = Field(None, ge=1)
    update_proj_gap: int = Field(200, ge=1)
    alpha: float = Field(1.0, gt=0.0)
    proj_type: Literal["std", "reverse_std", "left", "right"] = "std"
    gamma: float = Field(1.01, gt=1.0)
    residual_scale: float = Field(1.0, ge=0.0)
    scaling: Literal["column", "matrix", "none"] = "column"
    limiter: Literal["growth", "none"] = "growth"
    formulation: Literal["released", "paper"] = "released"
    subspace: Literal["svd", "gram", "randomized"] = "svd"
    refresh_moments: Literal["keep", "rotate", "reset"] = "keep"
    refresh_limiter: Literal["keep", "reset"] = "keep"
    stagger: StrictBool = False
    state_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    matmul_precision: Literal["float32", "tf32", "bfloat16"] = "tf32"
    exact_cuts: StrictBool = False
    project_full_rank: StrictBool = False
    max_group_bytes: int = Field(2**30, ge=1)
    check_sync_every: int | None = Field(None, ge=0)
    record_scaling_factors: int = Field(0, ge=0)
    unpickle_checkpoints: StrictBool = False
    target_modules: tuple[str, ...] | None = None

    @field_validator(
        "rank",
        "update_proj_gap",
        "lr",
        "max_group_bytes",
        "check_sync_every",
        "record_scaling_factors",
        mode="before",
    )
    @classmethod
    def _no_bool(cls, value: Any) -> Any:
        # JSON's true would otherwise pass as the number 1. A tensor is torch's way to give a learning rate.
        if isinstance(value, bool) or (isinstance(value, Tensor) and (value.numel() != 1 or value.dtype == torch.bool)):
            raise ValueError("not one number")
        return float(value) if isinstance(value, Tensor) else value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (not value or not all(value)):
            raise ValueError("an empty name matches nothing or everything")
        return value


LEGAL = tuple(Settings.model_fields)
# Options of torch's optimizers that are off here, and what to do for one that is on.
TORCH_OPTIONS = {
    "amsgrad": "remove it, low-rank states have no maximum of V",
    "maximize": "remove it, and minimize the loss times -1",
    "foreach": "remove it, parameters are stepped one at a time",
    "fused": "remove it, the kernels are fused wherever they can be",
    "capturable": "remove it, a step cannot be captured in a CUDA graph",
    "differentiable": "remove it, autograd does not go through a step",
}
# What other libraries call a setting, where the spelling alone would suggest another.
OTHER_NAMES = {"learning_rate": "lr", "beta1": "betas", "beta2": "betas", "epsilon": "eps", "wd": "weight_decay"}
OTHER_NAMES |= {"scale": "alpha"}
# What a param group may not set for itself: it acts before there are groups, or on the whole training.
NOT_OF_GROUPS = (
    "target_modules",
    "max_group_bytes",
    "check_sync_every",
    "record_scaling_factors",
    "unpickle_checkpoints",
)


def legal_settings(algorithm: Algorithm = FIRA_ADAM) -> tuple[str, ...]:
    """The names of an optimizer's settings."""
    own = algorithm.own_settings
    return (*(name for name in LEGAL if name not in (*algorithm.without, *own)), *own)


def group_settings(algorithm: Algorithm = FIRA_ADAM) -> tuple[str, ...]:
    """Those of them that a param group may set for itself."""
    return tuple(name for name in legal_settings(algorithm) if name not in NOT_OF_GROUPS)


GROUP_SETTINGS = group_settings()


def check_params(params: dict[str, Any], where: str | None = None, algorithm: Algorithm = FIRA_ADAM) -> dict[str, Any]:
    """Check a `params` block (of a JSON config, or keyword arguments) and fill in the defaults.

    Args:
        params: setting names and values as the user wrote them.
        where: what the message names as the place of the fault; None for the optimizer's name.
        algorithm: the optimizer.

    Returns:
        All of its settings with values of the right types.

    Raises:
        ValueError: a name is unknown or only another optimizer's, a value is out of range or needs a package that is
            not installed; one sentence with the name, the value, the remedy.
    """
    where = where or algorithm.name
    params = without_torch_options(params, where)
    refuse_foreign(params, where, algorithm)
    legal = legal_settings(algorithm)
    unknown = [key for key in params if key not in legal]
    if unknown:
        key = unknown[0]
        nearest = OTHER_NAMES.get(key) or difflib.get_close_matches(key, legal, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{where}: unknown setting {key!r} = {params[key]!r}; did you mean {nearest!r}? "
            f"Legal settings are {', '.join(legal)}."
        )
    own = {name: params[name] for name in algorithm.own_settings if name in params}
    try:
        settings = Settings(**{name: value for name, value in params.items() if name not in own})
        rule = {} if algorithm.rule is None else algorithm.rule(**own).model_dump()
    except ValidationError as error:
        found = error.errors()[0]
        key = str(found["loc"][0])
        remedy = _remedy(algorithm.rule, key, found["msg"]) if key in own else REMEDIES[key]
        raise ValueError(f"{where}: {key} = {params[key]!r} is not legal; {remedy}.") from None
    if settings.target_modules is not None and settings.rank is None:
        raise ValueError(
            f"{where}: target_modules = {list(settings.target_modules)!r} needs a rank; "
            "add a rank, such as 128, or remove target_modules."
        )
    require_library(settings.state_dtype, where)
    checked = {name: value for name, value in {**settings.model_dump(), **rule}.items() if name in legal}
    # As in torch: a learning rate in a tensor may be changed in place.
    return {**checked, "lr": params["lr"]} if isinstance(params.get("lr"), Tensor) else checked


def without_torch_options(params: dict[str, Any], where: str) -> dict[str, Any]:
    """Settings without `TORCH_OPTIONS` that are off, as they are here anyway.

    Raises:
        ValueError: one is on; one sentence with the option, the value and the remedy.
    """
    for name, remedy in TORCH_OPTIONS.items():
        if params.get(name) not in (None, False):
            raise ValueError(f"{where}: {name} = {params[name]!r} is not supported; {remedy}.")
    return {name: value for name, value in params.items() if name not in TORCH_OPTIONS}


def _remedy(rule: type[Rule], name: str, found: str) -> str:
    """What to give for a hyper-parameter of a rule: its description, or what pydantic says."""
    description = rule.model_fields[name].description
    return f"give {description}" if description else found[0].lower() + found[1:]


def refuse_foreign(params: dict[str, Any], where: str, algorithm: Algorithm) -> None:
    """Stop if there are settings that only FiraAdam has.

    Raises:
        ValueError: one sentence with the setting, the value and the remedy.
    """
    for key in algorithm.without:
        if key in params:
            raise ValueError(
                f"{where}: {key} = {params[key]!r} is a setting of FiraAdam that {algorithm.name} has no use for; "
                "remove it, or train with FiraAdam."
            )


def refuse_auto(config: dict[str, Any]) -> None:
    """Stop if a DeepSpeed config says "auto" outside the optimizer's `params`, which have their own check.

    Only the Hugging Face Trainer and Accelerate know the word. DeepSpeed drops it where a truth value belongs, so that
    a bf16 training would be one in float32.

    Raises:
        ValueError: one sentence with the setting and the remedy.
    """
    for path, remedy in (
        (("bf16", "enabled"), "true or false"),
        (("fp16", "enabled"), "true or false"),
        (("gradient_clipping",), "a number, such as 1.0, or 0 for none"),
    ):
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value == "auto":
            raise ValueError(
                f"FiraAdam: {'.'.join(path)} = 'auto' in the DeepSpeed config is for the Hugging Face Trainer, which "
                f"replaces it; give {remedy}."
            )
