"""The states of one projected parameter in two forms: as they are stepped, and as a state dict has them.

*Stepped*, a matrix has its states where the plan puts them: on the rank that gathers it, or in parts on all. *Formed*,
they are the tensors that one process would have, cut evenly over the ranks: P by its rows, the moments of R by its
entries (columns on the left, rows on the right). The few numbers of a matrix are the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ds_fira.core import quantization
from ds_fira.core.algorithms import Algorithm
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import BASIS, REFRESH_STEP, RESIDUAL_AVG_SQ, RESIDUAL_NORM, STEP, MatrixState, compute_dtype
from ds_fira.core.subspace import low_rank_shape
from ds_fira.engine.fsdp2.shards import Shards, local_of, nested_blocks
from ds_fira.engine.fsdp2.tracks import Track
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.split_matrix import SplitMatrix

# Of a matrix: its steps, its `refresh_step`, the limiter's norm.
NUMBERS = 3


@dataclass(frozen=True, slots=True)
class Values:
    """The states of one matrix, or of a part of it, in the dtype of a step.

    Attributes:
        numbers: (1, 3).
        basis: rows of P.
        moments: by name, the moments of some entries of R; {} for none.
        averages: of a normalized residual's squares; None for another residual, or none here.
    """

    numbers: Tensor
    basis: Tensor
    moments: dict[str, Tensor]
    averages: Tensor | None

    @classmethod
    def of(cls, views: MatrixState) -> Values:
        """What the states of a step hold."""
        norm = views.step.new_zeros(()) if views.residual_norm is None else views.residual_norm
        each = [number.to(views.basis.device, views.dtype) for number in (views.step, views.refresh_step, norm)]
        read = {name: quantization.read(stored, views.dtype) for name, stored in views.moments.items() if stored}
        return cls(torch.stack(each).view(1, NUMBERS), views.basis, read, views.residual_avg_sq)

    @classmethod
    def like(cls, views: MatrixState) -> Values:
        """Zeros in the shapes of the states of a step."""
        own = cls.of(views)
        averages = None if own.averages is None else torch.zeros_like(own.averages)
        moments = {name: torch.zeros_like(each) for name, each in own.moments.items()}
        basis = torch.zeros_like(own.basis, dtype=views.dtype)
        return cls(torch.zeros_like(own.numbers), basis, moments, averages)

    def write(self, views: MatrixState) -> None:
        """Set the states of a step."""
        step, refresh_step, norm = self.numbers[0].unbind()
        views.step.copy_(step)
        views.refresh_step.copy_(refresh_step)
        if views.residual_norm is not None:
            views.residual_norm.copy_(norm)
        if views.residual_avg_sq is not None:
            views.residual_avg_sq.copy_(self.averages)
        views.basis.copy_(self.basis)
        for name, values in self.moments.items():
            quantization.write_(views.moments[name], values, seed=None)


class FormedParam:
    """The formed states of a parameter on this rank.

    Args:
        param: the parameter.
        shards: how it is cut.
        settings: of its param group.
        algorithm: says which states there are.
        rank: of this process among those that it is cut over.
    """

    def __init__(
        self, param: DTensor, shards: Shards, settings: GroupSettings, algorithm: Algorithm, rank: int
    ) -> None:
        matrix, self._batch = shards.shape[-2:], shards.shape[:-2]
        side = settings.side_of(matrix)
        self._param, self._settings, self._algorithm = param, settings, algorithm
        self._ranks, self._mesh, self._rank = shards.ranks, shards.mesh, rank
        self._axis = 1 if side == "left" else 0
        self._basis_shape = settings.basis_shape(matrix)
        self._low_rank_shape = low_rank_shape(matrix, settings.rank, side)
        self._dtype = compute_dtype(param.dtype)
        self._values = [self._zeros() for _ in range(math.prod(self._batch))]

    @property
    def _rows(self) -> tuple[range, ...]:
        return nested_blocks(self._basis_shape[0], self._mesh)

    @property
    def _entries(self) -> tuple[range, ...]:
        return nested_blocks(self._low_rank_shape[self._axis], self._mesh)

    def _zeros(self) -> Values:
        shape = list(self._low_rank_shape)
        averages = self._settings.averages_of(shape[self._axis])
        shape[self._axis] = len(self._entries[self._rank])
        sizes = [(1, NUMBERS), (len(self._rows[self._rank]), self._basis_shape[1]), shape, [averages]]
        device = local_of(self._param).device
        numbers, basis, moment, p = (torch.zeros(size, dtype=self._dtype, device=device) for size in sizes)
        moments = {name: moment.clone() for name in self._algorithm.states}
        return Values(numbers, basis, moments, p if averages else None)

    def tracks(
        self, element: int, matrix: MatrixShard | SplitMatrix, owner: int, stepped: Values | None, load: bool
    ) -> Iterator[Track]:
        """The pieces of one matrix's states that go from one form to the other.

        Args:
            element: the number of the matrix in the parameter.
            matrix: as it is stepped.
            owner: the rank that has all of its states, unless it is stepped the low-rank way.
            stepped: this rank's part; None for none.
            load: from the formed states, rather than to them.
        """
        formed, whole = self._values[element], range(self._low_rank_shape[self._axis])
        bases = self._held(matrix, owner, range(self._basis_shape[0]), SplitMatrix.basis_rows)
        kept = self._held(matrix, owner, whole, SplitMatrix.kept)
        one = self._held(matrix, owner, range(1))

        def track(
            width: int, parts: Sequence[range], shown: Sequence[range], own: Tensor | None, other: Tensor
        ) -> Track:
            return Track(width, shown, parts, other, own) if load else Track(width, parts, shown, own, other)

        everywhere = [range(1)] * self._ranks
        yield track(NUMBERS, one, everywhere, None if stepped is None else stepped.numbers, formed.numbers)
        r = self._basis_shape[1]
        yield track(r, bases, self._rows, None if stepped is None else stepped.basis, formed.basis)
        for name, values in formed.moments.items():
            own = None if stepped is None else stepped.moments.get(name)
            own = None if own is None else own.transpose(0, self._axis)
            yield track(r, kept, self._entries, own, values.transpose(0, self._axis))
        if formed.averages is not None:
            own, single = None if stepped is None else stepped.averages, self._settings.has_one_factor
            shown = everywhere if single else [whole] * self._ranks
            yield track(1, one if single else kept, shown, own, formed.averages)

    def _held(
        self,
        matrix: MatrixShard | SplitMatrix,
        owner: int,
        whole: range,
        part: Callable[[SplitMatrix, int], range] | None = None,
    ) -> list[range]:
        """By rank, which rows of P or entries of R it steps with, as `part` says; without, `whole` of its own."""
        if isinstance(matrix, SplitMatrix) and matrix.way == "low_rank":
            held = {rank: whole if part is None else part(matrix, rank) for rank in matrix.sharers}
            return [held.get(rank, range(0)) for rank in range(self._ranks)]
        return [whole if rank == owner else range(0) for rank in range(self._ranks)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the states in a state dict, by name."""
        algorithm, (entries, batch) = self._algorithm, (self._low_rank_shape[self._axis], tuple(self._batch))
        shapes = {STEP: batch, REFRESH_STEP: batch, BASIS: (*batch, *self._basis_shape)}
        shapes |= {RESIDUAL_NORM: batch} if algorithm.limited else {}
        averages = self._settings.averages_of(entries)
        shapes |= {RESIDUAL_AVG_SQ: (*batch, averages)} if averages else {}
        return shapes | dict.fromkeys(algorithm.states, (*batch, *self._low_rank_shape))

    def shown(self) -> dict[str, Tensor]:
        """The states as a state dict has them."""
        numbers = self._joined([each.numbers[0] for each in self._values])
        dtype = self._settings.state_dtype
        basis_dtype = self._dtype if dtype == "float32" else torch.bfloat16
        moment_dtype = torch.bfloat16 if dtype == "bfloat16" else self._dtype
        state = {
            STEP: numbers[..., 0].to(torch.int64),
            REFRESH_STEP: numbers[..., 1].to("cpu", torch.int64),
            BASIS: self._placed(BASIS, 0, [each.basis.to(basis_dtype) for each in self._values]),
        }
        if self._algorithm.limited:
            state[RESIDUAL_NORM] = numbers[..., 2].clone()
        if self._values[0].averages is not None:
            state[RESIDUAL_AVG_SQ] = self._joined([each.averages for each in self._values])
        for name in self._algorithm.states:
            state[name] = self._placed(name, self._axis, [each.moments[name].to(moment_dtype) for each in self._values])
        return state

    def _joined(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack(tuple(values)) if self._batch else values[0]

    def _placed(self, name: str, dim: int, values: Sequence[Tensor]) -> DTensor:
        placements = evenly(self._param, dim + len(self._batch))
        return placed(self._joined(values), self._param, placements, self.shapes()[name])

    def take(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of `shown`; may be a collective call."""

        def each_of(value: Tensor) -> Sequence[Tensor]:
            return value if self._batch else [value]

        def cut(name: str, dim: int, block: range) -> Sequence[Tensor]:
            return each_of(own_part(state[name], self._param, dim + len(self._batch), block))

        names = [STEP, REFRESH_STEP, RESIDUAL_NORM, RESIDUAL_AVG_SQ]
        plain = {name: each_of(whole_of(state[name])) for name in names if name in state}
        bases = cut(BASIS, 0, self._rows[self._rank])
        moments = {name: cut(name, self._axis, self._entries[self._rank]) for name in self._algorithm.states}
        for element, values in enumerate(self._values):
            for place, name in enumerate(names[:NUMBERS]):
                if name in plain:
                    values.numbers[0, place] = plain[name][element]
            if values.averages is not None:
                values.averages.copy_(plain[RESIDUAL_AVG_SQ][element])
            values.basis.copy_(bases[element])
            for name, moment in values.moments.items():
                moment.copy_(moments[name][element])


def whole_of(value: Tensor) -> Tensor:
    """All of a tensor; of a DTensor that is cut a collective call."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def placed(local: Tensor, param: DTensor, placements: Sequence[Placement], shape: tuple[int, ...]) -> DTensor:
    """A tensor of which this rank has its part, on a parameter's mesh.

    Args:
        local: the part.
        param: the parameter.
        placements: of the tensor.
        shape: of the whole.
    """
    strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
    size = torch.Size(shape)
    return DTensor.from_local(
        local.contiguous(), param.device_mesh, placements, run_check=False, shape=size, stride=strides
    )


def placed_part(value: DTensor, placements: Sequence[Placement]) -> Tensor:
    """This rank's part of a tensor; a collective call where it is placed otherwise."""
    placements = list(placements)
    return local_of(value if list(value.placements) == placements else value.redistribute(placements=placements))


def own_part(value: Tensor, param: DTensor, dim: int, block: range) -> Tensor:
    """This rank's part of a tensor that is cut evenly over the ranks over which a parameter is.

    Args:
        value: a DTensor, or the whole tensor.
        param: the parameter.
        dim: which dimension is cut.
        block: this rank's part of it.
    """
    if not isinstance(value, DTensor):
        return value.narrow(dim, block.start, len(block))
    return placed_part(value, evenly(param, dim))


def evenly(param: DTensor, dim: int) -> list[Placement]:
    """Placements that cut a dimension over the ranks over which a parameter is cut."""
    return [Replicate() if type(each) is Replicate else Shard(dim) for each in param.placements]
