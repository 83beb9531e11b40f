"""When a keeper can answer those who borrow entries of R, and how large its answer is: a pure plan.

The update of a borrowed entry needs C and phi (line 15 of Algorithm 1), which go by the limiter's divisor, and that by
sums over all ranks. To wait for the sums and then send costs two round trips. So an answer has one of three forms:

`early`     C and phi, sent while the sums travel. Either nothing in them goes by the sums, or the matrix has one keeper
            (the left side at stages 1 and 2), whose own numbers are the sums.
`in_parts`  N, R and phi, sent while the sums travel; the borrower makes C of them. On the right a rank borrows one row
            of R at most, so the double size is nothing beside a round trip.
`late`      C and phi, sent behind the sums: on the left at stage 3, where all entries are borrowed and the double size
            would be half as much again of all that crosses ranks.
"""

from __future__ import annotations

from typing import Literal

from ds_fira.core.settings import GroupSettings
from ds_fira.sharding.split_matrix import SUMS_NUMEL, SplitMatrix, Transfer

AnswerForm = Literal["early", "in_parts", "late"]
# Elements of float32 that phi takes unrounded: it is float64 until the divisor is known.
PHI_NUMEL = 2


def answer_form(matrix: SplitMatrix, settings: GroupSettings) -> AnswerForm:
    """The form of a matrix's answers; the same on every rank."""
    if not needs_sums(settings):
        return "early"
    if matrix.side == "right":
        return "in_parts"
    return "late" if matrix.evenly_sharded else "early"


def needs_sums(settings: GroupSettings) -> bool:
    """Whether C and phi of an entry go by sums over all entries."""
    return settings.has_limiter or settings.has_one_factor


def numel_in_parts(matrix: SplitMatrix, transfer: Transfer, itemsize: int) -> int:
    """Elements of an answer in parts: N, R and phi, which is float64 in elements of `itemsize` bytes."""
    return (2 * matrix.rank + 8 // itemsize) * len(transfer.entries)


def low_rank_elements(matrix: SplitMatrix, dp_rank: int, settings: GroupSettings) -> int:
    """Float32 elements that a rank, sharer or not, sends in one low-rank step without a refresh.

    Args:
        matrix: a split matrix.
        dp_rank: the rank.
        settings: of the param group; they decide the form of answers.
    """
    if dp_rank not in matrix.sharers:
        return SUMS_NUMEL
    r, in_parts = matrix.rank, answer_form(matrix, settings) == "in_parts"
    transfers = list(matrix.transfers(dp_rank))
    asked = sum(len(transfer.entries) for transfer in transfers if transfer.borrower == dp_rank)
    answered = sum(len(transfer.entries) for transfer in transfers if transfer.keeper == dp_rank)
    rows = sum(len(t.entries) for t in matrix.basis_transfers(dp_rank) if t.keeper == dp_rank)
    return asked * (r + 1) + answered * (2 * r + PHI_NUMEL if in_parts else r + 1) + rows * r + SUMS_NUMEL
