"""The optimizer state of one parameter, wherever its parts are: read as whole tensors, and set.

A checkpoint knows which part of which matrix every rank holds (`ds_fira.checkpoint.slices`) and copies what ranges have
in common (`ds_fira.checkpoint.restore`). The same is done here for one parameter of a live optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_fira.checkpoint.restore import restore_matrix
from ds_fira.checkpoint.slices import StateSlice
from ds_fira.core import quantization
from ds_fira.core.selection import shape_of
from ds_fira.core.state import MatrixState
from ds_fira.core.subspace import Side
from ds_fira.optim.param_place import ParamPlace
from ds_fira.optim.registry import fira_of


@dataclass(frozen=True)
class LowRankState:
    """The state of a projected parameter, whole; in float32, or float64 for a parameter of float64.

    A 3-D parameter holds k matrices: every tensor then has a leading dimension of k.

    Attributes:
        name: of the parameter in the module; its number among the optimizer's where it has no name.
        shape: of the parameter, (m, n) or (k, m, n).
        side: the projected side.
        rank: r, at most the smaller side.
        step: steps made, int64, () or (k,).
        refresh_step: `step` at the last refresh, -1 while there is no basis; int64, the same shape.
        basis: P with orthonormal columns, (m, r) left or (n, r) right; zero while there is none; (0, r) of an optimizer
            that draws it, as ApolloAdam.
        moments: the states of R by their names, for FiraAdam "exp_avg" and "exp_avg_sq": (r, n) left or (m, r) right.
        residual_norm: the limiter's norm of the last residual, () or (k,); 0 is no history, None is no limiter.
        residual_avg_sq: the averages of a normalized residual's squares, (n,), (m,) or (1,); below 0 is no history.
            None for another residual.
    """

    name: str
    shape: tuple[int, ...]
    side: Side
    rank: int
    step: Tensor
    refresh_step: Tensor
    basis: Tensor
    moments: dict[str, Tensor]
    residual_norm: Tensor | None = None
    residual_avg_sq: Tensor | None = None

    @property
    def exp_avg(self) -> Tensor:
        """The first moment of R = P'G, or of G P; where the optimizer keeps one."""
        return self.moments["exp_avg"]

    @property
    def exp_avg_sq(self) -> Tensor:
        """The second moment of R; where the optimizer keeps one."""
        return self.moments["exp_avg_sq"]


def low_rank_state(engine_or_optimizer: object, param: Tensor | str) -> LowRankState:
    """The low-rank state of a projected parameter, gathered from the ranks that hold it.

    Under an engine a collective call: every rank makes it, for the same parameter, and has the same answer.

    Args:
        engine_or_optimizer: a DeepSpeed engine that trains with an optimizer of this package, or the optimizer.
        param: of the engine's module, or of the optimizer where it has no engine; or its name.

    Returns:
        Copies, on the parameter's device; zero, with a `refresh_step` of -1, where it has not been stepped yet.

    Raises:
        ValueError: the parameter is not projected, or not trained by this optimizer; the same on every rank.
    """
    optimizer = fira_of(engine_or_optimizer)
    place = ParamPlace.of(optimizer, param, "low_rank_state")
    parts = [(part.to_plain(), _whole_values(state)) for part, state in place.held(allocate=False)]
    if optimizer.communicator is not None and not optimizer.replicated:
        parts = [part for held in optimizer.communicator.gather_objects(parts) for part in held]
    saved: dict[str, list[tuple[StateSlice, MatrixState]]] = {}
    for plain, state in parts:
        part = StateSlice.from_plain(plain)
        saved.setdefault(part.name, []).append((part, state))
    found = []
    for whole in place.wholes():
        target = place.allocate()
        if whole.name in saved:
            restore_matrix(whole, target, saved[whole.name])
        found.append(target)
    device = param.device if isinstance(param, Tensor) else next(place.tensors(), torch.empty(0)).device

    def stacked(values: list[Tensor | None]) -> Tensor | None:
        if values[0] is None:
            return None
        return (torch.stack(values) if len(place.shape) == 3 else values[0]).to(device)

    return LowRankState(
        place.name,
        place.shape,
        place.side,
        place.rank,
        stacked([state.step for state in found]),
        stacked([state.refresh_step for state in found]),
        stacked([state.basis for state in found]),
        {key: stacked([state.moments[key][quantization.VALUES] for state in found]) for key in found[0].moments},
        stacked([state.residual_norm for state in found]),
        stacked([state.residual_avg_sq for state in found]),
    )


