"""The optimizers of this package as `torch.optim.Optimizer`, alone or inside DeepSpeed: what all of them share.

Alone, a parameter is one matrix, or several (3-D expert tensors). Inside ZeRO a parameter is a flat partition, and
`bind` tells which matrices lie in it, whole or split. Both take the same path: a list of `MatrixTask`, refreshed, then
updated one by one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_fira.checkpoint.named_state import KEY as DESCRIPTION
from ds_fira.checkpoint.named_state import StateDict
from ds_fira.core import kernels
from ds_fira.core.algorithms import KEY
from ds_fira.core.capture import capturing
from ds_fira.core.selection import numel_of, projected_elsewhere, shape_of
from ds_fira.core.settings import GroupSettings, ParamGroup
from ds_fira.observe.metrics import StepMetrics
from ds_fira.observe.scaling_recorder import ScalingRecorder
from ds_fira.optim.attachment import EngineAttachment
from ds_fira.optim.capturing import Capturing, refuse_capturable
from ds_fira.optim.constructor import Params, bind, documented, signature_of
from ds_fira.optim.doors import note_model
from ds_fira.optim.param_groups import by_kind, group_defaults
from ds_fira.optim.presets import PRESET, preset_in, preset_mark, projected_matrices, take_mark, values_of
from ds_fira.optim.rank_rule import grouped, linear_weights, ranked_groups
from ds_fira.optim.settings import (
    SaveSettings,
    check_params,
    group_settings,
    refuse_contradiction,
    refuse_foreign,
    settings_of,
    warn_of_deprecated,
    without_torch_options,
)
from ds_fira.optim.state_size import ParamRecord
from ds_fira.optim.user_groups import GivenGroups
from ds_fira.sharding.comm import is_first_process
from ds_fira.sharding.geometry import matrices_of
from ds_fira.sharding.projection import PROJECT_FULL_RANK, warn_of_costly_ranks
from ds_fira.sharding.refresher import Refresher

# Every one that a constructor has made, as long as somebody has it; not its copies.
MADE: weakref.WeakSet[LowRankOptimizer] = weakref.WeakSet()


class LowRankOptimizer(Capturing, GivenGroups):
    """What the optimizers of this package have in common: low-rank states for matrices, and the same for the rest.

    Param groups with a `rank` are projected; their parameters are 2-D, or 3-D for experts. Groups without one are
    stepped by the same rule without a projection. Where no group has a rank, the constructor's applies to all of them,
    as `ds_fira.optim.rank_rule.ranked_groups` says.

    Args:
        params: the model, parameters, (name, parameter) pairs, or param groups.
        *positional: lr, betas, eps, weight_decay, where the base optimizer is Adam.
        **given: settings of the algorithm; the docstring and the signature of its class list them.

    Attributes:
        algorithm: what the optimizer is; of the class.

    Raises:
        ValueError: a value is out of range, there is no rank, or a parameter cannot be projected.
    """

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        if "algorithm" in vars(cls):
            cls.__signature__ = signature_of(cls.algorithm)
            cls.__doc__ = documented(cls.__doc__ or "", cls.algorithm)
        elif "__init__" in vars(cls):
            cls.__signature__ = None  # a user's own constructor has its own

    def __init__(self, params: Params, *positional: object, **given: object) -> None:
        given = bind(self.algorithm, positional, given)
        self._reset_runtime()
        self.given: list[dict[str, object]] = []
        model = params if isinstance(params, nn.Module) else None
        if model is not None:
            model = note_model(model)
            params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        params = [params] if isinstance(params, Tensor) else list(params)
        groups = given_groups = grouped(params)
        settings = check_params({**preset_in(groups), **given}, algorithm=self.algorithm)
        mark = take_mark(groups, given, self.algorithm.name)
        self.check_sync_every = settings["check_sync_every"]
        self.unpickle_checkpoints = settings["unpickle_checkpoints"]
        self.saving = SaveSettings(settings["async_save"], settings["keep_last"], settings["keep_every"])
        self.kernels = kernels.chosen(settings["kernels"])
        if settings["record_scaling_factors"]:
            self.recorder = ScalingRecorder(settings["record_scaling_factors"], *linear_weights(groups, model))
        if is_first_process():
            for each in (given, *groups):
                warn_of_deprecated(each, self.algorithm.name)
        rank, target_modules = settings["rank"], settings["target_modules"]
        groups = ranked_groups(groups, rank, target_modules, self.algorithm.name, model) if params else []
        if groups and settings.get(PRESET) is not None:
            matrices = projected_matrices(groups) + projected_elsewhere(model, rank, target_modules)
            mark = {**preset_mark(settings[PRESET], matrices), **mark}
            settings = check_params({**values_of(mark), **settings}, algorithm=self.algorithm)
        left = {PRESET: {name: mark[name] for name in mark if name not in given}} if mark else {}
        super().__init__(groups, {**group_defaults(settings), **self.algorithm.group_values, **left})
        self.note_given(given_groups)
        MADE.add(self)
        if is_first_process():
            self.tell_of_parts(len(given_groups), self.algorithm.name)
            warn_of_costly_ranks(self.param_groups)

    def _reset_runtime(self) -> None:
        """What does not travel with a state dict, a pickle or a copy."""
        self.suspended = False
        self.check_sync_every = 0
        self.unpickle_checkpoints = False
        self.saving = SaveSettings()
        self.kernels = kernels.chosen("auto")
        self.recorder: ScalingRecorder | None = None
        self._recording = False
        self.metrics = StepMetrics()
        self._forget_attachment()
        self._forget_captures()
        self._forget_given_groups()
        self._refresher = Refresher(self.metrics, self.algorithm.name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also called by load_state_dict, on an optimizer that knows its place already.
        fresh = "_bound" not in self.__dict__
        if fresh:
            self._reset_runtime()
        super().__setstate__(state)
        for group in self.param_groups:
            # Of version 0.1.0, which projected at any rank.
            group.setdefault(PROJECT_FULL_RANK, True)
            # Of 0.1.0 and its successors, which knew of no graph.
            group.setdefault("capturable", False)
            upgraded = self.algorithm.upgraded(group)
            group.clear()
            group.update(upgraded)
        if fresh:
            self.given = [settings_of(group) for group in self.param_groups]
            self.origins = list(range(len(self.param_groups)))

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group as in `torch.optim`, its own settings checked.

        Raises:
            ValueError: a setting is out of range, a parameter is complex, or one in a group with a rank has neither 2
                nor 3 dimensions.
        """
        self._refuse_algorithm(param_group)
        if self.attachment.stand_ins:
            raise ValueError(
                f"{self.algorithm.name} param group: the parameters are sharded, and which rank steps what was settled "
                "at the first step; give the optimizer all param groups before."
            )
        if param_group.get(PRESET) is not None:
            raise ValueError(
                f"{self.algorithm.name} param group: preset = {param_group[PRESET]!r} concerns the whole training; "
                "give it when the optimizer is made, whose alpha a group added later has, unless it gives its own."
            )
        own = {name: param_group[name] for name in group_settings(self.algorithm) if name in param_group}
        where = f"{self.algorithm.name} param group"
        without_torch_options(param_group, where)
        if is_first_process():
            warn_of_deprecated(own, self.algorithm.name)
        checked = check_params(own, where, self.algorithm)
        param_group = {**param_group, **{name: checked[name] for name in own}}
        # With what it takes from the constructor; an engine's configs and records read the limiter that is meant.
        settings = GroupSettings.of({**self.defaults, **param_group})
        refuse_contradiction(settings, where)
        param_group["limiter"] = settings.chosen_limiter
        if "rank" in own and own["rank"] is None:
            del param_group["rank"]
        super().add_param_group(param_group)
        self._forget_captures()
        group = self.param_groups[-1]
        refuse_capturable(settings, group["params"], where, self.algorithm, self.kernels)
        if PRESET in group:
            group[PRESET] = {name: value for name, value in group[PRESET].items() if name not in own}
        # Kept apart from the group, whose values a scheduler or the user may change in the course of a run.
        self.given.append(settings_of(group))
        self.origins.append(max((*self.origins, *self.idle), default=-1) + 1)
        for param in group["params"]:
            if param.is_complex():
                raise ValueError(
                    f"{self.algorithm.name}: a parameter of dtype {param.dtype} cannot be optimized; use "
                    "its torch.view_as_real."
                )
            if "rank" in group and numel_of(param) > 0:
                matrices_of("", shape_of(param), optimizer=self.algorithm.name)

    def _refuse_algorithm(self, param_group: ParamGroup) -> None:
        """Stop if a group says that another optimizer of this package is to step it."""
        name, own = param_group.get(KEY, self.algorithm.name), self.algorithm.group_values
        if name != self.algorithm.name:
            raise ValueError(
                f"{self.algorithm.name} param group: {KEY} = {name!r} belongs to another optimizer; make the group "
                "anew."
            )
        others = {key: value for key, value in param_group.items() if key not in own or own[key] != value}
        refuse_foreign(others, f"{self.algorithm.name} param group", self.algorithm)

    def separate(self) -> None:
        """Split groups with a rank that projects some of their matrices only: a flat partition has to be of one kind.

        And held by the same ranks: experts come apart. Not where a scheduler of torch's holds a list of one learning
        rate a group; one of `user_groups` may.
        """
        if hasattr(self.step, "_wrapped_by_lr_sched"):
            return
        groups, given, origins = self.param_groups, self.given, self.origins
        parts = [by_kind(group, group) for group in groups]
        self.given = [dict(own) for own, kinds in zip(given, parts, strict=True) for _ in kinds]
        self.origins = [number for number, kinds in zip(origins, parts, strict=True) for _ in kinds]
        groups[:] = [part for kinds in parts for part in kinds]

    def project_full_rank(self, values: Mapping[int, bool]) -> None:
        """Set `project_full_rank` of groups, by their numbers, and forget what lies where."""
        for number, value in values.items():
            self.param_groups[number][PROJECT_FULL_RANK] = value
        self._forget_attachment()

    def await_attachment(self, flat: bool) -> None:
        """Make no step before `attach`: engines step as they are built, with zero gradients, and would decay weights.

        Args:
            flat: whether the engine makes each param group one flat tensor, which has to be of one kind.
        """
        if any(group["capturable"] for group in self.param_groups):
            raise ValueError(
                f"{self.algorithm.name}: capturable = True is not supported inside an engine, whose step has the host "
                "read norms and loss scales; remove it."
            )
        self.suspended = True
        self.drop_empty()
        if flat:
            self.separate()

    def state_dict(self) -> StateDict:
        """As `Resumable.state_dict`, with the numbers of the groups that the user gave."""
        result = super().state_dict()
        result[DESCRIPTION]["user_groups"] = list(self.origins)
        return result

    def attach(self, attachment: EngineAttachment) -> None:
        """Take over what an engine says of the stepped tensors, and step from now on."""
        self._forget_attachment()
        self.attachment = attachment
        self._bound.update(attachment.matrices)
        self.suspended = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with the gradients as they are.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, None without one.

        Raises:
            ValueError: a gradient is sparse; or a CUDA graph captures the step, which cannot be captured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.suspended:
            return loss
        self.find_place()
        with kernels.switched(self.kernels):
            if capturing():
                self._capture_step()
            else:
                for group, params, settings in self._groups_to_step():
                    self._step_group(group, params, settings)
        return loss

    @property
    def inventory(self) -> Sequence[ParamRecord]:
        """The parameters that are optimized, over all ranks."""
        return self.attachment.inventory or [
            ParamRecord.of("", shape_of(p), group) for group in self.param_groups for p in group["params"]
        ]
