"""When the bases of a process's matrices are computed, by whom, and what happens when one cannot be."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ds_fira.core.basis import adopt_basis, new_basis, solver_failed
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState
from ds_fira.core.step import MatrixTask
from ds_fira.core.subspace import refresh_due
from ds_fira.sharding.comm import Communicator

# Seconds of exact decompositions in one process after which a user is told of faster ways.
SLOW_SECONDS = 30.0


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
        replicas: the ranks that hold the same matrices, so that each basis is computed once for all; None for none.
        listener: is told of every refresh.
    """

    def __init__(self, listener: RefreshListener, name: str) -> None:
        self.replicas: Communicator | None = None
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
        bounds = self._bounds.setdefault(param, [None] * len(indices))
        found = []
        for row, task in enumerate(tasks, first):
            gap, offset = task.settings.update_proj_gap, task.settings.refresh_offset_of(indices[row])
            last = task.state.last_refresh
            bound = bounds[row]
            if bound is None or refresh_due(bound, last, gap, offset):
                bound = int(task.state.step)
                if refresh_due(bound, last, gap, offset):
                    found.append(task)
            bounds[row] = bound + 1
        return found

    def refresh(self, due: list[MatrixTask]) -> None:
        """New bases for the matrices that are due; among replicas each is computed on one rank and sent to all."""
        if not due:
            return
        with self.listener.refreshing(due[0].weight.device):
            if self.replicas is None:
                for task in due:
                    self._adopt(task, self._new_basis(task))
            else:
                self._refresh_replicas(due, self.replicas)

    def _refresh_replicas(self, due: list[MatrixTask], communicator: Communicator) -> None:
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
                self._adopt(task, packed[1:].view_as(basis) if packed[0] else None)

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

    def _adopt(self, task: MatrixTask, basis: Tensor | None) -> None:
        if basis is None:
            return  # stays due
        adopt_basis(task, basis)
        self.listener.count_refresh()
