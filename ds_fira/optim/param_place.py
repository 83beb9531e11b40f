"""Where one parameter and its states lie: its matrices, the tensors of this rank that hold some of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_fira.checkpoint.slices import StateSlice
from ds_fira.core.selection import shape_of
from ds_fira.core.settings import GroupSettings, ParamGroup
from ds_fira.core.state import MatrixState, allocate_matrices, compute_dtype, state_views
from ds_fira.core.subspace import Side, effective_rank, low_rank_shape
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.geometry import ParamSlice, matrices_of
from ds_fira.sharding.projection import is_projected


@dataclass(frozen=True)
class ParamPlace:
    """A projected parameter of an optimizer: what its matrices are, and where their states lie.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        group: its param group.
        settings: of that.
        optimizer: whose it is.
        dtype: in which it is stepped.
    """

    name: str
    shape: tuple[int, ...]
    group: ParamGroup
    settings: GroupSettings
    optimizer: LowRankOptimizer
    dtype: torch.dtype

    @classmethod
    def of(cls, optimizer: LowRankOptimizer, param: Tensor | str, caller: str) -> ParamPlace:
        members = optimizer._members()
        name = param if isinstance(param, str) else name_of(optimizer, param)
        found = [(number, shape) for number, listed in enumerate(members) for own, shape in listed if own == name]
        if not found:
            what = repr(param) if isinstance(param, str) else f"a parameter of shape {shape_of(param)}"
            raise ValueError(
                f"ds_fira.{caller}: {what} is not trained by this {optimizer.algorithm.name}; give one that is."
            )
        (number, shape), *_ = found
        group = optimizer.param_groups[number]
        if not is_projected(shape, group):
            raise ValueError(
                f"ds_fira.{caller}: {name} is not projected, and has no low-rank state; read its moments with "
                "deepspeed.utils.safe_get_full_optimizer_state, or from the optimizer's state where there is no engine."
            )
        first = next(iter(optimizer.attachment.slices), None) if optimizer.members else group["params"][0]
        dtype = torch.float32 if first is None else compute_dtype(first.dtype)
        return cls(name, tuple(shape), group, GroupSettings.of(group), optimizer, dtype)

    @property
    def matrix(self) -> tuple[int, int]:
        """(m, n) of every matrix."""
        return self.shape[-2], self.shape[-1]

    @property
    def side(self) -> Side:
        """The projected side."""
        return self.settings.side_of(self.matrix)

    @property
    def rank(self) -> int:
        """r, at most the smaller side."""
        return effective_rank(self.matrix, self.settings.rank)

    def wholes(self) -> list[StateSlice]:
        """Every matrix with all of its state."""
        basis, low_rank = self.settings.basis_shape(self.matrix), low_rank_shape(self.matrix, self.rank, self.side)
        ranges = range(basis[0]), range(low_rank[1 if self.side == "left" else 0])
        names = [matrix.name for matrix in matrices_of(self.name, self.shape)]
        return [StateSlice(name, self.matrix, self.side, self.rank, "", None, *ranges) for name in names]

    def allocate(self) -> MatrixState:
        """The state of one matrix before its first step, whole, on the host."""
        basis, low_rank = self.settings.basis_shape(self.matrix), low_rank_shape(self.matrix, self.rank, self.side)
        like, averages = torch.empty(0, dtype=self.dtype), self.settings.averages_of(low_rank[self.side == "left"])
        algorithm = self.optimizer.algorithm
        state = allocate_matrices(like, basis, low_rank, "float32", (), algorithm, averages)
        return state_views(state, self.side, algorithm=algorithm, dtype=self.dtype)

    def tensors(self) -> Iterator[Tensor]:
        """The stepped tensors of this rank in which some of it lies."""
        return (tensor for tensor, _ in holders(self.optimizer, self.name))

    def held(self, *, allocate: bool) -> list[tuple[StateSlice, MatrixState]]:
        """The parts of its states that this rank holds, as they are.

        Args:
            allocate: whether a tensor without a state gets one.
        """
        optimizer, names, found = self.optimizer, {whole.name for whole in self.wholes()}, []
        for tensor in self.tensors():
            state = optimizer._state_of(tensor, self.group) if allocate else optimizer.state.get(tensor)
            parts = optimizer._slices(tensor, self.group).matrices if state else ()
            for part in parts:
                if part.name in names:
                    dtype, algorithm = compute_dtype(tensor.dtype), optimizer.algorithm
                    views = state_views(state, part.side, part.mark, part.index, algorithm=algorithm, dtype=dtype)
                    found.append((part, views))
        return found


def name_of(optimizer: LowRankOptimizer, param: Tensor) -> str | None:
    """The name of a parameter of the engine's module; without an engine its name or number in the optimizer."""
    if optimizer.members:
        return optimizer.attachment.names.get(id(param))
    listed = zip(optimizer.param_groups, optimizer._members(), strict=True)
    names = {id(own): name for group, named in listed for own, (name, _) in zip(group["params"], named, strict=True)}
    return names.get(id(param))


def holders(optimizer: LowRankOptimizer, name: str) -> Iterator[tuple[Tensor, ParamSlice]]:
    """The tensors that this rank steps with elements of a parameter, and which elements of it."""
    if not optimizer.members:
        for group, named in zip(optimizer.param_groups, optimizer._members(), strict=True):
            for param, (own, shape) in zip(group["params"], named, strict=True):
                if own == name:
                    yield param, ParamSlice(name, 0, 0, math.prod(shape))
    for tensor, parts in optimizer.attachment.slices.items():
        for part in parts:
            if part.param == name:
                yield tensor, part
