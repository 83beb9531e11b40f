"""The optimizer state of projected matrices: plain tensors, one set for all matrices of a shape in one parameter.

A parameter that is one matrix has states of matrix shape. Where a parameter holds several (a 3-D expert tensor, or a
flat ZeRO partition), every state has a leading dimension that counts the matrices this rank owns in it. Where their
shapes differ (param groups that the user made), each shape has its own set, its keys marked with the shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_fira.subspace import Side, basis_shape, low_rank_shape, projection_side

STEP = "step"
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
BASIS = "basis"
RESIDUAL_NORM = "residual_norm"
REFRESH_STEP = "refresh_step"
# Read by the host in every step, so kept on the CPU whatever the parameter's device.
HOST_KEYS = (STEP, REFRESH_STEP)


@dataclass(slots=True)
class MatrixState:
    """The state of one matrix, as views of the parameter's state tensors.

    Attributes:
        side: the projected side.
        step: steps made, int64, 0-dim, on the CPU.
        refresh_step: `step` at the last refresh, -1 while there is no basis; int64, 0-dim, on the CPU.
        basis: P, (m, r) left or (n, r) right.
        exp_avg: first moment of R, (r, n) left or (m, r) right.
        exp_avg_sq: second moment of R, the same shape.
        residual_norm: the limiter's |S_prev|, 0-dim; 0 is no history.
    """

    side: Side
    step: Tensor
    refresh_step: Tensor
    basis: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    residual_norm: Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the states of a parameter: float32 for a parameter of lower precision, else the parameter's."""
    return dtype if dtype == torch.float64 else torch.float32


def host_key(key: str) -> bool:
    """Whether a state lives on the CPU whatever the parameter's device."""
    return key.partition(".")[0] in HOST_KEYS


def allocate(
    param: Tensor, shapes: Sequence[tuple[int, int]], group: dict[str, Any], batched: bool
) -> dict[str, Tensor]:
    """Zero state for the matrices of one parameter, before any of them has a basis.

    Args:
        param: gives dtype and device.
        shapes: (m, n) of every matrix owned in it, in order.
        group: the param group, for `rank`, `proj_type` and `formulation`.
        batched: whether the states have a leading dimension; False only for a parameter that is one matrix.
    """
    state: dict[str, Tensor] = {}
    dtype = state_dtype(param.dtype)
    for shape, rows in _rows_by_shape(shapes).items():
        side = projection_side(shape, group["proj_type"], group["formulation"])
        low_rank = low_rank_shape(shape, group["rank"], side)
        batch = (len(rows),) if batched else ()
        mark = _mark(shape, shapes)

        def zeros(*size: int, batch: tuple[int, ...] = batch) -> Tensor:
            return torch.zeros((*batch, *size), dtype=dtype, device=param.device)

        state[STEP + mark] = torch.zeros(batch, dtype=torch.int64)
        state[REFRESH_STEP + mark] = torch.full(batch, -1, dtype=torch.int64)
        state[BASIS + mark] = zeros(*basis_shape(shape, group["rank"], side))
        state[EXP_AVG + mark] = zeros(*low_rank)
        state[EXP_AVG_SQ + mark] = zeros(*low_rank)
        state[RESIDUAL_NORM + mark] = zeros()
    return state


def matrix_states(
    state: dict[str, Tensor], shapes: Sequence[tuple[int, int]], group: dict[str, Any], batched: bool
) -> list[MatrixState]:
    """The states of the matrices of one parameter, in the order of `shapes`; arguments as in `allocate`."""
    result: dict[int, MatrixState] = {}
    for shape, rows in _rows_by_shape(shapes).items():
        side = projection_side(shape, group["proj_type"], group["formulation"])
        mark = _mark(shape, shapes)
        tensors = {key: state[key + mark] for key in (STEP, REFRESH_STEP, BASIS, EXP_AVG, EXP_AVG_SQ, RESIDUAL_NORM)}
        for row, position in enumerate(rows):
            views = {key: tensor[row] if batched else tensor for key, tensor in tensors.items()}
            result[position] = MatrixState(side=side, **views)
    return [result[position] for position in range(len(shapes))]


def _rows_by_shape(shapes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, shape in enumerate(shapes):
        rows[shape].append(position)
    return rows


def _mark(shape: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> str:
    return "" if all(other == shape for other in shapes) else f".{shape[0]}x{shape[1]}"
