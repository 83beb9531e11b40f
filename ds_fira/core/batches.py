"""Matrices that the kernels step together: those alike, wherever they lie, a few at a time."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from torch import Tensor

from ds_fira.core import kernels
from ds_fira.core.matrix_slice import MatrixSlice
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState
from ds_fira.core.step import MatrixTask, StepStats, update

# Matrices stepped at once on a GPU: enough to fill it and to hide the launches, few enough that the low-rank tensors of
# a step stay small beside the state.
MAX_BATCH = 8


class SlicedTask(MatrixTask):
    """A task of one matrix inside a tensor; views of weight and gradient are made where something asks for them.

    Args:
        weight: where W lies.
        grad: where G lies.
        state: as in `MatrixTask`.
        settings: likewise.
        negligible_ratio: likewise.
    """

    def __init__(
        self,
        weight: MatrixSlice,
        grad: MatrixSlice,
        state: MatrixState,
        settings: GroupSettings,
        negligible_ratio: float,
    ) -> None:
        self._places, self._by_kernels = (weight, grad), None
        self.state, self.settings, self.negligible_ratio = state, settings, negligible_ratio

    def places(self) -> tuple[MatrixSlice, MatrixSlice]:
        """Where weight and gradient lie."""
        return self._places

    @property
    def weight(self) -> Tensor:
        """W, (m, n), a view."""
        return self._places[0].view()

    @property
    def grad(self) -> Tensor:
        """G, (m, n), a view."""
        return self._places[1].view()


def update_together(tasks: Sequence[MatrixTask]) -> Iterator[tuple[list[int], StepStats | None]]:
    """Step matrices as `ds_fira.core.step.update` does, those together that go together.

    Args:
        tasks: one each.

    Yields:
        Positions in `tasks`, and the numbers of their step, which have a leading dimension where there are several.
    """
    for positions in together(tasks):
        batch = [tasks[position] for position in positions]
        yield positions, update(batch[0]) if len(batch) == 1 else kernels.step_together(batch)


def together(tasks: Sequence[MatrixTask]) -> list[list[int]]:
    """Positions of the tasks that are stepped together: at most `MAX_BATCH`, alike in all that a kernel is made for.

    Alone is what the kernels do not take, what has no basis yet, and what a rule steps, which sees one matrix at a
    time.
    """
    batches: list[list[int]] = []
    latest: dict[Hashable, list[int]] = {}
    for position, task in enumerate(tasks):
        alone = task.settings.rule is not None or not task.by_kernels
        if alone or not task.state.has_basis:
            batches.append([position])
            continue
        kind = _kind(task)
        if len(latest.get(kind, ())) in (0, MAX_BATCH):
            latest[kind] = []
            batches.append(latest[kind])
        latest[kind].append(position)
    return batches


def _kind(task: MatrixTask) -> Hashable:
    """What matrices have in common that are one batch."""
    state, places = task.state, task.places()
    return (
        id(task.settings),
        task.negligible_ratio,
        *((place.shape, place.strides, place.tensor.dtype, place.tensor.device) for place in places),
        (state.side, state.basis.dtype, state.basis.stride(), state.residual_avg_sq is None),
        *((name, suffix, part.dtype) for name, stored in state.moments.items() for suffix, part in stored.items()),
    )
