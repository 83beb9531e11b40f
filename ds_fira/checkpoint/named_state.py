"""The state of a run by the names of parameters and matrices: read from any number of ranks, restored on any other.

A saved optimizer describes what its tensors hold (`describe`, in its state dict under "fira"). `SavedState` puts the
state dicts of all ranks together under names, without copying; `ds_fira.checkpoint.restore` fills an optimizer from it,
wherever that keeps what.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds_fira.checkpoint.reconcile import SavedGroup
from ds_fira.checkpoint.slices import Piece, StateSlice
from ds_fira.core import quantization
from ds_fira.core.algorithms import FIRA_ADAM, Algorithm
from ds_fira.core.state import (
    BASIS,
    EXP_AVG,
    REFRESH_STEP,
    RESIDUAL_NORM,
    STEP,
    MatrixState,
    state_views,
    stored_moment,
)

# Where the description is in a state dict, and the version of its form.
KEY = "fira"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class TensorSlices:
    """What one stepped tensor holds.

    Attributes:
        pieces: of which parameters it holds what.
        matrices: the projected matrices whose states, or parts of states, are with it; empty under AdamW.
    """

    pieces: tuple[Piece, ...]
    matrices: tuple[StateSlice, ...]

    def to_plain(self) -> dict[str, Any]:
        """As numbers, strings, lists and dicts."""
        pieces = [[piece.name, piece.offset, piece.start, piece.stop] for piece in self.pieces]
        return {"pieces": pieces, "matrices": [place.to_plain() for place in self.matrices]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> TensorSlices:
        """The reverse of `to_plain`."""
        pieces = tuple(Piece(*piece) for piece in plain["pieces"])
        return cls(pieces, tuple(StateSlice.from_plain(place) for place in plain["matrices"]))


def describe(
    layout: str,
    given: Sequence[dict[str, Any]],
    members: Sequence[Sequence[tuple[str, tuple[int, ...]]]],
    places: Sequence[TensorSlices],
    states: Sequence[Mapping[str, Any]],
    algorithm: Algorithm = FIRA_ADAM,
) -> dict[str, Any]:
    """What goes into a state dict beside the tensors.

    Args:
        layout: a digest of what lies where on all ranks; two runs with the same one can exchange state dicts as they
            are.
        given: of every param group, the settings it was made with.
        members: of every param group, the names and shapes of its parameters, over all ranks.
        places: of every tensor of this rank, in the order of the state dict.
        states: likewise its state; the description names what is in it, so that a loss is seen.
        algorithm: the optimizer; a description without one is FiraAdam's.
    """
    return {
        **({} if algorithm is FIRA_ADAM else {"method": algorithm.to_plain()}),
        "format": FORMAT,
        "layout": layout,
        "settings": [dict(settings) for settings in given],
        "members": [[[name, list(shape)] for name, shape in group] for group in members],
        "places": [place.to_plain() for place in places],
        "states": [sorted(state) for state in states],
    }


@dataclass(frozen=True, slots=True)
class SavedMoments:
    """The state of one stepped tensor without a projection; all elements in the order of the tensor.

    Attributes:
        step: steps made.
        moments: by the names of `Algorithm.states`.
    """

    step: Tensor
    moments: dict[str, quantization.Stored]

    @property
    def exp_avg(self) -> quantization.Stored:
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
        algorithm: the optimizer.
    """

    groups: list[SavedGroup] = field(default_factory=list)
    matrices: dict[str, list[tuple[StateSlice, MatrixState]]] = field(default_factory=lambda: defaultdict(list))
    moments: dict[str, list[tuple[Piece, SavedMoments]]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[str, list[tuple[Piece, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    algorithm: Algorithm = FIRA_ADAM

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
        self.algorithm = Algorithm.from_plain(plain.get("method"))
        if not self.groups:
            for group, members, given in zip(groups, plain["members"], plain["settings"], strict=True):
                values = {key: value for key, value in group.items() if key not in ("params", "param_names")}
                shapes = {name: tuple(shape) for name, shape in members}
                self.groups.append(SavedGroup(shapes, given, values))
        ids = [number for group in groups for number in group["params"]]
        # Version 0.1.0 did not say what states there were.
        kept = plain.get("states") or [()] * len(ids)
        for position, (number, listed, keys) in enumerate(zip(ids, plain["places"], kept, strict=True)):
            places = TensorSlices.from_plain(listed)
            state = state_dict["state"].get(number, {})
            self._require_state(set(keys) - set(state), places)
            if weights is not None:
                for piece in places.pieces:
                    self.weights[piece.name].append((piece, weights[position].reshape(-1)))
            self._add_state(state, places)

    def _add_state(self, state: dict[str, Tensor], places: TensorSlices) -> None:
        algorithm = self.algorithm
        if not state:
            return  # of a tensor that never had a gradient
        present = {key for key, value in state.items() if isinstance(value, Tensor)}
        for place in places.matrices:
            own = (STEP, REFRESH_STEP, BASIS, *((RESIDUAL_NORM,) if algorithm.limited else ()))
            self._require_state({key + place.mark for key in own} - present, places)
            views = state_views(state, place.side, place.mark, place.index, algorithm=algorithm)
            self.matrices[place.name].append((place, views))
        if not places.matrices:
            self._require_state({STEP, *algorithm.states} - present, places)
            moments = SavedMoments(state[STEP], {name: stored_moment(state, name) for name in algorithm.states})
            for piece in places.pieces:
                self.moments[piece.name].append((piece, moments))

    def _require_state(self, lost: set[str], places: TensorSlices) -> None:
        if lost:
            names = ", ".join(sorted({piece.name for piece in places.pieces})[:3])
            raise ValueError(
                f"{self.algorithm.name}: the saved state of {names} has lost {', '.join(sorted(lost)[:3])}; load "
                "another checkpoint."
            )


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
