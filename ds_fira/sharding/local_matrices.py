"""Which matrices of a parameter this process steps, and which of them lie so that one kernel can step them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ds_fira.sharding.gather import GatherExchange
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.lowrank.step import LowRankMatrices

# Matrices stepped at once on a GPU: enough to fill it and to hide the launches, few enough that the low-rank tensors of
# a step stay small beside the state.
MAX_BATCH = 8


@dataclass(frozen=True, slots=True)
class LocalMatrices:
    """Which matrices of a parameter this process steps.

    Attributes:
        whole: the matrices that lie whole in the parameter.
        indices: for every matrix stepped whole here, its number among all projected matrices of the model, by which
            `stagger` goes.
        exchanges: carry the cut ones of its param group that are stepped whole, one after the other; empty where there
            are none on any rank.
        lean: steps the cut ones that are stepped where they lie; None where there are none on any rank.
        batched: whether the states have a leading dimension.
    """

    whole: tuple[MatrixShard, ...]
    indices: tuple[int, ...]
    exchanges: tuple[GatherExchange, ...] = ()
    lean: LowRankMatrices | None = None
    batched: bool = True

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(m, n) of every matrix stepped whole here, those that lie whole first, then the cut ones."""
        cuts = [matrix for exchange in self.exchanges for matrix in exchange.owned]
        return [matrix.shape for matrix in (*self.whole, *cuts)]

    def first_of(self, turn: int) -> int:
        """The position in `shapes` of the first matrix that is stepped in a turn, with the exchange of that number."""
        return len(self.whole) + sum(len(exchange.owned) for exchange in self.exchanges[:turn]) if turn else 0


def batch_runs(binding: LocalMatrices, ready: Sequence[bool]) -> list[tuple[int, int]]:
    """[first, last) positions of matrices that follow each other in memory, have one shape and are ready.

    Args:
        binding: of the parameter.
        ready: for the first matrices of the binding, whether they can be stepped together with others.

    Returns:
        Runs of at most `MAX_BATCH` matrices that cover the positions in order; cut matrices are runs of one.
    """
    runs: list[tuple[int, int]] = []
    for position in range(len(ready)):
        first, last = runs[-1] if runs else (0, 0)
        joins = 0 < last - first < MAX_BATCH and position < len(binding.whole)
        if joins and ready[position] and ready[position - 1]:
            before, matrix = binding.whole[position - 1 : position + 1]
            if before.shape == matrix.shape and before.offset + before.numel == matrix.offset:
                runs[-1] = (first, position + 1)
                continue
        runs.append((position, position + 1))
    return runs


def stacked(flat: Tensor, first: MatrixShard, count: int) -> Tensor:
    """`count` matrices of one shape from `first` on, as a (count, m, n) view of the flat buffer."""
    return flat.view(-1).narrow(0, first.offset, count * first.numel).view(count, *first.shape)
