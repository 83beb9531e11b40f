"""Bytes of optimizer state: the paper's formula, AdamW's, and what a live optimizer holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from ds_fira.core.algorithms import ALGORITHMS, FIRA_ADAM, algorithm_of
from ds_fira.sharding.geometry import matrices_of
from ds_fira.sharding.projection import averages_numel, is_projected, state_numel


@dataclass(frozen=True, slots=True)
class ParamRecord:
    """One trainable parameter and how it is optimized.

    Attributes:
        name: in the module.
        shape: of the whole parameter.
        rank: subspace rank, None for AdamW, and for a matrix that AdamW steps because its rank saves nothing.
        proj_type: as in `FiraAdam`.
        formulation: as in `FiraAdam`.
        algorithm: the name of the optimizer.
        averages: numbers that its matrices keep of the squares of a normalized residual.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    proj_type: str
    formulation: str
    algorithm: str = FIRA_ADAM.name
    averages: int = 0

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], group: Mapping[str, object]) -> ParamRecord:
        """The record of a parameter in a param group."""
        rank, algorithm = group["rank"] if is_projected(shape, group) else None, algorithm_of(group).name
        matrices = matrices_of(name, shape) if rank is not None else ()
        averages = sum(averages_numel(matrix.shape, group) for matrix in matrices)
        return cls(name, shape, rank, group["proj_type"], group["formulation"], algorithm, averages)

    @property
    def matrices(self) -> int:
        """How many matrices with low-rank state the parameter is: 0 under AdamW, one per expert in a 3-D tensor."""
        return 0 if self.rank is None else len(matrices_of(self.name, self.shape))

    @property
    def state_elements(self) -> int:
        """Elements of state by the paper's Table 1: mr + 2nr + 1 per projected matrix, two per element else.

        Of another algorithm as many of n r, and the limiter's 1, as it has; GaLore mr + 2nr. A normalized residual has
        n more.
        """
        algorithm = ALGORITHMS[self.algorithm]
        if self.rank is None:
            return len(algorithm.states) * math.prod(self.shape)
        return self.averages + sum(
            state_numel(matrix.shape, self.rank, self.proj_type, self.formulation, algorithm)
            for matrix in matrices_of(self.name, self.shape)
        )


def formula_bytes(records: Iterable[ParamRecord], bytes_per_element: int = 4) -> int:
    """Bytes of state that the paper's formula gives, over all ranks."""
    return bytes_per_element * sum(record.state_elements for record in records)


def adamw_bytes(records: Iterable[ParamRecord], bytes_per_element: int = 4) -> int:
    """Bytes that AdamW's two moments would take for the same parameters, over all ranks."""
    return bytes_per_element * sum(2 * math.prod(record.shape) for record in records)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all state tensors that this process holds; of a parameter with memory no tensor on the meta device."""
    # Under FSDP2 a parameter's state has such tensors, as names of what is held elsewhere.
    held = ((param, value) for param, state in optimizer.state.items() for value in state.values())
    return sum(v.nbytes for param, v in held if isinstance(v, Tensor) and (param.is_meta or not v.is_meta))
