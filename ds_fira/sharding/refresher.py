"""When the bases of a process's matrices are computed, by whom, and what happens when one cannot be."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ds_fira.core.basis import adopt_basis, draw_basis, goes_with, new_bases, new_basis, solver_failed
from ds_fira.core.batches import MAX_BATCH
from ds_fira.core.capture import capturing, refuse_if_capturing
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState
from ds_fira.core.step import MatrixTask
from ds_fira.core.subspace import refresh_due
from ds_fira.sharding.comm import Communicator

# Seconds of exact decompositions in one process after which a user is told of faster ways.
SLOW_SECONDS = 30.0
# Seconds that a GPU takes for an exact decomposition in float32, over (smaller side)^2 x larger side: about 10 minutes
# are published for the 224 matrices of a LLaMA 7B. An estimate; it says what is coming, nothing is decided by it.
GPU_SVD_SECONDS = 2.3e-11
# From so many seconds a matrix on, a user is told before a GPU decomposes it.
LONG_SVD_SECONDS = 0.1
# Bytes of the gradients whose bases a GPU computes together at most: it makes a copy of them.
MAX_BATCH_BYTES = 2**28


def svd_seconds(device_type: str, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Estimated seconds of one exact decomposition on a GPU; 0 on other devices, where time itself is taken.

    Args:
        device_type: "cpu", "cuda" and so on.
        shape: (m, n).
        dtype: in which it is decomposed; float64 counts twice.
    """
    if device_type != "cuda":
        return 0.0
    return GPU_SVD_SECONDS * min(shape) ** 2 * max(shape) * (2.0 if dtype == torch.float64 else 1.0)


def svd_warning(
    device_type: str, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, settings: GroupSettings
) -> str | None:
    """What a user is told before exact decompositions that will take long on a GPU; None where there is nothing to say.

    Args:
        device_type: "cpu", "cuda" and so on.
        shapes: (m, n) of the matrices that are about to be decomposed.
        dtype: in which they are decomposed.
        settings: of their param group.
    """
    seconds = [svd_seconds(device_type, shape, dtype) for shape in shapes]
    if settings.subspace != "svd" or max(seconds, default=0.0) < LONG_SVD_SECONDS:
        return None
    longest = max(range(len(shapes)), key=seconds.__getitem__)
    m, n = shapes[longest]
    return (
        f"subspace = 'svd' now decomposes {len(shapes)} of a param group's matrices exactly on a GPU, up to {m} x {n}: "
        f"about {seconds[longest]:.1f} s for the largest and {sum(seconds):.0f} s in all by an estimate, and again "
        f"every {settings.update_proj_gap} steps, for every group; subspace = 'randomized' is many times faster at the "
        "same loss (docs/performance.md)."
    )


