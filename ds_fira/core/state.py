"""The optimizer state of projected matrices: plain tensors, one set for all matrices of a shape in one parameter.

A parameter that is one matrix has states of matrix shape. Where a parameter holds several (a 3-D expert tensor, or a
flat ZeRO partition), every state has a leading dimension that counts the matrices this rank owns in it. Where their
shapes differ (param groups that the user made), each shape has its own set, its keys marked with the shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import EllipsisType

import torch
from torch import Tensor

from ds_fira.core import quantization
from ds_fira.core.algorithms import FIRA_ADAM, Algorithm
from ds_fira.core.drawn_basis import DrawnBasis
from ds_fira.core.quantization import Stored
from ds_fira.core.settings import GroupSettings
from ds_fira.core.subspace import Side, low_rank_shape

STEP = "step"
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
BASIS = "basis"
RESIDUAL_NORM = "residual_norm"
RESIDUAL_AVG_SQ = "residual_avg_sq"
REFRESH_STEP = "refresh_step"
# Behind the name of a moment: Adam's, of the whole matrix, that wait for its first basis.
UNPROJECTED = "_unprojected"
# Read by the host in every step, so kept on the CPU whatever the parameter's device.
HOST_KEYS = (REFRESH_STEP,)
# AdamW parameters of fewer elements keep float32 states: nothing to save there, and encoding has a fixed cost.
SMALL_PARAM = 4096
# Of matrices in the leading dimension of a state; ... for a state without one.
Index = int | slice | EllipsisType


@dataclass(slots=True)
class MatrixState:
    """The state of one matrix, or of a batch of k of one shape, as views of the parameter's state tensors.

    Attributes:
        side: the projected side.
        step: steps made, int64, 0-dim or (k,), on the parameter's device: whether a step counts is decided there.
        refresh_step: `step` at the last refresh, -1 while there is no basis; int64, on the CPU.
        basis: P, (m, r) left or (n, r) right; (0, r) where it is drawn.
        moments: the states of R by name, (r, n) left or (m, r) right, as `ds_fira.core.quantization` stores them; a
            state without tensors is another rank's.
        residual_norm: the limiter's |S_prev|, 0-dim or (k,); 0 is no history. None for an algorithm without a limiter.
        residual_avg_sq: p, the average of a normalized residual's squares, (..., n) left or (..., m) right, or (..., 1)
            with one factor; below 0 is no history. None for another residual, and for entries that another rank keeps.
        dtype: in which a step is computed, whatever the dtype in which basis and moments are stored.
        drawn: which basis P is where none is stored; None where one is, and where nobody steps by this view.
        unprojected: moments of G by name, (m, n) or the columns (left) or rows (right) whose moments of R are kept
            here; another optimizer left them, and the first basis projects them. {} for none.
    """

    side: Side
    step: Tensor
    refresh_step: Tensor
    basis: Tensor
    moments: dict[str, Stored]
    residual_norm: Tensor | None
    residual_avg_sq: Tensor | None = None
    dtype: torch.dtype = torch.float32
    unprojected: dict[str, Tensor] = field(default_factory=dict)
    drawn: DrawnBasis | None = None
    _known: tuple[int, int] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def last_refresh(self) -> int:
        """`refresh_step` of one matrix; read anew where the tensor, or one that shares its memory, was written to."""
        version = self.refresh_step._version
        if self._known is None or self._known[0] != version:
            # On the host, where this is no call of torch's.
            self._known = version, self.refresh_step.tolist()
        return self._known[1]

    @property
    def has_basis(self) -> bool:
        """Whether one matrix has had a refresh."""
        return self.last_refresh >= 0

    def projector(self, rows: range | None = None) -> Tensor:
        """P of one matrix in the dtype of a step: as stored, or drawn, then all of it or some rows, half-open."""
        if self.drawn is None:
            return self.basis.to(self.dtype)
        return self.drawn.draw(self.last_refresh, rows, self.dtype, self.basis.device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter is stepped: float32 for a parameter of lower precision, else the parameter's."""
    return dtype if dtype == torch.float64 else torch.float32


