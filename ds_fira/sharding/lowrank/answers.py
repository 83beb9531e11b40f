"""Lines 13 and 15 of a split matrix: C and phi, made by the keeper, or by a borrower of the keeper's N and R.

See `ds_fira.sharding.lowrank.answer_form` for when which of the two is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fira.core.scalars import Scalar
from ds_fira.core.settings import GroupSettings
from ds_fira.core.step import StepStats, combine
from ds_fira.sharding.lowrank.shard_step import ShardStep
from ds_fira.sharding.row_blocks import Transfer, inside


def answer(part: ShardStep, divisor: Scalar | None, again: bool = False) -> tuple[Tensor, Tensor] | None:
    """C and phi of the entries that a rank keeps, None for none.

    Args:
        part: it has advanced.
        divisor: the limiter's, None without one.
        again: whether another divisor may follow; N is used up otherwise.
    """
    entries = part.entries
    if entries is None:
        return None
    direction = entries.direction.clone() if again else entries.direction
    phi, low_rank_update = combine(entries.phi, entries.low_rank, direction, divisor, part.context)
    return low_rank_update, torch.zeros_like(entries.squares[0]) if phi is None else phi


def answer_in_parts(part: ShardStep, transfer: Transfer) -> list[Tensor]:
    """What C and phi of some kept entries are made of: N, R, and phi before the divisor, bit for bit.

    Args:
        part: it has advanced, and keeps the entries.
        transfer: by which they are lent.
    """
    entries, along = part.entries, inside(transfer.entries, part.plan.kept)
    phi = entries.direction.new_zeros(len(transfer.entries), dtype=torch.float64)
    if entries.phi is not None:  # else it is one for all, which the borrower takes from the sums
        phi = entries.phi[along].contiguous()
    values = [part.along_entries(tensor, along) for tensor in (entries.direction, entries.low_rank)]
    needed = part.settings.update_rank(part.plan.matrix.rank) > 0
    return [*(values if needed else ()), phi.view(part.state.dtype)]


def unpack_parts(part: ShardStep, transfer: Transfer, arrived: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """N, R and phi, float64, as `answer_in_parts` sends them."""
    r, count = part.settings.update_rank(part.plan.matrix.rank), len(transfer.entries)
    direction, low_rank, phi = arrived.split([r * count, r * count, arrived.numel() - 2 * r * count])
    shape = (r, count) if part.state.side == "left" else (count, r)
    return direction.view(shape), low_rank.view(shape), phi.clone().view(torch.float64)


def factors_before_limit(part: ShardStep, phi: Tensor) -> Tensor:
    """Phi of borrowed entries before the divisor: as it came, or the one for all entries that the sums have given."""
    return phi if part.phi is None else part.phi.expand(len(phi))


def borrowed_answer(
    part: ShardStep, parts: tuple[Tensor, Tensor, Tensor], divisor: Scalar | None
) -> tuple[Tensor, Tensor]:
    """C and phi of borrowed entries, as their keeper makes them of the same numbers.

    Args:
        part: of the borrower; it has advanced.
        parts: as `unpack_parts` gives them; N is used up.
        divisor: the limiter's, None without one.
    """
    direction, low_rank, phi = parts
    return tuple(reversed(combine(factors_before_limit(part, phi), low_rank, direction, divisor, part.context)))


def step_stats(total: Tensor, low_rank_square: Tensor, residual_sq: Tensor, divisor: Scalar | None) -> StepStats:
    """The numbers of the step of a whole matrix whose gradient is finite, alike on all ranks that hold a part.

    Args:
        total: |G|^2, 0-dim.
        low_rank_square: |R|^2, likewise.
        residual_sq: |S|^2, likewise.
        divisor: the limiter's, None without one.
    """
    low_rank_sq = low_rank_square.unsqueeze(0)
    # The ranks that keep the entries record them.
    recorded = (low_rank_sq, low_rank_sq, 1.0)
    return StepStats(total, low_rank_sq, lambda: recorded, residual_sq, divisor, total < torch.inf)


def squares_of(sums: Tensor, totals: Tensor, settings: GroupSettings) -> Tensor:
    """|S|^2 as the form of the residual has it and |phi * G|^2: as summed, or with phi = 1 from the sums.

    With one scaling factor for a matrix its squares are found without it, so that ranks which hold no part of the
    matrix know too whether digits are lost.

    Args:
        sums: over all ranks, of what `ShardStep.advance` returns, (k, 3).
        totals: |G|^2 of the same matrices, (k,), finite or not.
        settings: of the param group.

    Returns:
        (k, 2), float64.
    """
    if not settings.has_one_factor:
        return sums[:, 1:]
    return torch.stack([settings.residual_form.residual_sq(totals, sums[:, 2], settings), totals], dim=1)
