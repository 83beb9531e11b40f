"""The state of a run by the names of parameters and matrices: read from any number of ranks, restored on any other.

A saved optimizer describes what its tensors hold (`describe`, in its state dict under "fira"). `SavedState` puts the
state dicts of all ranks together under names, without copying; `restore` fills an optimizer from it, wherever that
keeps what. Whole matrices, parts of cut ones and flat AdamW states are all copied by the ranges they have in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_fira import compression
from ds_fira.carry_over import SavedGroup
from ds_fira.methods import FIRA_ADAM, Method
from ds_fira.places import MatrixPlace, Piece, overlap
from ds_fira.state import BASIS, EXP_AVG, STEP, MatrixState, compute_dtype, state_views, stored_moment

# Where the description is in a state dict, and the version of its form.
KEY = "fira"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Places:
    """What one stepped tensor holds.

    Attributes:
        pieces: of which parameters it holds what.
        matrices: the projected matrices whose states, or parts of states, are with it; empty under AdamW.
    """

    pieces: tuple[Piece, ...]
    matrices: tuple[MatrixPlace, ...]

    def to_plain(self) -> dict[str, Any]:
        """As numbers, strings, lists and dicts."""
        pieces = [[piece.name, piece.offset, piece.start, piece.stop] for piece in self.pieces]
        return {"pieces": pieces, "matrices": [place.to_plain() for place in self.matrices]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Places:
        """The reverse of `to_plain`."""
        pieces = tuple(Piece(*piece) for piece in plain["pieces"])
        return cls(pieces, tuple(MatrixPlace.from_plain(place) for place in plain["matrices"]))


def describe(
    layout: str,
    given: Sequence[dict[str, Any]],
    members: Sequence[Sequence[tuple[str, tuple[int, ...]]]],
    places: Sequence[Places],
    method: Method = FIRA_ADAM,
) -> dict[str, Any]:
    """What goes into a state dict beside the tensors.

    Args:
        layout: a digest of what lies where on all ranks; two runs with the same one can exchange state dicts as they
            are.
        given: of every param group, the settings it was made with.
        members: of every param group, the names and shapes of its parameters, over all ranks.
        places: of every tensor of this rank, in the order of the state dict.
        method: the optimizer; a description without one is FiraAdam's.
    """
    return {
        **({} if method is FIRA_ADAM else {"method": method.to_plain()}),
        "format": FORMAT,
        "layout": layout,
        "settings": [dict(settings) for settings in given],
        "members": [[[name, list(shape)] for name, shape in group] for group in members],
        "places": [place.to_plain() for place in places],
    }


@dataclass(frozen=True, slots=True)
class SavedMoments:
    """The state of one stepped tensor without a projection; all elements in the order of the tensor.

    Attributes:
        step: steps made.
        moments: by the names of `Method.states`.
    """

    step: Tensor
    moments: dict[str, compression.Stored]

    @property
    def exp_avg(self) -> compression.Stored:
        """Adam's first moment."""
        return self.moments[EXP_AVG]


