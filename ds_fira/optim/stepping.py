"""The order of an optimizer's step, group by group: gather, refresh, update, scatter; then what is not projected."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ds_fira.core import kernels
from ds_fira.core.batches import update_together
from ds_fira.core.capture import capturing, refuse_if_capturing
from ds_fira.core.kernels import Choice
from ds_fira.core.precision import negligible_ratio
from ds_fira.core.settings import GroupSettings, ParamGroup
from ds_fira.core.state import STEP, compute_dtype, drop_unprojected_moments, stored_moment
from ds_fira.core.step import MatrixTask
from ds_fira.core.unprojected import Unprojected, step_unprojected_
from ds_fira.observe.metrics import StepMetrics
from ds_fira.observe.scaling_recorder import ScalingRecorder
from ds_fira.observe.scaling_series import Series, add_batch
from ds_fira.optim.stateful import Resumable
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.local_matrices import LocalMatrices


class Stepping(Resumable):
    """The part of an optimizer that steps its tensors.

    Attributes:
        metrics: counts the matrix steps.
    """

    metrics: StepMetrics
    recorder: ScalingRecorder | None
    kernels: Choice
    _recording: bool

    @torch.no_grad()
    def step_some(self, number: int, params: Collection[Tensor]) -> None:
        """Step some parameters with the gradients they have, and no others; `step` calls hooks, this does not.

        Where something stands in for several parameters, a collective call.

        Args:
            number: of the param group that has them; not `capturable`.
            params: all that something stands in for, or none of them.
        """
        group = self.param_groups[number]
        with kernels.switched(self.kernels):
            for tensors in self._lent(number, params):
                if tensors:
                    self._step_group(group, tensors, GroupSettings.of(group))

    def _step_group(self, group: ParamGroup, params: list[Tensor], settings: GroupSettings) -> None:
        """Step the parameters of a group, those that have a gradient."""
        projected, rest = [], []
        for param in params:
            _require_dense(param, self.algorithm.name)
            (projected if self._projects(param, group) else rest).append(param)
            if param not in self.state:  # in the order in which a state dict lists them when it is loaded
                self._state_of(param, group)
        # A capture computes nothing, so it is no step.
        number = self.metrics.next_step(params[0]) if capturing() else self.metrics.count_step(params[0])
        self._recording = self.recorder is not None and self.recorder.due(number)
        if self._recording:
            refuse_if_capturing("the scaling factors of this step are to be recorded", "make it without a capture")
        if self._recording and not self.members:
            self.recorder.watch_alone(self.param_groups)
        self._step_projected(projected, group, settings)
        self._step_unprojected(rest, group, settings)
        for param in rest if self._recording else ():
            self.recorder.full_rank(param, settings, self.state[param])

    def _step_projected(self, params: list[Tensor], group: ParamGroup, settings: GroupSettings) -> None:
        """Step the matrices of a group: those stepped whole, in as many turns as they are gathered; then the rest."""
        series: dict[Tensor, list[Series]] = {}
        if self._recording:
            series = {p: self.recorder.low_rank(p, lambda p=p: self._slices(p, group).matrices) for p in params}
        members = [(param, self._matrices(param)) for param in params]
        for param, matrices in members:
            matrices.bind(self._state_of(param, group), settings, self.algorithm, compute_dtype(param.dtype))
        for turn in range(max((matrices.turns for _, matrices in members), default=0)):
            self._step_whole([member for member in members if turn < member[1].turns], settings, turn, series)
        for param, matrices in members:
            if matrices.low_rank is None:
                continue
            ratio = self._negligible_ratio(param, settings)
            steps = matrices.low_rank.step(param, self.state[param], settings, ratio, self._refresher, self.algorithm)
            own = series.get(param, [])[len(matrices.shapes) :]
            for plan, stats, entries in steps:
                if plan.owns and self.counts(param):
                    self.metrics.record(stats, settings.residual_factor)
                if own and entries is not None:
                    own[matrices.low_rank.plans.index(plan)].add(*entries())
        for param in params:
            drop_unprojected_moments(self.state[param])

    def _step_whole(
        self,
        members: list[tuple[Tensor, LocalMatrices]],
        settings: GroupSettings,
        turn: int,
        series: dict[Tensor, list[Series]],
    ) -> None:
        """One turn: gather what is split, refresh what is due, update, give back what was gathered."""
        tasks: list[list[MatrixTask]] = []
        gathered: list[Sequence[tuple[Tensor, Tensor]]] = []
        # By the ranks that have the same matrices, in one order on all ranks.
        due: dict[Communicator | None, list[MatrixTask]] = {}
        for param, matrices in members:
            pairs = matrices.exchanges[turn].to_owners(param, param.grad) if matrices.exchanges else ()
            singles = matrices.tasks(param, turn, pairs, settings, self._negligible_ratio(param, settings))
            found = self._refresher.due(param, singles, matrices.indices, matrices.first_of(turn))
            due.setdefault(self.attachment.replicas.get(param), []).extend(found)
            gathered.append(pairs)
            tasks.append(singles)
        for replicas, of_them in due.items():
            self._refresher.refresh(of_them, replicas, self.counts_among(replicas))
        for counts in (True, False):
            own, recorders = list[MatrixTask](), list[Series]()
            for (param, matrices), singles in zip(members, tasks, strict=True):
                if self.counts(param) is counts:
                    first = matrices.first_of(turn)
                    own += singles
                    recorders += series[param][first : first + len(singles)] if self._recording else []
            self._update(own, recorders, counts)
        for (param, matrices), pairs in zip(members, gathered, strict=True):
            if matrices.exchanges:
                matrices.exchanges[turn].to_holders(param, [weight for weight, _ in pairs])

    def _update(self, tasks: list[MatrixTask], recorders: list[Series], counts: bool) -> None:
        """Step the matrices of a turn, and tell metrics, if they count, and recorders, if any, of each."""
        for positions, stats in update_together(tasks):
            if stats is not None:
                if counts:
                    self.metrics.record(stats, tasks[positions[0]].settings.residual_factor)
                if recorders:
                    add_batch([recorders[position] for position in positions], stats)

    def _negligible_ratio(self, param: Tensor, settings: GroupSettings) -> float:
        dtype = self.attachment.gradient_dtypes.get(param, param.grad.dtype)
        precision = settings.chosen_precision
        if precision == "tf32" and param.device.type == "cpu" and not kernels.supports(param):
            precision = "float32"  # as torch's functions multiply there
        return negligible_ratio(dtype, precision)

    def _step_unprojected(self, params: Sequence[Tensor], group: ParamGroup, settings: GroupSettings) -> None:
        states = [self._state_of(param, group) for param in params]
        for param, state in zip(params, states, strict=True):
            # The host counts, but for a capturable group the kernel does. A loaded state may have its count elsewhere.
            home = param.device if settings.capturable else torch.device("cpu")
            if state[STEP].device != home:
                refuse_if_capturing("a count of steps is not on the device yet", "make a step without a capture first")
                state[STEP] = state[STEP].to(home)
        counts = [state[STEP] for state in states]
        if counts and not settings.capturable:
            torch._foreach_add_(counts, 1)
        tensors = [
            Unprojected(
                param,
                param.grad,
                {name: stored_moment(state, name) for name in self.algorithm.states},
                count,
                compute_dtype(param.dtype),
                settings.unprojected_scale(self.attachment.is_vector(param)),
            )
            for param, state, count in zip(params, states, counts, strict=True)
        ]
        step_unprojected_(tensors, settings)


def _require_dense(param: Tensor, name: str) -> None:
    if param.grad.is_sparse or param.grad.layout != torch.strided:
        raise ValueError(
            f"{name}: the gradient of a parameter of shape {tuple(param.shape)} has layout {param.grad.layout}, "
            "which has no low-rank form here; build the embedding with sparse=False."
        )
