"""The matrices of one stepped tensor that this process steps whole: what they are, and the tasks of a step for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ds_fira.core.algorithms import Algorithm
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState, matrix_states
from ds_fira.core.step import MatrixTask
from ds_fira.sharding.gather import GatherExchange
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.lowrank.step import LowRankMatrices

# Matrices stepped at once on a GPU: enough to fill it and to hide the launches, few enough that the low-rank tensors of
# a step stay small beside the state.
MAX_BATCH = 8


class LocalMatrices:
    """The matrices of a parameter or flat partition that this process steps.

    Attributes:
        unsplit: the matrices that lie whole in the tensor.
        indices: for every matrix stepped whole here, its number among all projected matrices of the model, by which
            `stagger` goes.
        exchanges: gather the split matrices of its param group that are stepped whole, one after the other; empty where
            there are none on any rank.
        low_rank: steps the split ones that exchange low-rank data; None where there are none on any rank.
        batched: whether the states have a leading dimension.
        flat: whether the tensor is a flat partition; else it is a parameter, 2-D or 3-D.
        shapes: (m, n) of every matrix stepped whole here, those that lie whole first, then the gathered ones.
    """

    def __init__(
        self,
        unsplit: tuple[MatrixShard, ...],
        indices: tuple[int, ...],
        exchanges: tuple[GatherExchange, ...] = (),
        low_rank: LowRankMatrices | None = None,
        *,
        batched: bool = True,
        flat: bool = True,
    ) -> None:
        self.unsplit, self.indices, self.exchanges, self.low_rank = unsplit, indices, exchanges, low_rank
        self.batched, self.flat = batched, flat
        gathered = [matrix for exchange in exchanges for matrix in exchange.owned]
        self.shapes = [matrix.shape for matrix in (*unsplit, *gathered)]
        # In a turn, those gathered by the exchange of that number are stepped; the first turn has the whole ones too.
        counts = [len(exchange.owned) for exchange in exchanges] or [0]
        ends = [len(unsplit) + sum(counts[: turn + 1]) for turn in range(len(counts))]
        self._bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        self._tensors: tuple[Tensor, ...] = ()
        self._views_of: Callable[..., list[MatrixState]] | None = None
        self._views: list[MatrixState] = []
        self._batches: dict[tuple[int, int], MatrixState] = {}

    @property
    def turns(self) -> int:
        """How often matrices are gathered and stepped in one step."""
        return len(self._bounds)

    def first_of(self, turn: int) -> int:
        """The position in `shapes` of the first matrix that is stepped in a turn."""
        return self._bounds[turn][0]

    def bind(self, state: dict[str, Tensor], settings: GroupSettings, algorithm: Algorithm, dtype: torch.dtype) -> None:
        """Look up the views of the state's tensors, once for all steps with the same tensors.

        Args:
            state: of the tensor, allocated.
            settings: of the param group.
            algorithm: says which states there are.
            dtype: in which a step is computed.
        """
        # Another one where a state was loaded, or moved to another device by another tensor under its key.
        if len(self._tensors) != len(state) or not all(map(operator.is_, self._tensors, state.values())):
            self._tensors, self._batches = tuple(state.values()), {}
            self._views_of = partial(matrix_states, state, self.shapes, settings, self.batched, algorithm, dtype=dtype)
            self._views = self._views_of()

    def tasks(
        self,
        param: Tensor,
        turn: int,
        gathered: Sequence[tuple[Tensor, Tensor]],
        settings: GroupSettings,
        negligible_ratio: float,
    ) -> list[MatrixTask]:
        """One task for each matrix that is stepped in a turn.

        Args:
            param: the tensor with its gradient.
            turn: its number.
            gathered: weight and gradient, (m, n), of the matrices that the turn's exchange has brought here.
            settings: of the param group, at this step.
            negligible_ratio: as in `MatrixTask`.
        """
        first, last = self._bounds[turn]
        pairs = [*(self._whole_pairs(param) if turn == 0 else ()), *gathered]
        return [
            MatrixTask(weight, grad, view, settings, negligible_ratio)
            for (weight, grad), view in zip(pairs, self._views[first:last], strict=True)
        ]

    def _whole_pairs(self, param: Tensor) -> list[tuple[Tensor, Tensor]]:
        if self.flat:
            return [(shard.matrix(param), shard.matrix(param.grad)) for shard in self.unsplit]
        # By dimension rather than through a flat view: a parameter or gradient may have any strides.
        return [(param, param.grad)] if param.ndim == 2 else list(zip(param, param.grad, strict=True))

    def batches(self, param: Tensor, tasks: list[MatrixTask]) -> list[MatrixTask]:
        """The tasks of the first turn with neighbours of one shape put together; alone where one has no basis yet."""
        result = []
        for first, last in self.runs([task.state.has_basis for task in tasks]):
            if last - first == 1:
                result.append(tasks[first])
                continue
            if (first, last) not in self._batches:
                (self._batches[first, last],) = self._views_of(runs=[(first, last)])
            if self.flat:
                weight, grad = (_stacked(flat, self.unsplit[first], last - first) for flat in (param, param.grad))
            else:
                weight, grad = param[first:last], param.grad[first:last]
            batch = self._batches[first, last]
            result.append(MatrixTask(weight, grad, batch, tasks[first].settings, tasks[first].negligible_ratio))
        return result

    def runs(self, ready: Sequence[bool]) -> list[tuple[int, int]]:
        """[first, last) positions of matrices that follow each other in memory, have one shape and are ready.

        Args:
            ready: for the first matrices, whether they can be stepped together with others.

        Returns:
            Runs of at most `MAX_BATCH` matrices that cover the positions in order; gathered matrices are runs of one.
        """
        runs: list[tuple[int, int]] = []
        for position in range(len(ready)):
            first, last = runs[-1] if runs else (0, 0)
            joins = 0 < last - first < MAX_BATCH and position < len(self.unsplit)
            if joins and ready[position] and ready[position - 1]:
                before, matrix = self.unsplit[position - 1 : position + 1]
                if before.shape == matrix.shape and before.offset + before.numel == matrix.offset:
                    runs[-1] = (first, position + 1)
                    continue
            runs.append((position, position + 1))
        return runs


def _stacked(flat: Tensor, first: MatrixShard, count: int) -> Tensor:
    """`count` matrices of one shape from `first` on, as a (count, m, n) view of the flat buffer."""
    return flat.view(-1).narrow(0, first.offset, count * first.numel).view(count, *first.shape)
