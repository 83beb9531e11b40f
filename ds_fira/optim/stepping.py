"""The order of an optimizer's step, group by group: gather, refresh, update, scatter; then what is not projected."""

from __future__ import annotations

from torch import Tensor

from ds_fira.core import kernels
from ds_fira.core.batches import update_together
from ds_fira.core.precision import negligible_ratio
from ds_fira.core.settings import GroupSettings, ParamGroup
from ds_fira.core.state import STEP, compute_dtype, stored_moment
from ds_fira.core.step import MatrixTask
from ds_fira.core.unprojected import step_unprojected_
from ds_fira.observe.metrics import StepMetrics
from ds_fira.observe.scaling_series import Series, add_batch
from ds_fira.optim.stateful import Resumable


class Stepping(Resumable):
    """The part of an optimizer that steps its tensors.

    Attributes:
        metrics: counts the matrix steps.
    """

    metrics: StepMetrics
    _recording: bool

    def _step_projected(self, params: list[Tensor], group: ParamGroup, settings: GroupSettings) -> None:
        """Step the matrices of a group: those stepped whole, in as many turns as they are gathered; then the rest."""
        series: dict[Tensor, list[Series]] = {}
        if self._recording:
            series = {p: self.recorder.low_rank(p, lambda p=p: self._slices(p, group).matrices) for p in params}
        for param in params:
            state = self._state_of(param, group)
            self._matrices(param).bind(state, settings, self.algorithm, compute_dtype(param.dtype))
        for turn in range(max((self._matrices(param).turns for param in params), default=0)):
            self._step_whole([p for p in params if turn < self._matrices(p).turns], settings, turn, series)
        for param in params:
            matrices = self._matrices(param)
            if matrices.low_rank is None:
                continue
            ratio = self._negligible_ratio(param, settings)
            steps = matrices.low_rank.step(param, self.state[param], settings, ratio, self._refresher, self.algorithm)
            own = series.get(param, [])[len(matrices.shapes) :]
            for plan, stats, entries in steps:
                if plan.owns:
                    self.metrics.record(stats, settings.residual_scale)
                if own and entries is not None:
                    own[matrices.low_rank.plans.index(plan)].add(*entries())

    def _step_whole(
        self, params: list[Tensor], settings: GroupSettings, turn: int, series: dict[Tensor, list[Series]]
    ) -> None:
        """One turn: gather what is split, refresh what is due, update, give back what was gathered."""
        tasks: dict[Tensor, list[MatrixTask]] = {}
        gathered: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}
        due: list[MatrixTask] = []
        for param in params:
            matrices = self._matrices(param)
            if matrices.exchanges:
                gathered[param] = matrices.exchanges[turn].to_owners(param, param.grad)
            ratio = self._negligible_ratio(param, settings)
            tasks[param] = matrices.tasks(param, turn, gathered.get(param, ()), settings, ratio)
            due += self._refresher.due(param, tasks[param], matrices.indices, matrices.first_of(turn))
        self._refresher.refresh(due)
        self._update(tasks, turn, series)
        for param, pairs in gathered.items():
            self._matrices(param).exchanges[turn].to_holders(param, [weight for weight, _ in pairs])

    def _update(self, tasks: dict[Tensor, list[MatrixTask]], turn: int, series: dict[Tensor, list[Series]]) -> None:
        """Step the matrices of a turn, and tell metrics and recorders of each."""
        recorders: list[Series] = []
        if self._recording:
            for param, own in tasks.items():
                first = self._matrices(param).first_of(turn)
                recorders += series[param][first : first + len(own)]
        every = [task for own in tasks.values() for task in own]
        for positions, stats in update_together(every):
            if stats is not None:
                self.metrics.record(stats, every[positions[0]].settings.residual_scale)
                if recorders:
                    add_batch([recorders[position] for position in positions], stats)

    def _negligible_ratio(self, param: Tensor, settings: GroupSettings) -> float:
        dtype = self.attachment.gradient_dtypes.get(param, param.grad.dtype)
        precision = settings.matmul_precision
        if precision == "tf32" and param.device.type == "cpu" and not kernels.supports(param):
            precision = "float32"  # as torch's functions multiply there
        return negligible_ratio(dtype, precision)

    def _step_unprojected(self, param: Tensor, group: ParamGroup, settings: GroupSettings) -> None:
        state = self._state_of(param, group)
        state[STEP] += 1
        moments = {name: stored_moment(state, name) for name in self.algorithm.states}
        step_unprojected_(param, param.grad, moments, state[STEP], settings, compute_dtype(param.dtype))
