"""The matrices of one stepped tensor that this process steps whole: what they are, and the tasks of a step for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_fira.core.algorithms import Algorithm
from ds_fira.core.batches import SlicedTask
from ds_fira.core.drawn_basis import DrawnBasis
from ds_fira.core.matrix_slice import MatrixSlice
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import MatrixState, matrix_states
from ds_fira.core.step import MatrixTask
from ds_fira.core.subspace import basis_shape
from ds_fira.sharding.gather import GatherExchange
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.lowrank.step import LowRankMatrices


class LocalMatrices:
    """The matrices of a parameter or flat partition that this process steps.

    Attributes:
        unsplit: the matrices that lie whole in the tensor.
        indices: for every matrix stepped whole here, its number among all projected matrices of the model, by which
            `stagger` goes, and a basis is drawn.
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
        self._views: list[MatrixState] = []

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
            self._tensors = tuple(state.values())
            self._views = matrix_states(state, self.shapes, settings, self.batched, algorithm, dtype=dtype)
            if settings.draws_basis:
                for view, shape, number in zip(self._views, self.shapes, self.indices, strict=True):
                    view.drawn = DrawnBasis(number, *basis_shape(shape, settings.rank, view.side))

    def move(self, move: Callable[[Tensor], Tensor]) -> None:
        """Forget the tensors of the state, which are others from now on, and move what else was made from them."""
        self._tensors, self._views = (), []
        if self.low_rank is not None:
            self.low_rank.move(move)

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
        views = self._views[first:last]
        places = self._whole(param) if turn == 0 else []
        tasks: list[MatrixTask] = [
            SlicedTask(weight, grad, view, settings, negligible_ratio)
            for (weight, grad), view in zip(places, views, strict=False)
        ]
        tasks += [
            MatrixTask(weight, grad, view, settings, negligible_ratio)
            for (weight, grad), view in zip(gathered, views[len(places) :], strict=True)
        ]
        return tasks

    def _whole(self, param: Tensor) -> list[tuple[MatrixSlice, MatrixSlice]]:
        """Where weight and gradient of the matrices lie that are whole in a tensor."""
        pair = param, param.grad
        if self.flat:
            return [tuple(shard.place(flat) for flat in pair) for shard in self.unsplit]
        if param.ndim == 2:
            return [tuple(map(MatrixSlice.of, pair))]
        # By dimension rather than through a flat view: a parameter or gradient may have any strides.
        return [
            tuple(MatrixSlice(each, index * each.stride(0), tuple(each.shape[1:]), each.stride()[1:]) for each in pair)
            for index in range(param.shape[0])
        ]