def host_key(key: str) -> bool:
    """Whether a state lives on the CPU whatever the parameter's device."""
    return key.partition(".")[0] in HOST_KEYS


def allocate(
    param: Tensor,
    shapes: Sequence[tuple[int, int]],
    settings: GroupSettings,
    batched: bool,
    algorithm: Algorithm = FIRA_ADAM,
) -> dict[str, Tensor]:
    """Zero state for the matrices of one parameter, before any of them has a basis.

    Args:
        param: gives dtype and device.
        shapes: (m, n) of every matrix owned in it, in order.
        settings: of the param group.
        batched: whether the states have a leading dimension; False only for a parameter that is one matrix.
        algorithm: says which moments there are, and whether the limiter's norm is.
    """
    state: dict[str, Tensor] = {}
    for shape, number in Counter(shapes).items():
        side, batch = settings.side_of(shape), (number,) if batched else ()
        basis, low_rank = settings.basis_shape(shape), low_rank_shape(shape, settings.rank, side)
        averages = settings.averages_of(low_rank[side == "left"])
        allocated = allocate_matrices(param, basis, low_rank, settings.state_dtype, batch, algorithm, averages)
        state |= {key + _mark(shape, shapes): value for key, value in allocated.items()}
    return state


def allocate_matrices(
    param: Tensor,
    basis: tuple[int, int],
    low_rank: tuple[int, int] | None,
    state_dtype: str,
    batch: tuple[int, ...],
    algorithm: Algorithm = FIRA_ADAM,
    averages: int = 0,
) -> dict[str, Tensor]:
    """Zero state for matrices of one shape, averages without a history.

    Args:
        param: gives dtype and device.
        basis: shape of P, as it is stored.
        low_rank: shape of the moments; None where another rank holds them.
        state_dtype: how basis and moments are stored; "int8" keeps the basis in bfloat16, for an error in P moves the
            whole update, not one element of it.
        batch: (k,), or () for one matrix without a leading dimension.
        algorithm: says which moments there are, and whether the limiter's norm is.
        averages: numbers in p, kept in float32 or more whatever the `state_dtype`; 0 for no p.
    """
    dtype, device = compute_dtype(param.dtype), param.device
    basis_dtype = dtype if state_dtype == "float32" else torch.bfloat16
    state = {
        STEP: torch.zeros(batch, dtype=torch.int64, device=device),
        REFRESH_STEP: torch.full(batch, -1, dtype=torch.int64),
        BASIS: torch.zeros((*batch, *basis), dtype=basis_dtype, device=device),
    }
    if algorithm.limited:
        state[RESIDUAL_NORM] = torch.zeros(batch, dtype=dtype, device=device)
    if averages:
        state[RESIDUAL_AVG_SQ] = torch.full((*batch, averages), -1.0, dtype=dtype, device=device)
    for key, kind in algorithm.states.items() if low_rank is not None else ():
        signed = kind != "second"
        stored = quantization.allocate(low_rank, batch, state_dtype, dtype=dtype, device=device, signed=signed)
        state |= {key + suffix: value for suffix, value in stored.items()}
    return state


def allocate_unprojected(param: Tensor, state_dtype: str, algorithm: Algorithm) -> dict[str, Tensor]:
    """Zero state for a parameter that is not projected: its moments and the step count."""
    state, dtype = {STEP: torch.zeros((), dtype=torch.int64)}, compute_dtype(param.dtype)
    kept = state_dtype if param.numel() >= SMALL_PARAM else "float32"
    for key, kind in algorithm.states.items():
        stored = quantization.allocate(
            tuple(param.shape), (), kept, dtype=dtype, device=param.device, signed=kind != "second"
        )
        state |= {key + suffix: value for suffix, value in stored.items()}
    return state


