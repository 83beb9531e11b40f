"""The optimizers of this package as `torch.optim.Optimizer`, alone or inside DeepSpeed: what all of them share.

Alone, a parameter is one matrix, or several (3-D expert tensors). Inside ZeRO a parameter is a flat partition, and
`bind` tells which matrices lie in it, whole or cut. Both take the same path: a list of `MatrixTask`, refreshed, then
updated one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_fira import functional as F
from ds_fira import kernels
from ds_fira.adamw import step_adamw_
from ds_fira.binding import Binding, batch_runs, stacked
from ds_fira.comm import Channel, CutExchange
from ds_fira.groups import group_defaults, split_flat_list
from ds_fira.layout import GroupLayout
from ds_fira.matrix_step import MatrixTask, update
from ds_fira.memory import ParamRecord
from ds_fira.methods import KEY
from ds_fira.refresh import Refresher
from ds_fira.resumable import Resumable, settings_of
from ds_fira.rule_step import rule_of, step_plain_
from ds_fira.scaling_record import ScalingRecorder
from ds_fira.scaling_series import Series
from ds_fira.settings import check_params, group_settings, refuse_foreign
from ds_fira.shard import matrices_of
from ds_fira.state import (
    EXP_AVG,
    EXP_AVG_SQ,
    STEP,
    compute_dtype,
    matrix_states,
    stored_moment,
)
from ds_fira.tracking import StepMetrics
from ds_fira.zero_shapes import shape_of


class LowRankOptimizer(Resumable):
    """What the optimizers of this package have in common: low-rank states for matrices, and the same for the rest.

    Param groups with a `rank` key are projected; their parameters are 2-D, or 3-D for experts. Groups without one are
    stepped by the same rule without a projection. A flat list of parameters with a constructor `rank` is split as
    `ds_fira.param_groups` would.

    Args:
        params: parameters, (name, parameter) pairs, or param groups; groups may set every argument but
            `target_modules`, `check_sync_every`, `record_scaling_factors` and `unpickle_checkpoints` for themselves.
        **given: settings of the method; `rank` never applies to param groups.

    Attributes:
        method: what the optimizer is; of the class.

    Raises:
        ValueError: a value is out of range, nothing is to be projected, or a parameter cannot be.
    """

    def __init__(self, params: Iterable[Any], **given: Any) -> None:
        if "max_group_bytes" in given:
            raise ValueError(
                f"{self.method.name}: max_group_bytes = {given['max_group_bytes']!r} is a setting of DeepSpeed "
                "configs; remove it here."
            )
        settings = check_params(given, method=self.method)
        params = [params] if isinstance(params, Tensor) else list(params)
        self._reset_runtime()
        self.given: list[dict[str, Any]] = []
        self.check_sync_every = settings["check_sync_every"]
        self.unpickle_checkpoints = settings["unpickle_checkpoints"]
        if settings["record_scaling_factors"]:
            self.recorder = ScalingRecorder(settings["record_scaling_factors"])
        if settings["rank"] is not None and params:
            if not isinstance(params[0], dict):
                params = split_flat_list(params, settings["rank"], settings["target_modules"])
            elif not any("rank" in group for group in params):
                warnings.warn(
                    f"{self.method.name}: rank = {settings['rank']} does not apply to param groups, and none has a "
                    "'rank' of its own: nothing is projected. Give the groups a 'rank', or pass a flat list.",
                    stacklevel=3,
                )
        super().__init__(params, {**group_defaults(settings), **self.method.group_values})

    def _reset_runtime(self) -> None:
        """What does not travel with a state dict, a pickle or a copy."""
        self.suspended = False
        self.check_sync_every = 0
        self.unpickle_checkpoints = False
        self.recorder: ScalingRecorder | None = None
        self._recording = False
        self.metrics = StepMetrics()
        # Set where the optimizer runs inside an engine.
        self.channel: Channel | None = None
        self.layouts: list[GroupLayout] = []
        self.inventory_of_module: list[ParamRecord] | None = None
        self.gradient_dtypes: dict[Tensor, torch.dtype] = {}
        self._reset_places()
        self._refresher = Refresher(self.metrics)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also called by load_state_dict, on an optimizer that knows its place already.
        fresh = "_bindings" not in self.__dict__
        if fresh:
            self._reset_runtime()
        super().__setstate__(state)
        if fresh:
            self.given = [settings_of(group) for group in self.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in `torch.optim`, its own settings checked.

        Raises:
            ValueError: a setting is out of range, a parameter is complex, or one in a group with a rank has neither 2
                nor 3 dimensions.
        """
        self._refuse_method(param_group)
        own = {name: param_group[name] for name in group_settings(self.method) if name in param_group}
        checked = check_params(own, f"{self.method.name} param group", self.method)
        param_group = {**param_group, **{name: checked[name] for name in own}}
        if "rank" in own and own["rank"] is None:
            del param_group["rank"]
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Kept apart from the group, whose values a scheduler or the user may change in the course of a run.
        self.given.append(settings_of(group))
        for param in group["params"]:
            if param.is_complex():
                raise ValueError(
                    f"{self.method.name}: a parameter of dtype {param.dtype} cannot be optimized; use "
                    "its torch.view_as_real."
                )
            if "rank" in group:
                matrices_of("", shape_of(param))

    def _refuse_method(self, param_group: dict[str, Any]) -> None:
        """Stop if a group says that another optimizer of this package is to step it."""
        name, own = param_group.get(KEY, self.method.name), self.method.group_values
        if name != self.method.name:
            raise ValueError(
                f"{self.method.name} param group: {KEY} = {name!r} belongs to another optimizer; make the group anew."
            )
        others = {key: value for key, value in param_group.items() if key not in own or own[key] != value}
        refuse_foreign(others, f"{self.method.name} param group", self.method)

    def replicate(self, channel: Channel) -> None:
        """Say that all ranks of `channel` hold the same parameters, so that each basis is computed once for all."""
        self._refresher.replicas = channel if channel.dp_size > 1 else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with the gradients as they are.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, None without one.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.suspended:
            return loss
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                _require_dense(param)
            if params:
                number = self.metrics.count_step(params[0])
                self._recording = self.recorder is not None and self.recorder.due(number)
                if self._recording and self.channel is None:
                    self.recorder.watch_alone(self.param_groups)
            if "rank" in group:
                self._step_projected(params, group)
            else:
                for param in params:
                    self._step_adamw(param, group)
                    if self._recording:
                        self.recorder.full_rank(param, group, self.state[param])
        return loss

    def _step_projected(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Step the matrices of a group: those stepped whole, in as many turns as they are gathered; then the rest."""
        record: dict[Tensor, list[Series]] = {}
        if self._recording:
            record = {p: self.recorder.low_rank(p, lambda p=p: self._places(p, group).matrices) for p in params}
        turns = max((len(self._binding(param).exchanges) for param in params), default=0)
        for turn in range(max(1, turns)):
            self._step_whole(params, group, turn, record)
        for param in params:
            lean = self._binding(param).lean
            if lean is not None:
                whole = len(self._binding(param).shapes)
                series = record.get(param, [])[whole:]
                resolution = self._resolution(param)
                lean.step(param, self.state[param], group, resolution, self._refresher, self.metrics, series)

    def _step_whole(
        self, params: list[Tensor], group: dict[str, Any], turn: int, record: dict[Tensor, list[Series]]
    ) -> None:
        """One turn: gather what is cut, refresh what is due, update, give back what was cut."""
        tasks: list[list[MatrixTask]] = []
        due: list[MatrixTask] = []
        borrowed: list[tuple[CutExchange, Tensor, list[Tensor]]] = []
        for param in params:
            binding = self._binding(param)
            pairs = self._whole_pairs(param, binding) if turn == 0 else []
            if turn < len(binding.exchanges):
                exchange = binding.exchanges[turn]
                assembled = exchange.to_owners(param, param.grad)
                borrowed.append((exchange, param, [weight for weight, _ in assembled]))
                pairs += [(weight, grad) for weight, grad in assembled]
            first = binding.first_of(turn)
            tasks.append(self._tasks(param, pairs, binding, group, first, record.get(param, [])[first:]))
            due += self._refresher.due(param, tasks[-1], binding.indices, first)
        self._refresher.refresh(due)
        for param, singles in zip(params, tasks, strict=True):
            together = turn == 0 and kernels.usable(param) and group["state_dtype"] == "float32"
            together &= self.method.rule is None  # a rule sees one matrix at a time
            for task in self._batches(param, singles) if together else singles:
                update(task, self.metrics)
        for exchange, param, weights in borrowed:
            exchange.to_holders(param, weights)

    def _whole_pairs(self, param: Tensor, binding: Binding) -> list[tuple[Tensor, Tensor]]:
        """Weight and gradient of the matrices that lie whole in a parameter."""
        if param in self._bindings:
            return [(shard.matrix(param), shard.matrix(param.grad)) for shard in binding.whole]
        # By dimension rather than through a flat view: a parameter or gradient may have any strides.
        return [(param, param.grad)] if param.ndim == 2 else list(zip(param, param.grad, strict=True))

    def _tasks(
        self,
        param: Tensor,
        pairs: list[tuple[Tensor, Tensor]],
        binding: Binding,
        group: dict[str, Any],
        first: int,
        record: Sequence[Series],
    ) -> list[MatrixTask]:
        state = self._state_of(param, group)
        dtype = compute_dtype(param.dtype)
        states = matrix_states(state, binding.shapes, group, binding.batched, dtype=dtype)[first : first + len(pairs)]
        resolution = self._resolution(param)
        return [
            MatrixTask(weight, grad, matrix, group, resolution, tuple(record[i : i + 1]))
            for i, ((weight, grad), matrix) in enumerate(zip(pairs, states, strict=True))
        ]

    def _resolution(self, param: Tensor) -> float:
        return F.negligible_share(self.gradient_dtypes.get(param, param.grad.dtype))

    def _batches(self, param: Tensor, tasks: list[MatrixTask]) -> list[MatrixTask]:
        """The tasks of one parameter with neighbours of one shape put together; alone where one has no basis yet."""
        binding = self._binding(param)
        group = tasks[0].group if tasks else {}
        batches = []
        for first, last in batch_runs(binding, [int(task.state.refresh_step) >= 0 for task in tasks]):
            if last - first == 1:
                batches.append(tasks[first])
                continue
            (state,) = matrix_states(
                self.state[param],
                binding.shapes,
                group,
                binding.batched,
                [(first, last)],
                dtype=compute_dtype(param.dtype),
            )
            if param in self._bindings:
                weight, grad = (stacked(flat, binding.whole[first], last - first) for flat in (param, param.grad))
            else:
                weight, grad = param[first:last], param.grad[first:last]
            record = tuple(series for task in tasks[first:last] for series in task.record)
            batches.append(MatrixTask(weight, grad, state, group, tasks[first].resolution, record))
        return batches

    def _step_adamw(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(param, group)
        dtype = compute_dtype(param.dtype)
        state[STEP] += 1
        rule = rule_of(group)
        if rule is not None:
            moments = {name: stored_moment(state, name) for name in rule.states}
            settings = {name: group[name] for name in ("lr", "weight_decay")}
            step_plain_(rule, param, param.grad, moments, state[STEP], dtype=dtype, **settings)
            return
        step_adamw_(
            param,
            param.grad,
            stored_moment(state, EXP_AVG),
            stored_moment(state, EXP_AVG_SQ),
            dtype=dtype,
            step=int(state[STEP]),
            lr=group["lr"],
            betas=tuple(group["betas"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    @property
    def inventory(self) -> list[ParamRecord]:
        """The parameters that are optimized, over all ranks."""
        if self.inventory_of_module is not None:
            return self.inventory_of_module
        return [ParamRecord.of("", shape_of(p), group) for group in self.param_groups for p in group["params"]]

    @property
    def replicated(self) -> bool:
        """Whether other ranks hold the same parameters and states."""
        return self._refresher.replicas is not None


def _require_dense(param: Tensor) -> None:
    if param.grad.is_sparse or param.grad.layout != torch.strided:
        raise ValueError(
            f"FiraAdam: the gradient of a parameter of shape {tuple(param.shape)} has layout {param.grad.layout}, "
            "which has no low-rank form here; build the embedding with sparse=False."
        )