@dataclass
class SavedState:
    """What a run had learned, by name.

    Attributes:
        groups: its param groups.
        matrices: by matrix, where a part of its state was and that part.
        moments: by parameter under AdamW, likewise.
        weights: by parameter, likewise, the tensors that were stepped.
        method: the optimizer.
    """

    groups: list[SavedGroup] = field(default_factory=list)
    matrices: dict[str, list[tuple[MatrixPlace, MatrixState]]] = field(default_factory=lambda: defaultdict(list))
    moments: dict[str, list[tuple[Piece, SavedMoments]]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[str, list[tuple[Piece, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    method: Method = FIRA_ADAM

    def add(self, state_dict: dict[str, Any], weights: Sequence[Tensor] | None = None) -> None:
        """Add what one rank has saved, without copying a tensor.

        Args:
            state_dict: of its optimizer.
            weights: its stepped tensors, in the order of the state dict; trailing padding may be missing.

        Raises:
            ValueError: the state dict has no description, or one of a later version.
        """
        plain = described(state_dict)
        groups = state_dict["param_groups"]
        self.method = Method.from_plain(plain.get("method"))
        if not self.groups:
            for group, members, given in zip(groups, plain["members"], plain["settings"], strict=True):
                values = {key: value for key, value in group.items() if key not in ("params", "param_names")}
                shapes = {name: tuple(shape) for name, shape in members}
                self.groups.append(SavedGroup(shapes, given, values))
        ids = [number for group in groups for number in group["params"]]
        for position, (number, listed) in enumerate(zip(ids, plain["places"], strict=True)):
            places = Places.from_plain(listed)
            if weights is not None:
                for piece in places.pieces:
                    self.weights[piece.name].append((piece, weights[position].reshape(-1)))
            self._add_state(state_dict["state"].get(number, {}), places)

    def _add_state(self, state: dict[str, Tensor], places: Places) -> None:
        method = self.method
        for place in places.matrices:
            if STEP + place.mark in state:
                views = state_views(state, place.side, place.mark, place.index, method=method)
                self.matrices[place.name].append((place, views))
        plain = STEP in state and not any(key.startswith(BASIS) for key in state)
        if plain and not places.matrices and method.states.keys() <= state.keys():
            moments = SavedMoments(state[STEP], {name: stored_moment(state, name) for name in method.states})
            for piece in places.pieces:
                self.moments[piece.name].append((piece, moments))


def described(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The description in a state dict.

    Raises:
        ValueError: there is none, or it is of a later version.
    """
    plain = state_dict.get(KEY)
    if plain is None:
        raise ValueError(
            "FiraAdam: the state dict does not say what its tensors hold, as those of earlier versions do not; "
            "resume it with the same number of ranks and the same settings, and save it again."
        )
    if plain["format"] > FORMAT:
        raise ValueError(
            f"FiraAdam: the state dict is of format {plain['format']}, and this version reads up to {FORMAT}; update "
            "ds_fira."
        )
    return plain


def restore(
    saved: SavedState,
    places: Iterable[tuple[Tensor, Places]],
    state_of: Callable[[Tensor], dict[str, Tensor]],
    *,
    weights: bool,
    method: Method = FIRA_ADAM,
) -> None:
    """Fill tensors and their states from a saved state; what was saved without a state is left without one.

    Args:
        saved: read completely; its structure has been checked (`refuse_changed_structure`).
        places: the tensors to fill, and what they hold.
        state_of: gives the state of a tensor, allocated.
        weights: whether to fill the tensors themselves too.
        method: of the optimizer that is filled, and of the one that saved.

    Raises:
        ValueError: a part of the saved state is missing, or the rule kept others.
    """
    refuse_other_states(saved, method)
    for param, held in places:
        if weights:
            _fill(param.detach().view(-1), held.pieces, saved.weights, "weights")
        if held.matrices:
            known = [place for place in held.matrices if saved.matrices.get(place.name)]
            state = state_of(param) if known else {}
            for place in known:
                dtype = compute_dtype(param.dtype)
                target = state_views(state, place.side, place.mark, place.index, method=method, dtype=dtype)
                _restore_matrix(place, target, saved.matrices[place.name])
        elif any(saved.moments.get(piece.name) for piece in held.pieces):
            _restore_moments(param, state_of(param), held.pieces, saved, method)


def refuse_other_states(saved: SavedState, method: Method) -> None:
    """Stop if a rule keeps other states than when it was saved.

    Raises:
        ValueError: one sentence with both.
    """
    before, now = list(saved.method.states), list(method.states)
    if before != now:
        raise ValueError(
            f"{method.name}: the rule keeps the states {now}, and the checkpoint holds {before}; resume with the rule "
            "that saved it."
        )


def _restore_matrix(place: MatrixPlace, target: MatrixState, parts: list[tuple[MatrixPlace, MatrixState]]) -> None:
    first = parts[0][1]
    target.step.copy_(first.step)
    target.refresh_step.copy_(first.refresh_step)
    if target.residual_norm is not None:
        target.residual_norm.copy_(first.residual_norm)
    missing = set(place.basis)
    for other, state in parts:
        common = overlap(place.basis, other.basis)
        if missing.intersection(common):
            target.basis[_within(common, place.basis)].copy_(state.basis[_within(common, other.basis)])
            missing.difference_update(common)
    _require_all(not missing, "basis", place.name)
    for name, stored in target.moments.items():
        if stored:
            _restore_moment(place, stored, [(other, state.moments[name]) for other, state in parts], target.dtype)


def _restore_moment(
    place: MatrixPlace,
    stored: compression.Stored,
    parts: list[tuple[MatrixPlace, compression.Stored]],
    dtype: torch.dtype,
) -> None:
    parts = [(other, part) for other, part in parts if part and len(other.kept)]
    for other, part in parts:
        if other.kept == place.kept and _same_form(stored, part):
            _copy(stored, part)
            return
    shape = stored[compression.VALUES].shape
    value = torch.zeros(shape, dtype=dtype, device=stored[compression.VALUES].device)
    missing = set(place.kept)
    for other, part in parts:
        common = overlap(place.kept, other.kept)
        if len(common):
            values = compression.read(part, dtype)
            source = values.narrow(place.axis, common.start - other.kept.start, len(common))
            value.narrow(place.axis, common.start - place.kept.start, len(common)).copy_(source)
            missing.difference_update(common)
    _require_all(not missing, "moments", place.name)
    compression.write_(stored, value, seed=None)


def _restore_moments(
    param: Tensor, state: dict[str, Tensor], pieces: Sequence[Piece], saved: SavedState, method: Method
) -> None:
    """Fill the state of one tensor without a projection; its step count is the largest of its parameters'."""
    found = {piece.name: saved.moments.get(piece.name, []) for piece in pieces}
    steps = [int(moments.step) for parts in found.values() for _, moments in parts]
    state[STEP].fill_(max(steps))
    for key in method.states:
        stored = stored_moment(state, key)
        sources = {name: [(piece, held.moments[key]) for piece, held in parts] for name, parts in found.items()}
        alike = [part for piece, part in sources[pieces[0].name] if piece == pieces[0] and _same_form(stored, part)]
        if alike and all(any(p == piece and s is alike[0] for p, s in sources[piece.name]) for piece in pieces):
            _copy(stored, alike[0])
            continue
        value = torch.zeros(param.numel(), dtype=torch.float64 if param.dtype == torch.float64 else torch.float32)
        present = [piece for piece in pieces if sources[piece.name]]
        _fill(value, present, sources, "moments", compression.elements)
        compression.write_(stored, value.to(param.device), seed=None)


def _fill(
    target: Tensor,
    pieces: Sequence[Piece],
    sources: dict[str, list[tuple[Piece, Any]]],
    what: str,
    read: Callable[[Any, int, int], Tensor] = lambda flat, start, stop: flat[start:stop],
) -> None:
    """Copy the elements of `pieces` to their offsets in a 1-D tensor, from wherever they were."""
    for piece in pieces:
        copied = 0
        for other, flat in sources.get(piece.name, []):
            common = overlap(range(piece.start, piece.stop), range(other.start, other.stop))
            if len(common):
                values = read(flat, *_bounds(common, other))
                start, stop = _bounds(common, piece)
                target[start:stop].copy_(values)
                copied += len(common)
        _require_all(copied >= piece.stop - piece.start, what, piece.name)


def _bounds(common: range, piece: Piece) -> tuple[int, int]:
    return piece.offset + common.start - piece.start, piece.offset + common.stop - piece.start


def _within(common: range, held: range) -> slice:
    return slice(common.start - held.start, common.stop - held.start)


def _same_form(stored: compression.Stored, other: compression.Stored) -> bool:
    return stored.keys() == other.keys() and all(
        value.numel() == other[key].numel() and value.dtype == other[key].dtype for key, value in stored.items()
    )


def _copy(stored: compression.Stored, other: compression.Stored) -> None:
    for key, value in stored.items():
        value.view(-1).copy_(other[key].reshape(-1))


def _require_all(complete: bool, what: str, name: str) -> None:
    if not complete:
        raise ValueError(
            f"FiraAdam: the checkpoint lacks a part of the {what} of {name}; a file of it is missing or from another "
            "save, so load an older tag."
        )
