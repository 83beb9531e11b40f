"""Which parameters of a param group have low-rank states: one rule for optimizer, engine, checkpoints and estimates.

At full rank a projection saves nothing: the moments are as large as those of the matrix itself, and the basis comes on
top. So a matrix whose rank is at or above its smaller side is stepped unprojected where that takes fewer elements,
unless its group says `project_full_rank`, as the released code does.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ds_fira.core.algorithms import FIRA_ADAM, Algorithm, algorithm_of
from ds_fira.core.selection import shape_of
from ds_fira.core.settings import GroupSettings
from ds_fira.core.subspace import basis_shape, effective_rank, low_rank_shape, projection_side

Group = Mapping[str, object]
PROJECT_FULL_RANK = "project_full_rank"
# Bytes of an element of the basis and of a moment, by `state_dtype`; int8 has a scale of 4 bytes for 256 codes.
ELEMENT_BYTES = {"float32": (4.0, 4.0), "bfloat16": (2.0, 2.0), "int8": (2.0, 1.0 + 4.0 / 256.0)}
# Shapes that a warning lists.
MOST_SHAPES = 6


def is_projected(shape: Sequence[int], group: Group) -> bool:
    """Whether a parameter of a param group is projected, or stepped as one in a group without a rank.

    Args:
        shape: of the whole parameter; (m, n), or (experts, m, n).
        group: the param group; what it lacks has its default. Its residual does not count: a resumed run may have
            another, and the same states.
    """
    rank = group.get("rank")
    if rank is None or len(shape) not in (2, 3) or 0 in shape:
        return False
    if rank < min(shape[-2:]) or group.get(PROJECT_FULL_RANK, False):
        return True
    basis, moments, plain = _elements(shape, group)
    return basis + moments + algorithm_of(group).limited <= plain


def hangs_on_full_rank(shape: Sequence[int], group: Group) -> bool:
    """Whether `project_full_rank` decides if a parameter of a param group is projected."""
    return len({is_projected(shape, {**group, PROJECT_FULL_RANK: chosen}) for chosen in (False, True)}) == 2


def _elements(shape: Sequence[int], group: Group) -> tuple[int, int, int]:
    """Elements of the basis and of the low-rank moments of one matrix of a parameter, and of unprojected moments."""
    matrix, states = (shape[-2], shape[-1]), len(algorithm_of(group).states)
    side = projection_side(matrix, group.get("proj_type", "std"), group.get("formulation", "released"))
    basis = math.prod(basis_shape(matrix, group["rank"], side, algorithm_of(group).draws_basis))
    return basis, states * math.prod(low_rank_shape(matrix, group["rank"], side)), states * math.prod(matrix)


def averages_numel(shape: tuple[int, int], group: Group) -> int:
    """Numbers that a projected matrix of shape (m, n) keeps of the squares of a normalized residual."""
    settings = GroupSettings.of(group)
    return settings.averages_of(shape[settings.side_of(shape) == "left"])


def state_bytes(shape: Sequence[int], group: Group) -> tuple[int, int]:
    """Bytes of state of one matrix of a parameter of float32 or less, projected and not.

    Args:
        shape: as in `is_projected`.
        group: the param group, with a rank.
    """
    of_basis, of_moment = ELEMENT_BYTES[group.get("state_dtype", "float32")]
    basis, moments, plain = _elements(shape, group)
    numbers = algorithm_of(group).limited + averages_numel((shape[-2], shape[-1]), group)
    return round(basis * of_basis + moments * of_moment + 4 * numbers), round(plain * of_moment)


def warn_of_costly_ranks(groups: Iterable[Group]) -> None:
    """Say once which ranks save nothing: matrices that are stepped unprojected, or whose states are larger projected.

    Args:
        groups: the param groups of one optimizer.
    """
    switched_off: list[tuple[Sequence[int], Group]] = []
    costly: list[tuple[Sequence[int], Group]] = []
    for group in groups:
        for shape in map(shape_of, group["params"]):
            if hangs_on_full_rank(shape, group):
                if not group.get(PROJECT_FULL_RANK, False):
                    switched_off.append((shape, group))
            elif is_projected(shape, group):
                low_rank, plain = state_bytes(shape, group)
                # A rank at the smaller side that is kept is smaller in elements.
                if low_rank > plain and effective_rank((shape[-2], shape[-1]), group["rank"]) < min(shape[-2:]):
                    costly.append((shape, group))
    if switched_off:
        summary, low_rank, plain = _counted(switched_off)
        warnings.warn(
            f"{summary}, is at or above their smaller side, where low-rank states take {low_rank:,} bytes and "
            f"unprojected ones {plain:,}: they are stepped unprojected, with lr x alpha; give a smaller rank to "
            "project them, or project_full_rank = true to do so at this one.",
            stacklevel=3,
        )
    if costly:
        summary, low_rank, plain = _counted(costly)
        warnings.warn(
            f"{summary}, takes {low_rank:,} bytes of states where unprojected they take {plain:,}; give a smaller "
            "rank, or put them into a group with rank = None.",
            stacklevel=3,
        )


def _counted(found: Sequence[tuple[Sequence[int], Group]]) -> tuple[str, int, int]:
    """What a warning says of parameters with their groups: which they are; their bytes of state, projected and not."""
    counts: Counter[tuple[int, ...]] = Counter()
    low_rank = plain = 0
    for shape, group in found:
        count, sizes = math.prod(shape[:-2]), state_bytes(shape, group)
        counts[tuple(shape[-2:])] += count
        low_rank, plain = low_rank + count * sizes[0], plain + count * sizes[1]
    shapes = [f"{count} of {m} x {n}" for (m, n), count in counts.items()]
    more = f" and {len(shapes) - MOST_SHAPES} more shapes" if len(shapes) > MOST_SHAPES else ""
    ranks = " and ".join(dict.fromkeys(str(group["rank"]) for _, group in found))
    listed = ", ".join(shapes[:MOST_SHAPES]) + more
    name = algorithm_of(found[0][1]).name
    return f"{name}: rank = {ranks} of {sum(counts.values())} matrices ({listed})", low_rank, plain


def state_numel(
    shape: tuple[int, int],
    rank: int,
    proj_type: str = "std",
    formulation: str = "released",
    algorithm: Algorithm = FIRA_ADAM,
    *,
    drawn: bool = False,
) -> int:
    """Elements of optimizer state of one projected matrix, the paper's mr + 2nr + 1 (Table 1); no mr where P is drawn.

    Counts the basis, the moments and the limiter's norm, not the average of a normalized residual: n beside 2nr.
    """
    side = projection_side(shape, proj_type, formulation)
    rows, r = basis_shape(shape, rank, side, drawn or algorithm.draws_basis)
    a, b = low_rank_shape(shape, rank, side)
    return rows * r + len(algorithm.states) * a * b + algorithm.limited
