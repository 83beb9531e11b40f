"""Copy the saved states of a run into the states of an optimizer that may hold other parts of the matrices.

`ds_fira.checkpoint.named_state` reads them. Whole matrices, parts of split ones and flat states are all copied by the
ranges they have in common; a range that no saved part covers is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from ds_fira.checkpoint.covering import Moves, Sources, covering, fill
from ds_fira.checkpoint.named_state import SavedMoments, SavedState, TensorSlices
from ds_fira.checkpoint.slices import StateSlice
from ds_fira.core import quantization
from ds_fira.core.algorithms import FIRA_ADAM, Algorithm
from ds_fira.core.state import (
    STEP,
    MatrixState,
    allocate_unprojected_moments,
    compute_dtype,
    state_views,
    stored_moment,
)
from ds_fira.sharding.geometry import ParamSlice


def restore(
    saved: SavedState,
    slices: Iterable[tuple[Tensor, TensorSlices]],
    state_of: Callable[[Tensor], dict[str, Tensor]],
    *,
    weights: bool,
    algorithm: Algorithm = FIRA_ADAM,
) -> None:
    """Copy saved states into those of stepped tensors; what was saved without a state is left without one.

    Args:
        saved: read completely; its structure has been checked (`refuse_changed_structure`).
        slices: the stepped tensors, and what each holds.
        state_of: gives the state of a tensor, allocated.
        weights: whether the weights of the tensors are copied too.
        algorithm: of the optimizer now, and of the one that saved.

    Raises:
        ValueError: a part of the saved state is missing, or the rule kept others.
    """
    refuse_other_states(saved, algorithm)
    known_names = {name for group in saved.groups for name in group.members}
    for param, held in slices:
        strangers = [part.param for part in held.params if part.param not in known_names]
        if strangers:
            raise ValueError(
                f"the checkpoint knows nothing of {strangers[0]!r}; train the same parameters under the names that "
                "they had, or in the order that they had where they have no names."
            )
        if weights:
            fill(param.detach().view(-1), held.params, saved.weights, "weights", saved.recuts)
        if held.matrices:
            known = [part for part in held.matrices if saved.knows(part)]
            state, dtype = state_of(param) if known else {}, compute_dtype(param.dtype)
            for part in known:
                parts = saved.matrices.get(part.name, ())
                if not parts or any(views.unprojected for _, views in parts):
                    allocate_unprojected_moments(state, part.mark, part.kept_shape, dtype, algorithm.states)
                target = state_views(state, part.side, part.mark, part.index, algorithm=algorithm, dtype=dtype)
                if parts:
                    restore_matrix(part, target, parts, saved.moves)
                else:
                    _restore_unprojected(part, target, saved)
        elif any(saved.moments_of(part.name) for part in held.params):
            state = state_of(param)
            if state:  # none where other ranks have the states of matrices that lie in it
                _restore_moments(param, state, held.params, saved, algorithm)


def restore_weights(saved: SavedState, slices: Iterable[tuple[Tensor, Sequence[ParamSlice]]]) -> None:
    """Copy saved weights into stepped tensors, each with what it holds.

    Raises:
        ValueError: a part of them is missing.
    """
    for param, held in slices:
        fill(param.detach().view(-1), held, saved.weights, "weights", saved.recuts)


def refuse_other_states(saved: SavedState, algorithm: Algorithm) -> None:
    """Stop if a rule keeps other states than when it was saved.

    Raises:
        ValueError: one sentence with both.
    """
    before, now = list(saved.algorithm.states), list(algorithm.states)
    made_by = next((group.made_by for group in saved.groups), None)
    if before != now and made_by is not None:
        raise ValueError(
            f"the checkpoint was made by {made_by}, which keeps {before}, and {algorithm.name} keeps the states {now}; "
            "load with load_optimizer_states=False to start anew from its weights."
        )
    if before != now:
        raise ValueError(
            f"the rule keeps the states {now}, and the checkpoint holds {before}; resume with the rule that saved it."
        )


def restore_matrix(
    held: StateSlice,
    target: MatrixState,
    parts: list[tuple[StateSlice, MatrixState]],
    moved: Mapping[tuple[str, int], Moves] = MappingProxyType({}),
) -> None:
    """Copy into one rank's state of a matrix, whole or a part, from parts that cover it.

    Args:
        held: which part.
        target: its state; changed.
        parts: of the same matrix.
        moved: of `SavedState.moves`.

    Raises:
        ValueError: something of it is in none of them.
    """
    first = parts[0][1]
    target.step.copy_(first.step)
    target.refresh_step.copy_(first.refresh_step)
    if target.residual_norm is not None:
        target.residual_norm.copy_(first.residual_norm)
    # The basis has the matrix's rows or columns, and the moments have the others.
    along_basis, along_moments = (moved.get((held.param, axis)) for axis in (1 - held.axis, held.axis))
    if target.residual_avg_sq is not None:
        _restore_averages(held, target.residual_avg_sq, parts, along_moments)
    bases = [(other.basis, part) for other, part in parts]
    for here, there, state in covering(held.basis, bases, "basis", held.name, along_basis):
        target.basis[here].copy_(state.basis[there])
    for name, value in target.unprojected.items():
        whole = [(other.kept, state.unprojected[name]) for other, state in parts if len(other.kept)]
        for here, there, part in covering(held.kept, whole, "moments", held.name, along_moments):
            value.transpose(0, held.axis)[here].copy_(part.transpose(0, held.axis)[there])
    for name, stored in target.moments.items():
        if stored:
            saved = [(other.kept, state.moments[name]) for other, state in parts if len(other.kept)]
            found = [(kept, moment) for kept, moment in saved if moment]
            _restore_moment(held, stored, found, target.dtype, along_moments)


def _restore_unprojected(held: StateSlice, target: MatrixState, saved: SavedState) -> None:
    """Keep the moments that another optimizer left of a whole parameter, as far as this rank will project them."""
    parts = saved.moments_of(held.param)
    target.step.copy_(max(int(moments.step) for _, moments in parts))
    (m, n), rows, cut = held.shape, range(held.shape[0]), held.axis == 1 and len(held.kept) < held.shape[1]
    if held.axis == 0:
        rows = held.kept
    begin = held.element * m * n
    wanted = ParamSlice(held.param, 0, begin + rows.start * n, begin + rows.stop * n)
    for name, value in target.unprojected.items():
        whole = value.new_empty(len(rows), n) if cut else value
        if value.numel():
            sources = _by_label(parts, name)
            fill(whole.view(-1), (wanted,), sources, "moments", saved.recuts, quantization.elements)
        if cut:
            value.copy_(whole[:, held.kept.start : held.kept.stop])


def _restore_averages(
    held: StateSlice, averages: Tensor, parts: list[tuple[StateSlice, MatrixState]], moved: Moves | None
) -> None:
    """Copy p, one number or that of the entries kept; saved in another form or not at all, it starts anew."""
    saved = [(other.kept, state.residual_avg_sq) for other, state in parts if state.residual_avg_sq is not None]
    if not saved:
        return
    if averages.numel() == len(held.kept) and all(part.numel() == len(kept) for kept, part in saved):
        for here, there, part in covering(held.kept, saved, "averages", held.name, moved):
            averages[here].copy_(part[there])
    elif averages.numel() == 1 and all(part.numel() == 1 for _, part in saved):
        averages.copy_(saved[0][1])


def _restore_moment(
    held: StateSlice,
    stored: quantization.Stored,
    parts: list[tuple[range, quantization.Stored]],
    dtype: torch.dtype,
    moved: Moves | None,
) -> None:
    for kept, part in parts:
        if moved is None and kept == held.kept and _same_form(stored, part):
            _copy(stored, part)
            return
    values = stored[quantization.VALUES]
    value = torch.zeros(values.shape, dtype=dtype, device=values.device)
    for here, there, part in covering(held.kept, parts, "moments", held.name, moved):
        # Along the other dimension every part is whole.
        value.transpose(0, held.axis)[here].copy_(quantization.read(part, dtype).transpose(0, held.axis)[there])
    quantization.write_(stored, value, seed=None)


def _restore_moments(
    param: Tensor, state: dict[str, Tensor], params: Sequence[ParamSlice], saved: SavedState, algorithm: Algorithm
) -> None:
    """Fill the state of one tensor without a projection; its step count is the largest of its parameters'."""
    found = {held.name: saved.moments_of(held.name) for held in params}
    steps = [int(moments.step) for parts in found.values() for _, moments in parts]
    state[STEP].fill_(max(steps))
    for key in algorithm.states:
        stored = stored_moment(state, key)
        sources = _by_label((part for parts in found.values() for part in parts), key)
        same = {name: sources.get(name, []) if saved.keeps(name) else [] for name in found}
        alike = [part for other, part in same[params[0].name] if other == params[0] and _same_form(stored, part)]
        if alike and all(any(o == held and s is alike[0] for o, s in same[held.name]) for held in params):
            _copy(stored, alike[0])
            continue
        value = torch.zeros(param.numel(), dtype=torch.float64 if param.dtype == torch.float64 else torch.float32)
        present = [held for held in params if found[held.name]]
        fill(value, present, sources, "moments", saved.recuts, quantization.elements)
        quantization.write_(stored, value.to(param.device), seed=None)


def _by_label(parts: Iterable[tuple[ParamSlice, SavedMoments]], name: str) -> Sources[quantization.Stored]:
    """One of the moments, by the names of parameters and slices."""
    found: Sources[quantization.Stored] = {}
    for held, moments in parts:
        found.setdefault(held.name, []).append((held, moments.moments[name]))
    return found


def _same_form(stored: quantization.Stored, other: quantization.Stored) -> bool:
    return stored.keys() == other.keys() and all(
        value.numel() == other[key].numel() and value.dtype == other[key].dtype for key, value in stored.items()
    )


def _copy(stored: quantization.Stored, other: quantization.Stored) -> None:
    for key, value in stored.items():
        value.view(-1).copy_(other[key].reshape(-1))