def set_low_rank_state(engine_or_optimizer: object, param: Tensor | str, state: LowRankState) -> None:
    """Set the low-rank state of a projected parameter on the ranks that hold it; the next step starts from it.

    Every rank calls it with the same state. What is stored in less than float32 is rounded to nearest.

    Args:
        engine_or_optimizer: as in `low_rank_state`.
        param: likewise.
        state: of a parameter of this shape, rank and side; such as `dataclasses.replace(low_rank_state(...), basis=P)`.
            The columns of its basis are orthonormal, which is not checked.

    Raises:
        ValueError: as of `low_rank_state`, or the state does not fit; nothing is changed.
    """
    optimizer = fira_of(engine_or_optimizer)
    place = ParamPlace.of(optimizer, param, "set_low_rank_state")
    _require_fit(place, state)
    sources = {}
    for number, whole in enumerate(place.wholes()):
        index = number if len(place.shape) == 3 else ...
        values = [state.step, state.refresh_step, state.basis, state.residual_norm, state.residual_avg_sq]
        step, refresh_step, basis, norm, averages = (None if value is None else value[index] for value in values)
        moments = {key: {quantization.VALUES: value[index]} for key, value in state.moments.items()}
        sources[whole.name] = whole, MatrixState(place.side, step, refresh_step, basis, moments, norm, averages)
    with torch.no_grad():
        for part, target in place.held(allocate=True):
            restore_matrix(part, target, [sources[part.name]])
    optimizer._refresher.forget_counts()


def _whole_values(state: MatrixState) -> MatrixState:
    """Copies of a state's tensors on the host, in the dtype of a step."""

    def kept(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to("cpu", copy=True)

    moments = {
        key: {quantization.VALUES: kept(quantization.read(stored, state.dtype))} if stored else {}
        for key, stored in state.moments.items()
    }
    basis = kept(state.basis.to(state.dtype))
    norm, averages = kept(state.residual_norm), kept(state.residual_avg_sq)
    return MatrixState(state.side, kept(state.step), kept(state.refresh_step), basis, moments, norm, averages)


def _require_fit(place: ParamPlace, state: LowRankState) -> None:
    """Stop unless a state has the form of this parameter's."""
    own, batch = place.allocate(), place.shape[:-2]
    pairs = {"step": (state.step, own.step), "refresh_step": (state.refresh_step, own.refresh_step)}
    pairs["basis"] = state.basis, own.basis
    pairs["residual_norm"] = state.residual_norm, own.residual_norm
    pairs["residual_avg_sq"] = state.residual_avg_sq, own.residual_avg_sq
    for key in {**own.moments, **state.moments}:
        stored = own.moments.get(key)
        pairs[key] = state.moments.get(key), None if stored is None else stored[quantization.VALUES]
    given = {"side": (state.side, place.side), "rank": (state.rank, place.rank)}
    given |= {
        f"the shape of {key}": (
            None if value is None else shape_of(value),
            None if mine is None else (*batch, *mine.shape),
        )
        for key, (value, mine) in pairs.items()
    }
    for what, (value, wanted) in given.items():
        if value != wanted:
            raise ValueError(
                f"ds_fira.set_low_rank_state: {what} of the state for {place.name} is {value}, and has to be "
                f"{wanted}; change what low_rank_state gave for this parameter."
            )
