"""All settings: those of a param group and those of the whole training, checked in one place.

A JSON config, a param group and the constructor all go through `check_params`, so a wrong value stops with the same
sentence wherever it came from.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, StrictBool, ValidationError, field_validator
from torch import Tensor

from ds_fira.core.algorithms import FIRA_ADAM, Algorithm, algorithm_of
from ds_fira.core.kernels import Choice
from ds_fira.core.quantization import require_library
from ds_fira.core.setting_fields import Whole, remedy_of, setting
from ds_fira.core.settings import GROUP_FIELDS, GroupSettings, ParamGroup
from ds_fira.optim.presets import PRESETS, PresetName, preset_rows


class Settings(GroupSettings):
    """Every setting of `FiraAdam`, of a param group or of the whole training."""

    max_group_bytes: Whole = setting(2**30, "give a whole number of bytes of at least 1, such as 1073741824", ge=1)
    """the most bytes that the float32 gradients of one param group take on one rank, which ZeRO copies at a time"""
    check_sync_every: Whole | None = setting(None, "give a whole number of steps, such as 100, or 0 for no check", ge=0)
    """inside an engine, steps from one comparison of the replicated weights over the ranks to the next; 0 for none,
    None for every 100 at stage 0 and none elsewhere
    """
    record_scaling_factors: Whole = setting(
        0, "give a whole number of steps, such as 10, 1 for every step, or 0 for no record", ge=0
    )
    """steps from one record of the scaling factors of all linear layers, projected or not, to the next
    (`ds_fira.scaling_factors`); 0 for none
    """
    unpickle_checkpoints: StrictBool = setting(False, "give true to let checkpoints run the code in them, or false")
    """whether `engine.load_checkpoint` runs what stands in a checkpoint's files, which takes trust in whoever wrote it,
    rather than refuse what needs it
    """
    async_save: StrictBool = setting(False, "give true to save checkpoints from behind, or false")
    """whether `engine.save_checkpoint` only copies the state to the host's memory, and a thread writes and publishes it
    while the training goes on
    """
    keep_last: Whole | None = setting(
        None, "give how many checkpoints to keep, at least 1, or leave it out to keep all", ge=1
    )
    """complete checkpoints that a save leaves in its folder, itself among them: once it is complete, it deletes older
    ones that `ds_fira` has saved; None deletes none
    """
    keep_every: Whole | None = setting(
        None, "give a whole number of steps, such as 10000, or leave it out to keep no others", ge=1
    )
    """with `keep_last`, steps from one checkpoint that stays for good to the next: those of its multiples"""
    kernels: Choice = setting("auto")
    """what computes a step on a GPU: "auto" the Triton kernels wherever they run, or "off", torch functions everywhere;
    `DS_FIRA_KERNELS=0` in the environment of every rank says "off" too
    """
    #  an empty name would match everything
    target_modules: tuple[Annotated[str, Field(min_length=1)], ...] | None = setting(
        None,
        "give parts of module names, such as ['q_proj', 'mlp'], or leave it out for every linear layer",
        min_length=1,
    )
    """with a rank, substrings of the names of the modules to project; None for every linear layer but the head"""
    preset: PresetName | None = setting(
        None, f"choose {' or '.join(map(repr, PRESETS))}, or leave it out for the published method"
    )
    """what gives the settings that are left out: "recommended" a learning rate, and a normalized residual of the size
    that the model's width and depth ask for, so that one rate suits models of every size; None for the defaults of
    this table, the published method
    """

    @field_validator("target_modules", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class SaveSettings(NamedTuple):
    """How an engine saves; see the fields of `Settings`."""

    async_save: bool = False
    keep_last: int | None = None
    keep_every: int | None = None


# What a param group may not set for itself: it acts before there are groups, or on the whole training.
NOT_OF_GROUPS = tuple(name for name in Settings.model_fields if name not in GroupSettings.model_fields)
# In the order in which messages list them.
LEGAL = (*GROUP_FIELDS, *NOT_OF_GROUPS)
# Options of torch's optimizers that are off here, and what to do for one that is on.
TORCH_OPTIONS = {
    "amsgrad": "remove it, low-rank states have no maximum of V",
    "maximize": "remove it, and minimize the loss times -1",
    "foreach": "remove it, parameters are stepped one at a time",
    "fused": "remove it, the kernels are fused wherever they can be",
    "differentiable": "remove it, autograd does not go through a step",
}
# Settings that go: the value that does without, and why.
DEPRECATED = {"refresh_limiter": ("keep", "it has no effect on perplexity (docs/reproduction.md)")}
# What other libraries call a setting, where the spelling alone would suggest another.
OTHER_NAMES = {"learning_rate": "lr", "beta1": "betas", "beta2": "betas", "epsilon": "eps", "wd": "weight_decay"}
OTHER_NAMES |= {"scale": "alpha"}


_said: set[tuple[str, str]] = set()  # optimizers and deprecated settings that a warning has named


class UnknownSetting(ValueError, TypeError):
    """An argument of a constructor that is no setting: a wrong call, as in Python, and a wrong setting too."""


def legal_settings(algorithm: Algorithm = FIRA_ADAM) -> tuple[str, ...]:
    """The names of an optimizer's settings."""
    own = algorithm.own_settings
    return (*(name for name in LEGAL if name not in (*algorithm.without, *own)), *own)


def group_settings(algorithm: Algorithm = FIRA_ADAM) -> tuple[str, ...]:
    """Those of them that a param group may set for itself."""
    return tuple(name for name in legal_settings(algorithm) if name not in NOT_OF_GROUPS)


