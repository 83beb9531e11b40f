"""How one tensor that an optimizer holds is stepped: its matrices by Fira, what is not projected by AdamW or a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ds_fira.core import functional as F
from ds_fira.core import kernels
from ds_fira.core.base_optimizer import rule_of, step_plain_
from ds_fira.core.state import EXP_AVG, EXP_AVG_SQ, STEP, compute_dtype, matrix_states, stored_moment
from ds_fira.core.step import MatrixTask, update
from ds_fira.core.unprojected import step_adamw_
from ds_fira.observe.metrics import StepMetrics
from ds_fira.observe.scaling_series import Series
from ds_fira.optim.stateful import Resumable
from ds_fira.sharding.comm import GatherExchange
from ds_fira.sharding.local_matrices import LocalMatrices, batch_runs, stacked


class Stepping(Resumable):
    """What of an optimizer steps its tensors, group by group.

    Attributes:
        metrics: counts what is done.
    """

    metrics: StepMetrics
    _recording: bool

    def _step_projected(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Step the matrices of a group: those stepped whole, in as many turns as they are gathered; then the rest."""
        record: dict[Tensor, list[Series]] = {}
        if self._recording:
            record = {p: self.recorder.low_rank(p, lambda p=p: self._slices(p, group).matrices) for p in params}
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
        borrowed: list[tuple[GatherExchange, Tensor, list[Tensor]]] = []
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
            together &= self.algorithm.rule is None  # a rule sees one matrix at a time
            for task in self._batches(param, singles) if together else singles:
                update(task, self.metrics)
        for exchange, param, weights in borrowed:
            exchange.to_holders(param, weights)

    def _whole_pairs(self, param: Tensor, binding: LocalMatrices) -> list[tuple[Tensor, Tensor]]:
        """Weight and gradient of the matrices that lie whole in a parameter."""
        if param in self._bindings:
            return [(shard.matrix(param), shard.matrix(param.grad)) for shard in binding.whole]
        # By dimension rather than through a flat view: a parameter or gradient may have any strides.
        return [(param, param.grad)] if param.ndim == 2 else list(zip(param, param.grad, strict=True))

    def _tasks(
        self,
        param: Tensor,
        pairs: list[tuple[Tensor, Tensor]],
        binding: LocalMatrices,
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
        return F.negligible_share(self.attachment.gradient_dtypes.get(param, param.grad.dtype))

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

    def _step_plain(self, param: Tensor, group: dict[str, Any]) -> None:
        """Step what is not projected; of a group with a rank with the step size that its projected matrices have."""
        state = self._state_of(param, group)
        alpha = group["alpha"] if "rank" in group else 1.0
        dtype = compute_dtype(param.dtype)
        state[STEP] += 1
        rule = rule_of(group)
        if rule is not None:
            moments = {name: stored_moment(state, name) for name in rule.states}
            settings = {name: group[name] for name in ("lr", "weight_decay")}
            step_plain_(rule, param, param.grad, moments, state[STEP], dtype=dtype, alpha=alpha, **settings)
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
            alpha=alpha,
        )
