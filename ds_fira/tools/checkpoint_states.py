"""What states a checkpoint holds, and whether every number in it is finite; reads all of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_fira.checkpoint.named_state import SavedState
from ds_fira.core import quantization
from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles, normalized

NAMED = 5  # of those that are not finite


def states(files: CheckpointFiles) -> dict[str, Any]:
    """The states of one checkpoint: matrices by shape and step, and whether all numbers are finite.

    Args:
        files: of the checkpoint, of all ranks.

    Returns:
        `matrices`, how many there are of a kind; `under_adamw`, parameters with states but no projection; `checked`,
        the kinds of tensors that were read; `finite`, whether all their elements are; `not_finite`, of the others kind
        and name, at most the first few of a kind.

    Raises:
        ValueError: a file cannot be read.
    """
    saved = files.read()
    kinds: Counter[str] = Counter()
    for parts in saved.matrices.values():
        place, state = parts[0]
        m, n = place.shape
        steps = f"step {int(state.step)}, basis of step {int(state.refresh_step)}"
        kinds[f"{m} x {n}, {place.side}, rank {place.rank}, {steps}"] += 1
    checked: dict[str, None] = {}
    faulty: dict[str, dict[str, None]] = defaultdict(dict)
    for kind, name, tensor in _tensors(files, saved):
        checked[kind] = None
        if not bool(torch.isfinite(tensor).all()):
            faulty[kind][name] = None
    return {
        "matrices": dict(kinds),
        "under_adamw": len(saved.moments),
        "finite": not faulty,
        "checked": list(checked),
        "not_finite": [_named(kind, list(names)) for kind, names in faulty.items()],
    }


def _named(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{kind} of {', '.join(names[:NAMED])}{more}"


def _tensors(files: CheckpointFiles, saved: SavedState) -> Iterator[tuple[str, str, Tensor]]:
    """Everything with a floating point in it: its kind, its name, the elements; in a flat tensor those of a name."""
    for number in range(len(files.models)):
        for name, value in normalized(files.model(number)["module"]).items():
            if isinstance(value, Tensor) and _is_number(value):
                yield "the module's weights", name, value
    for name, pieces in saved.weights.items():
        for piece, flat in pieces:
            yield "master weights", name, flat[piece.offset :][: piece.stop - piece.start]
    for name, parts in saved.matrices.items():
        for _, part in parts:
            yield "bases", name, part.basis
            if part.residual_norm is not None:
                yield "limiters", name, part.residual_norm
            for stored in part.moments.values():
                yield from _stored(stored, "moments", name)
    scales: set[int] = set()
    for name, held in saved.moments.items():
        for piece, state in held:
            for stored in state.moments.values():
                values, scale = stored[quantization.VALUES].reshape(-1), stored.get(quantization.SCALE)
                if _is_number(values):
                    yield "moments", name, values[piece.offset :][: piece.stop - piece.start]
                if scale is not None and id(scale) not in scales:
                    scales.add(id(scale))
                    yield "scales of moments", name, scale


def _stored(stored: quantization.Stored, kind: str, name: str) -> Iterator[tuple[str, str, Tensor]]:
    for suffix, tensor in stored.items():
        if _is_number(tensor):
            yield kind if suffix == quantization.VALUES else f"scales of {kind}", name, tensor


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
