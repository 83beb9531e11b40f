"""Fill an optimizer with what a run had learned, the other half of `ds_fira.checkpoint.named_state`.

Whole matrices, parts of cut ones and flat states are all copied by the ranges they have in common, and every range has
to be covered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_fira.checkpoint.named_state import SavedState, TensorSlices
from ds_fira.checkpoint.slices import Missing, Piece, StateSlice
from ds_fira.core import quantization
from ds_fira.core.algorithms import FIRA_ADAM, Algorithm
from ds_fira.core.state import STEP, MatrixState, compute_dtype, state_views, stored_moment


def restore(
    saved: SavedState,
    places: Iterable[tuple[Tensor, TensorSlices]],
    state_of: Callable[[Tensor], dict[str, Tensor]],
    *,
    weights: bool,
    algorithm: Algorithm = FIRA_ADAM,
) -> None:
    """Fill tensors and their states from a saved state; what was saved without a state is left without one.

    Args:
        saved: read completely; its structure has been checked (`refuse_changed_structure`).
        places: the tensors to fill, and what they hold.
        state_of: gives the state of a tensor, allocated.
        weights: whether to fill the tensors themselves too.
        algorithm: of the optimizer that is filled, and of the one that saved.

    Raises:
        ValueError: a part of the saved state is missing, or the rule kept others.
    """
    refuse_other_states(saved, algorithm)
    known_names = {name for group in saved.groups for name in group.members}
    for param, held in places:
        strangers = [piece.name for piece in held.pieces if piece.name not in known_names]
        if strangers:
            raise ValueError(
                f"{algorithm.name}: the checkpoint knows nothing of {strangers[0]!r}; train the same parameters under "
                "the names that they had, or in the order that they had where they have no names."
            )
        if weights:
            _fill(param.detach().view(-1), held.pieces, saved.weights, "weights")
        if held.matrices:
            known = [place for place in held.matrices if saved.matrices.get(place.name)]
            state = state_of(param) if known else {}
            for place in known:
                dtype = compute_dtype(param.dtype)
                target = state_views(state, place.side, place.mark, place.index, algorithm=algorithm, dtype=dtype)
                _restore_matrix(place, target, saved.matrices[place.name])
        elif any(saved.moments.get(piece.name) for piece in held.pieces):
            _restore_moments(param, state_of(param), held.pieces, saved, algorithm)


def refuse_other_states(saved: SavedState, algorithm: Algorithm) -> None:
    """Stop if a rule keeps other states than when it was saved.

    Raises:
        ValueError: one sentence with both.
    """
    before, now = list(saved.algorithm.states), list(algorithm.states)
    if before != now:
        raise ValueError(
            f"{algorithm.name}: the rule keeps the states {now}, and the checkpoint holds {before}; resume with the "
            "rule that saved it."
        )


def _restore_matrix(place: StateSlice, target: MatrixState, parts: list[tuple[StateSlice, MatrixState]]) -> None:
    first = parts[0][1]
    target.step.copy_(first.step)
    target.refresh_step.copy_(first.refresh_step)
    if target.residual_norm is not None:
        target.residual_norm.copy_(first.residual_norm)
    missing = Missing(place.basis)
    for other, state in parts:
        for common in missing.take(other.basis):
            target.basis[_within(common, place.basis)].copy_(state.basis[_within(common, other.basis)])
    _require_all(missing, "basis", place.name)
    for name, stored in target.moments.items():
        if stored:
            _restore_moment(place, stored, [(other, state.moments[name]) for other, state in parts], target.dtype)


def _restore_moment(
    place: StateSlice,
    stored: quantization.Stored,
    parts: list[tuple[StateSlice, quantization.Stored]],
    dtype: torch.dtype,
) -> None:
    parts = [(other, part) for other, part in parts if part and len(other.kept)]
    for other, part in parts:
        if other.kept == place.kept and _same_form(stored, part):
            _copy(stored, part)
            return
    shape = stored[quantization.VALUES].shape
    value = torch.zeros(shape, dtype=dtype, device=stored[quantization.VALUES].device)
    missing = Missing(place.kept)
    for other, part in parts:
        ranges = missing.take(other.kept)
        values = quantization.read(part, dtype) if ranges else None
        for common in ranges:
            source = values.narrow(place.axis, common.start - other.kept.start, len(common))
            value.narrow(place.axis, common.start - place.kept.start, len(common)).copy_(source)
    _require_all(missing, "moments", place.name)
    quantization.write_(stored, value, seed=None)


def _restore_moments(
    param: Tensor, state: dict[str, Tensor], pieces: Sequence[Piece], saved: SavedState, algorithm: Algorithm
) -> None:
    """Fill the state of one tensor without a projection; its step count is the largest of its parameters'."""
    found = {piece.name: saved.moments.get(piece.name, []) for piece in pieces}
    steps = [int(moments.step) for parts in found.values() for _, moments in parts]
    state[STEP].fill_(max(steps))
    for key in algorithm.states:
        stored = stored_moment(state, key)
        sources = {name: [(piece, held.moments[key]) for piece, held in parts] for name, parts in found.items()}
        alike = [part for piece, part in sources[pieces[0].name] if piece == pieces[0] and _same_form(stored, part)]
        if alike and all(any(p == piece and s is alike[0] for p, s in sources[piece.name]) for piece in pieces):
            _copy(stored, alike[0])
            continue
        value = torch.zeros(param.numel(), dtype=torch.float64 if param.dtype == torch.float64 else torch.float32)
        present = [piece for piece in pieces if sources[piece.name]]
        _fill(value, present, sources, "moments", quantization.elements)
        quantization.write_(stored, value.to(param.device), seed=None)


def _fill(
    target: Tensor,
    pieces: Sequence[Piece],
    sources: dict[str, list[tuple[Piece, Any]]],
    what: str,
    read: Callable[[Any, int, int], Tensor] = lambda flat, start, stop: flat[start:stop],
) -> None:
    """Copy the elements of `pieces` to their offsets in a 1-D tensor, from wherever they were."""
    for piece in pieces:
        missing = Missing(range(piece.start, piece.stop))
        for other, flat in sources.get(piece.name, []):
            for common in missing.take(range(other.start, other.stop)):
                values = read(flat, *_bounds(common, other))
                start, stop = _bounds(common, piece)
                target[start:stop].copy_(values)
        _require_all(missing, what, piece.name)


def _bounds(common: range, piece: Piece) -> tuple[int, int]:
    return piece.offset + common.start - piece.start, piece.offset + common.stop - piece.start


def _within(common: range, held: range) -> slice:
    return slice(common.start - held.start, common.stop - held.start)


def _same_form(stored: quantization.Stored, other: quantization.Stored) -> bool:
    return stored.keys() == other.keys() and all(
        value.numel() == other[key].numel() and value.dtype == other[key].dtype for key, value in stored.items()
    )


def _copy(stored: quantization.Stored, other: quantization.Stored) -> None:
    for key, value in stored.items():
        value.view(-1).copy_(other[key].reshape(-1))


def _require_all(missing: Missing, what: str, name: str) -> None:
    if missing.ranges:
        raise ValueError(
            f"FiraAdam: the checkpoint lacks a part of the {what} of {name}; a file of it is missing or from another "
            "save, so load an older tag."
        )
