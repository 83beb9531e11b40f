"""The state of a run by the names of parameters and matrices: read from any number of ranks, restored on any other.

A saved optimizer describes what its tensors hold (`describe`, in its state dict under "fira"). `SavedState` puts the
state dicts of all ranks together under names, without copying. `ds_fira.checkpoint.restore` copies from it into the
states of another optimizer, which may hold other parts of the matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from torch import Tensor

from ds_fira.checkpoint.cuts import Cut, Recut, moves
from ds_fira.checkpoint.reconcile import Members, SavedGroup
from ds_fira.checkpoint.slices import StateSlice
from ds_fira.core import quantization
from ds_fira.core.algorithms import ALGORITHMS, FIRA_ADAM, Algorithm
from ds_fira.core.state import BASIS, REFRESH_STEP, RESIDUAL_NORM, STEP, MatrixState, state_views, stored_moment
from ds_fira.sharding.geometry import ParamSlice

# Where the description is in a state dict, and the version of its form.
KEY = "fira"
FORMAT = 1


class Description(TypedDict, total=False):
    """What a state dict says of its tensors, see `describe`; the names are keys in saved files."""

    method: dict[str, object]
    format: int
    layout: str
    settings: list[dict[str, object]]
    members: list[list[list[object]]]
    places: list[dict[str, list[list[object]]]]
    states: list[list[str]]
    user_groups: list[int]
    scaling_factors: dict[str, object]


class StateDict(TypedDict, total=False):
    """The state dict of an optimizer of this package."""

    state: dict[int, dict[str, Tensor]]
    param_groups: list[dict[str, object]]
    fira: Description


@dataclass(frozen=True, slots=True)
class TensorSlices:
    """What one stepped tensor holds.

    Attributes:
        params: which elements of which parameters.
        matrices: the projected matrices whose states, or parts of states, are with it; empty where it is not projected.
    """

    params: tuple[ParamSlice, ...]
    matrices: tuple[StateSlice, ...]

    def to_plain(self) -> dict[str, list[list[object]]]:
        """As numbers, strings, lists and dicts."""
        params = [[held.name, held.offset, held.start, held.stop] for held in self.params]
        return {"pieces": params, "matrices": [held.to_plain() for held in self.matrices]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, list[list[object]]]) -> TensorSlices:
        """The reverse of `to_plain`."""
        params = tuple(ParamSlice(*held) for held in plain["pieces"])
        return cls(params, tuple(StateSlice.from_plain(held) for held in plain["matrices"]))


def describe(
    layout: str,
    given: Sequence[Mapping[str, object]],
    members: Sequence[Members],
    slices: Sequence[TensorSlices],
    states: Sequence[Mapping[str, object]],
    algorithm: Algorithm = FIRA_ADAM,
) -> Description:
    """Describe the tensors of a state dict, for the entry that is saved beside them.

    Args:
        layout: a digest of what lies where on all ranks; two runs with the same one can exchange state dicts as they
            are.
        given: of every param group, the settings it was made with.
        members: of every param group, the names and shapes of its parameters, over all ranks.
        slices: what every tensor of this rank holds, in the order of the state dict.
        states: likewise its state; the description names what is in it, so that a loss is seen.
        algorithm: the optimizer; a description without one is FiraAdam's.
    """
    return {
        **({} if algorithm is FIRA_ADAM else {"method": algorithm.to_plain()}),
        "format": FORMAT,
        "layout": layout,
        "settings": [dict(settings) for settings in given],
        "members": [[[name, list(shape)] for name, shape in group] for group in members],
        "places": [held.to_plain() for held in slices],
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


@dataclass
class SavedState:
    """The states that the ranks of a run saved, by the names of matrices and parameters.

    Attributes:
        groups: its param groups.
        matrices: by matrix, which parts of its state were saved and those parts.
        moments: by parameter without a projection, likewise.
        weights: by parameter, likewise, the tensors that were stepped.
        algorithm: the optimizer.
        recuts: by the label of a slice that this run steps, how it is read of what was saved; others are as they were.
        moves: by matrix and axis, where its rows or columns stand in the order of this run, if not where they did.
    """

    groups: list[SavedGroup] = field(default_factory=list)
    matrices: dict[str, list[tuple[StateSlice, MatrixState]]] = field(default_factory=lambda: defaultdict(list))
    moments: dict[str, list[tuple[ParamSlice, SavedMoments]]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[str, list[tuple[ParamSlice, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    algorithm: Algorithm = FIRA_ADAM
    recuts: dict[str, Recut] = field(default_factory=dict)
    moves: dict[tuple[str, int], list[tuple[range, int]]] = field(default_factory=dict)

    def recut(self, before: Mapping[str, Sequence[Cut]], now: Mapping[str, Sequence[Cut]], number: int) -> None:
        """Let a run read that has other slices of parameters, or the same of what is saved whole.

        Args:
            before: by parameter the slices of the run that saved, in their order; those that it did not cut left out.
            now: likewise of this run.
            number: of the slices that this rank has.
        """
        for name in before.keys() | now.keys():
            shape = next(iter(before.get(name) or now[name])).shape
            old, new = (tuple(cuts.get(name) or [Cut.whole(name, shape)]) for cuts in (before, now))
            own = new[number % len(new)]
            self.recuts[own.label] = Recut(own, old)
            for axis in (0, 1):
                moved = moves(old, new, axis)
                if any(there.start != here for there, here in moved):
                    self.moves[name, axis] = moved
            if own.label != name:  # by which moments of a whole matrix are asked for
                order = tuple(run for cut in new for run in cut.runs)
                self.recuts[name] = Recut(Cut(name, shape, own.axis, order), old)

    def moments_of(self, label: str) -> list[tuple[ParamSlice, SavedMoments]]:
        """The moments of a parameter without a projection, or of those slices of which one of this run is read."""
        recut = self.recuts.get(label)
        if recut is None:
            return self.moments.get(label, [])
        return [part for cut in recut.sources(self.moments) for part in self.moments.get(cut.label, [])]

    def keeps(self, label: str) -> bool:
        """Whether the moments of a parameter or slice are read as they were saved, all from itself."""
        recut = self.recuts.get(label)
        return recut is None or recut.sources(self.moments) == (recut.own,)

    def add(self, state_dict: StateDict, weights: Sequence[Tensor] | None = None) -> None:
        """Add what one rank has saved, without copying a tensor.

        Args:
            state_dict: of its optimizer.
            weights: its stepped tensors, in the order of the state dict; trailing padding may be missing.

        Raises:
            ValueError: the state dict has no description, or one of a later version.
        """
        plain, groups = described(state_dict), state_dict["param_groups"]
        self.algorithm = Algorithm.from_plain(plain.get("method"))
        # All ranks say the same of the groups, but for the stages of a pipeline, which have other ones.
        known = {name for group in self.groups for name in group.members}
        if not self.groups or not known.issuperset(name for listed in plain["members"] for name, _ in listed):
            upgraded = ALGORITHMS.get(self.algorithm.name, self.algorithm).upgraded
            # Before 0.2.0 every param group was one of its own for a scheduler.
            origins = plain.get("user_groups", range(len(groups)))
            for group, members, given, origin in zip(groups, plain["members"], plain["settings"], origins, strict=True):
                values = {key: value for key, value in group.items() if key not in ("params", "param_names")}
                shapes = {name: tuple(shape) for name, shape in members}
                self.groups.append(SavedGroup(shapes, upgraded(given), upgraded(values), origin))
        numbers = [number for group in groups for number in group["params"]]
        # Version 0.1.0 did not say what states there were.
        kept = plain.get("states") or [()] * len(numbers)
        for position, (number, listed, keys) in enumerate(zip(numbers, plain["places"], kept, strict=True)):
            held = TensorSlices.from_plain(listed)
            state = state_dict["state"].get(number, {})
            self._require_state(set(keys) - set(state), held)
            if weights is not None:
                for part in held.params:
                    self.weights[part.name].append((part, weights[position].reshape(-1)))
            self._add_state(state, held)

    def knows(self, held: StateSlice) -> bool:
        """Whether there is a state of a matrix, or moments of the whole parameter that it is or lies in."""
        return bool(self.matrices.get(held.name) or self.moments_of(held.param))

    def _add_state(self, state: dict[str, Tensor], held: TensorSlices) -> None:
        algorithm = self.algorithm
        if not state:
            return  # of a tensor that never had a gradient
        present = {key for key, value in state.items() if isinstance(value, Tensor)}
        own = (STEP, REFRESH_STEP, BASIS, *((RESIDUAL_NORM,) if algorithm.limited else ()))
        for part in held.matrices:
            self._require_state({key + part.mark for key in own} - present, held)
            views = state_views(state, part.side, part.mark, part.index, algorithm=algorithm)
            self.matrices[part.name].append((part, views))
        if not held.matrices:
            self._require_state({STEP, *algorithm.states} - present, held)
            moments = SavedMoments(state[STEP], {name: stored_moment(state, name) for name in algorithm.states})
            for part in held.params:
                self.moments[part.name].append((part, moments))

    def _require_state(self, lost: set[str], held: TensorSlices) -> None:
        if lost:
            names = ", ".join(sorted({part.name for part in held.params})[:3])
            raise ValueError(
                f"the saved state of {names} has lost {', '.join(sorted(lost)[:3])}; load another checkpoint."
            )


def described(state_dict: StateDict) -> Description:
    """The description in a state dict.

    Raises:
        ValueError: there is none, or it is of a later version.
    """
    plain = state_dict.get(KEY)
    if plain is None:
        raise ValueError(
            "the state dict does not say what its tensors hold, as those of earlier versions do not; resume it with "
            "the same number of ranks and the same settings, and save it again."
        )
    if plain["format"] > FORMAT:
        raise ValueError(
            f"the state dict is of format {plain['format']}, and this version reads up to {FORMAT}; update ds_fira."
        )
    return plain