def settings_of(group: ParamGroup) -> ParamGroup:
    """The settings of the optimizer that a param group has."""
    found = {name: group[name] for name in group_settings(algorithm_of(group)) if name in group}
    # A number at this moment, where it is a tensor that may change.
    return {**found, "lr": float(found["lr"])} if isinstance(found.get("lr"), Tensor) else found


def check_params(
    params: Mapping[str, object], where: str | None = None, algorithm: Algorithm = FIRA_ADAM
) -> dict[str, object]:
    """Check a `params` block (of a JSON config, or keyword arguments) and fill in the defaults.

    Args:
        params: setting names and values as the user wrote them.
        where: what the message names as the place of the fault; None for the optimizer's name.
        algorithm: the optimizer.

    Returns:
        All of its settings with values of the right types, but for those that a preset has yet to give.

    Raises:
        ValueError: a name is unknown or only another optimizer's, a value is out of range or needs a package that is
            not installed; one sentence with the name, the value, the remedy.
    """
    where, fault = (where, ValueError) if where else (algorithm.name, UnknownSetting)
    params = without_torch_options(params, where)
    refuse_foreign(params, where, algorithm)
    legal = legal_settings(algorithm)
    for key, value in params.items():
        if key not in legal:
            nearest = OTHER_NAMES.get(key) or difflib.get_close_matches(key, legal, n=1, cutoff=0.0)[0]
            raise fault(
                f"{where}: unknown setting {key!r} = {value!r}; did you mean {nearest!r}? "
                f"Legal settings are {', '.join(legal)}."
            )
    own = {name: params[name] for name in algorithm.own_settings if name in params}
    try:
        settings = Settings(**{name: value for name, value in params.items() if name not in own})
        rule = {} if algorithm.rule is None else algorithm.rule(**own).model_dump()
    except ValidationError as error:
        found = error.errors()[0]
        key, message = str(found["loc"][0]), found["msg"]
        if key in own:  # a rule's description is its remedy, else what pydantic says
            described = algorithm.rule.model_fields[key].description
            remedy = f"give {described}" if described else message[0].lower() + message[1:]
        else:
            remedy = remedy_of(Settings.model_fields[key])
        raise ValueError(f"{where}: {key} = {params[key]!r} is not legal; {remedy}.") from None
    if settings.target_modules is not None and settings.rank is None:
        raise ValueError(
            f"{where}: target_modules = {list(settings.target_modules)!r} needs a rank; "
            "add a rank, such as 128, or remove target_modules."
        )
    if settings.keep_every is not None and settings.keep_last is None:
        raise ValueError(
            f"{where}: keep_every = {settings.keep_every} says which checkpoints to spare, but no keep_last says "
            "that any are to be deleted; add keep_last, such as 3, or remove keep_every."
        )
    refuse_contradiction(settings, where)
    require_library(settings.state_dtype, where)
    awaited = [name for name in preset_rows(settings.preset) if name not in params]
    names = [name for name in legal if name not in awaited]
    checked = {name: value for name, value in {**settings.model_dump(), **rule}.items() if name in names}
    # As in torch: a learning rate in a tensor may be changed in place.
    return {**checked, "lr": params["lr"]} if isinstance(params.get("lr"), Tensor) else checked


def refuse_contradiction(settings: GroupSettings, where: str) -> None:
    """Stop if settings do not go together.

    Raises:
        ValueError: one sentence with the settings, their values and the remedy.
    """
    if settings.contradiction is not None:
        raise ValueError(f"{where}: {settings.contradiction}")


def without_torch_options(params: Mapping[str, object], where: str) -> dict[str, object]:
    """Settings without `TORCH_OPTIONS` that are off, as they are here anyway.

    Raises:
        ValueError: one is on; one sentence with the option, the value and the remedy.
    """
    for name, remedy in TORCH_OPTIONS.items():
        if params.get(name) not in (None, False):
            raise ValueError(f"{where}: {name} = {params[name]!r} is not supported; {remedy}.")
    return {name: value for name, value in params.items() if name not in TORCH_OPTIONS}


def refuse_foreign(params: Mapping[str, object], where: str, algorithm: Algorithm) -> None:
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


def warn_of_deprecated(params: Mapping[str, object], name: str) -> None:
    """Say once in a process of each setting of `DEPRECATED` that it goes, where it is set to make a difference.

    Args:
        params: settings as the user gave them; other keys are passed over.
        name: of the optimizer.
    """
    for key, (without, reason) in DEPRECATED.items():
        if params.get(key, without) != without and (name, key) not in _said:
            _said.add((name, key))
            warnings.warn(
                f"{name}: {key} = {params[key]!r} is deprecated, because {reason}; remove it.",
                DeprecationWarning,
                stacklevel=3,
            )


def warn_without_effect(param: Tensor, group: ParamGroup, name: str) -> None:
    """Say once in a process of a setting that does nothing to a tensor that is to be stepped.

    Args:
        param: the tensor.
        group: its param group.
        name: of the optimizer.
    """
    rounding, key = group.get("weight_rounding"), (name, "weight_rounding")
    if rounding == "stochastic" and param.dtype != torch.bfloat16 and param.numel() and key not in _said:
        _said.add(key)
        warnings.warn(
            f"{name}: weight_rounding = 'stochastic' does nothing to weights stepped in {param.dtype}, as an engine's "
            "master weights are; remove it, or have the optimizer step weights in bfloat16.",
            stacklevel=6,
        )


def refuse_auto(config: Mapping[str, object], name: str = FIRA_ADAM.name) -> None:
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
        value: object = config
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value == "auto":
            raise ValueError(
                f"{name}: {'.'.join(path)} = 'auto' in the DeepSpeed config is for the Hugging Face Trainer, which "
                f"replaces it; give {remedy}."
            )