def matrix_states(
    state: dict[str, Tensor],
    shapes: Sequence[tuple[int, int]],
    settings: GroupSettings,
    batched: bool,
    algorithm: Algorithm,
    *,
    dtype: torch.dtype | None = None,
) -> list[MatrixState]:
    """The states of the matrices of one parameter, without a leading dimension.

    Args:
        state: as `allocate` made it.
        shapes: as in `allocate`.
        settings: of the param group.
        batched: as in `allocate`.
        algorithm: as in `allocate`.
        dtype: as in `state_views`.
    """
    return [
        state_views(state, settings.side_of(shape), mark, row if batched else ..., algorithm=algorithm, dtype=dtype)
        for shape, (mark, row) in zip(shapes, positions(shapes), strict=True)
    ]


def positions(shapes: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
    """For every matrix of a parameter, what the keys of its states end in and its row in them.

    Args:
        shapes: as in `allocate`.
    """
    rows = {shape: count() for shape in shapes}
    return [(_mark(shape, shapes), next(rows[shape])) for shape in shapes]


def state_views(
    state: dict[str, Tensor],
    side: Side,
    mark: str = "",
    index: Index = ...,
    *,
    algorithm: Algorithm = FIRA_ADAM,
    dtype: torch.dtype | None = None,
) -> MatrixState:
    """The state at `index` of the leading dimension, from the keys that end in `mark`.

    Args:
        state: as `allocate` made it.
        side: the projected side.
        mark: of a shape, or of a part of a cut matrix.
        index: into the leading dimension; ... for a state without one.
        algorithm: says which states there are.
        dtype: in which the parameter is stepped; None for that of the limiter's norm.
    """

    def view(key: str) -> Tensor:
        return _at(state[key + mark], index)

    norm = view(RESIDUAL_NORM) if algorithm.limited else None
    return MatrixState(
        side=side,
        step=view(STEP),
        refresh_step=view(REFRESH_STEP),
        basis=view(BASIS),
        moments={name: stored_moment(state, name, mark, index) for name in algorithm.states},
        residual_norm=norm,
        residual_avg_sq=view(RESIDUAL_AVG_SQ) if RESIDUAL_AVG_SQ + mark in state else None,
        dtype=dtype or (torch.float32 if norm is None else norm.dtype),
        unprojected={name: view(name + UNPROJECTED) for name in algorithm.states if name + UNPROJECTED + mark in state},
    )


def allocate_unprojected_moments(
    state: dict[str, Tensor], mark: str, shape: tuple[int, int], dtype: torch.dtype, names: Iterable[str]
) -> None:
    """Add zero moments of whole matrices to the state of those that end in `mark`; what is there stays.

    Args:
        state: as `allocate` made it.
        mark: of a shape, or of a part of a cut matrix.
        shape: of G, or of the columns or rows of it whose moments are kept.
        dtype: of the moments.
        names: of the moments.
    """
    basis = state[BASIS + mark]
    for name in names:
        if name + UNPROJECTED + mark not in state:
            state[name + UNPROJECTED + mark] = basis.new_zeros((*basis.shape[:-2], *shape), dtype=dtype)


def drop_unprojected_moments(state: dict[str, Tensor]) -> None:
    """Give the memory of moments back that wait for nothing more: all matrices they are of have a basis."""
    for key in [key for key in state if UNPROJECTED in key]:
        mark = key.partition(UNPROJECTED)[2]
        if bool((state[REFRESH_STEP + mark] >= 0).all()):
            del state[key]


def stored_moment(state: dict[str, Tensor], key: str, mark: str = "", index: Index = ...) -> Stored:
    """One moment as `ds_fira.core.quantization` stores it, from the keys that begin with `key` and end in `mark`."""
    return {
        suffix: _at(state[key + suffix + mark], index)
        for suffix in (quantization.VALUES, quantization.SCALE)
        if key + suffix + mark in state
    }


def _at(tensor: Tensor, index: Index) -> Tensor:
    """The part of a state at an index; the state itself for ..., of which torch would make a view."""
    return tensor if index is ... else tensor[index]


def _mark(shape: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> str:
    return "" if all(other == shape for other in shapes) else f".{shape[0]}x{shape[1]}"