def batch_limit(device_type: str, subspace: str, grad_bytes: int) -> int:
    """How many matrices of one shape get their bases together, by batched products and one batched decomposition.

    On a CPU, which works on one matrix at a time in any case, one: a batch would only cost memory. On a GPU a small
    decomposition or factor is all latency, and a batch of them takes about as long as one. "svd" stays the released
    code's call.

    Args:
        device_type: "cpu", "cuda" and so on.
        subspace: the method.
        grad_bytes: of one gradient in the dtype in which it is decomposed; a batch holds a copy of them all.
    """
    if device_type == "cpu" or subspace == "svd":
        return 1
    return max(1, min(MAX_BATCH, MAX_BATCH_BYTES // grad_bytes))


def batches(due: Sequence[MatrixTask]) -> list[list[MatrixTask]]:
    """Matrices whose bases are computed together, in the order in which the first of each is due."""
    groups: dict[tuple[object, ...], list[MatrixTask]] = {}
    for task in due:
        groups.setdefault(goes_with(task), []).append(task)
    result = []
    for group in groups.values():
        first = group[0]
        size = first.grad.numel() * first.state.dtype.itemsize
        limit = batch_limit(first.grad.device.type, first.settings.subspace, size)
        result += [group[start : start + limit] for start in range(0, len(group), limit)]
    return result


class RefreshListener(Protocol):
    """Who is told of refreshes; `ds_fira.observe.metrics.StepMetrics` is one."""

    def refreshing(self, device: torch.device) -> AbstractContextManager[None]:
        """Measure the time inside the block on `device`."""

    def count_refresh(self) -> None:
        """Count one new basis."""


class Stepped(Protocol):
    """A matrix before its step, or a rank's part of one: a `MatrixTask`, or a `ShardStep` of `sharding.lowrank`."""

    state: MatrixState
    settings: GroupSettings


AnyStepped = TypeVar("AnyStepped", bound=Stepped)


class Refresher:
    """Finds the matrices whose refresh is due and gives them new bases.

    Attributes:
        listener: is told of every refresh.
    """

    def __init__(self, listener: RefreshListener, name: str) -> None:
        self.listener = listener
        self._name = name
        self._warned = False
        self._told = False
        self._svd_seconds = 0.0
        # Step counts are on the device, since it is decided there whether a gradient is usable. These are upper bounds.
        self._bounds: dict[Tensor, list[int | None]] = {}

    def forget_counts(self) -> None:
        """Say that step counts have changed otherwise than by steps."""
        self._bounds.clear()

    def due(self, param: Tensor, tasks: list[AnyStepped], indices: Sequence[int], first: int = 0) -> list[AnyStepped]:
        """Those of some matrices of a parameter that need a new basis before the step that is about to be made.

        The device's count is read only where a refresh may be due by its upper bound: no step between refreshes waits
        for a GPU.

        Args:
            param: the parameter, or another tensor that is theirs alone; each of its matrices is asked about once in
                every step.
            tasks: the matrices, one each.
            indices: of all matrices of the parameter, their numbers in the model.
            first: the place of the first of `tasks` among all.
        """
        found = [task for row, task in enumerate(tasks, first) if self._is_due(param, row, task, indices)]
        if not capturing():
            self.count(param, range(first, first + len(tasks)))
        return found

    def any_due(self, param: Tensor, tasks: Sequence[Stepped], indices: Sequence[int]) -> bool:
        """Whether one of all matrices of a parameter needs a new basis before its next step, which is not counted."""
        return any(self._is_due(param, row, task, indices) for row, task in enumerate(tasks))

    def count(self, param: Tensor, rows: Iterable[int]) -> None:
        """Count a step of some matrices of a parameter, by their places among all; `due` has been asked of each."""
        for row in rows:
            self._bounds[param][row] += 1

    def _is_due(self, param: Tensor, row: int, task: Stepped, indices: Sequence[int]) -> bool:
        bounds = self._bounds.setdefault(param, [None] * len(indices))
        gap, offset = task.settings.update_proj_gap, task.settings.refresh_offset_of(indices[row])
        last = task.state.last_refresh
        if bounds[row] is not None and not refresh_due(bounds[row], last, gap, offset):
            return False
        refuse_if_capturing(
            "a refresh of the subspace may be due", "make that step without a capture, and capture the next"
        )
        bounds[row] = int(task.state.step)
        return refresh_due(bounds[row], last, gap, offset)

    def refresh(self, due: list[MatrixTask], replicas: Communicator | None = None, counts: bool = True) -> None:
        """New bases for the matrices that are due; among replicas each is computed on one rank and sent to all.

        Args:
            due: the matrices.
            replicas: the ranks that hold the same ones, which all make the call; None for this rank alone.
            counts: whether the listener is told of each.
        """
        if not due:
            return
        if due[0].settings.draws_basis:  # replicas draw alike
            for task in due:
                if draw_basis(task) and counts:
                    self.listener.count_refresh()
            return
        shapes = [(task.grad.shape[0], task.grad.shape[1]) for task in due]
        self.announce(shapes, due[0].weight.device, due[0].state.dtype, due[0].settings)
        with self.listener.refreshing(due[0].weight.device):
            if replicas is None or replicas.dp_size == 1:
                for batch in batches(due):
                    for task, basis in zip(batch, self._new_bases(batch), strict=True):
                        self._adopt(task, basis, counts)
            else:
                self._refresh_replicas(due, replicas, counts)

    def announce(
        self, shapes: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype, settings: GroupSettings
    ) -> None:
        """Tell the user once, before they start, of exact decompositions that will take long; see `svd_warning`."""
        message = None if self._told else svd_warning(device.type, shapes, dtype, settings)
        if message is not None:
            self._told = True
            warnings.warn(f"{self._name}: {message}", stacklevel=6)

    def _refresh_replicas(self, due: list[MatrixTask], communicator: Communicator, counts: bool) -> None:
        # In rounds of one matrix a rank: all ranks compute at once, and none holds more than one new basis.
        for first in range(0, len(due), communicator.dp_size):
            turn = due[first : first + communicator.dp_size]
            mine = self._new_basis(turn[communicator.dp_rank]) if communicator.dp_rank < len(turn) else None
            for rank, task in enumerate(turn):
                # One element in front says whether there is a basis at all.
                basis = task.state.basis
                packed = basis.new_zeros(1 + basis.numel(), dtype=task.state.dtype)
                if rank == communicator.dp_rank and mine is not None:
                    packed[0] = 1.0
                    packed[1:] = mine.reshape(-1)
                packed = communicator.broadcast(packed, rank)
                self._adopt(task, packed[1:].view_as(basis) if packed[0] else None, counts)

    def _new_bases(self, batch: list[MatrixTask]) -> list[Tensor | None]:
        """The bases of matrices that go together; where that fails, each is tried for itself."""
        if len(batch) > 1:
            try:
                return new_bases(batch)
            except RuntimeError as error:
                if not solver_failed(error):
                    raise
        return [self._new_basis(task) for task in batch]

    def _new_basis(self, task: MatrixTask) -> Tensor | None:
        """The basis of a task's gradient, None where there is none to be had."""
        return self.attempt(lambda: new_basis(task), task.settings.subspace)

    def attempt(self, compute: Callable[[], Tensor | None], subspace: str) -> Tensor | None:
        """What `compute` returns, a basis or None; None too where a decomposition failed, which is reported once.

        The caller decides for all ranks: who computes a basis tells the others whether there is one.

        Args:
            compute: makes a basis.
            subspace: how; when exact decompositions have taken long, the user is told once.

        Raises:
            RuntimeError: it failed for another reason.
        """
        start = time.perf_counter()
        try:
            return compute()
        except RuntimeError as error:
            if not solver_failed(error):
                raise
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self._name}: a decomposition failed ({error}); the matrix keeps its old basis and tries again "
                    "at its next step. Further failures are not reported.",
                    stacklevel=7,
                )
            return None
        finally:
            if subspace == "svd":
                self._svd_seconds += time.perf_counter() - start
                self._tell_of_faster_ways()

    def _tell_of_faster_ways(self) -> None:
        if self._svd_seconds > SLOW_SECONDS and not self._told:
            self._told = True
            warnings.warn(
                f"{self._name}: subspace = 'svd' has spent {self._svd_seconds:.0f} s on exact decompositions so far; "
                "'randomized' is many times faster at the same loss (docs/performance.md).",
                stacklevel=8,
            )

    def _adopt(self, task: MatrixTask, basis: Tensor | None, counts: bool) -> None:
        if basis is None:
            return  # stays due
        adopt_basis(task, basis)
        if counts:
            self.listener.count_refresh()
