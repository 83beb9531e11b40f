"""When a keeper can answer those who borrow entries of R, and how large its answer is: a pure plan.

The update of a borrowed entry needs C and phi (line 15 of Algorithm 1), which go by the limiter's divisor, and that by
sums over all ranks. To wait for the sums and then send costs two round trips. So an answer has one of three forms:

`early`     C and phi, sent while the sums travel. Either nothing in them goes by the sums, or the matrix has one keeper
            (the left side at stages 1 and 2), whose own numbers are the sums.
`in_parts`  N, R and phi, sent while the sums travel; the borrower makes C of them. On the right a rank borrows one row
            of R at most, so the double size is nothing beside a round trip. On the left at stage 3 all entries are
            borrowed, and the double size is half as much again of all that crosses ranks: there in a short turn alone,
            or where C is empty, and phi all that is sent.
`late`      C and phi, sent behind the sums: on the left at stage 3 in other turns, whose bytes take longer than a round
            trip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from ds_fira.core.settings import GroupSettings
from ds_fira.sharding.row_blocks import Transfer
from ds_fira.sharding.split_matrix import SUMS_NUMEL, SplitMatrix

AnswerForm = Literal["early", "in_parts", "late"]
# Elements of float32 that phi takes unrounded: it is float64 until the divisor is known.
PHI_NUMEL = 2
# Elements of R and of borrowed bases up to which a turn is short: 4 MiB in float32.
SHORT_TURN_NUMEL = 2**20


def is_short(turn: Iterable[SplitMatrix]) -> bool:
    """Whether a turn of these matrices waits for round trips more than for bytes."""
    return sum(matrix.step_numel() for matrix in turn) <= SHORT_TURN_NUMEL


def answer_form(matrix: SplitMatrix, settings: GroupSettings, *, short: bool = False) -> AnswerForm:
    """The form of a matrix's answers; the same on every rank.

    Args:
        matrix: a split matrix.
        settings: of the param group.
        short: whether its turn is.
    """
    if not needs_sums(settings):
        return "early"
    if matrix.side == "right" or (matrix.evenly_sharded and (short or not settings.update_rank(matrix.rank))):
        return "in_parts"
    return "late" if matrix.evenly_sharded else "early"


def forms_of(
    turn: Sequence[int], matrices: Mapping[int, SplitMatrix], settings: GroupSettings
) -> dict[int, AnswerForm]:
    """The forms of the answers of a turn.

    Args:
        turn: positions of its matrices.
        matrices: by position.
        settings: of the param group.
    """
    short = is_short(matrices[position] for position in turn)
    return {position: answer_form(matrices[position], settings, short=short) for position in turn}


def needs_sums(settings: GroupSettings) -> bool:
    """Whether C and phi of an entry go by sums over all entries."""
    return settings.has_limiter or settings.has_one_factor


def numel_in_parts(rank: int, transfer: Transfer, itemsize: int) -> int:
    """Elements of an answer in parts: N, R and phi, which is float64 in elements of `itemsize` bytes.

    Args:
        rank: of C; 0 where N and R are of no use.
        transfer: that it goes over.
        itemsize: of an element.
    """
    return (2 * rank + 8 // itemsize) * len(transfer.entries)


def low_rank_elements(
    matrix: SplitMatrix, dp_rank: int, settings: GroupSettings, *, short: bool = False, keeps_rows: bool = False
) -> int:
    """Float32 elements that a rank, sharer or not, sends in one low-rank step without a refresh.

    Args:
        matrix: a split matrix.
        dp_rank: the rank.
        settings: of the param group; they decide the form of answers.
        short: whether its turn is.
        keeps_rows: whether the rows of P that ranks borrow are there from the step before.
    """
    if dp_rank not in matrix.sharers:
        return SUMS_NUMEL
    r, back = matrix.rank, settings.update_rank(matrix.rank)
    in_parts = answer_form(matrix, settings, short=short) == "in_parts"
    transfers = list(matrix.transfers(dp_rank))
    asked = sum(len(transfer.entries) for transfer in transfers if transfer.borrower == dp_rank)
    answered = sum(len(transfer.entries) for transfer in transfers if transfer.keeper == dp_rank)
    rows = 0 if keeps_rows else basis_rows_lent(matrix, dp_rank)
    return asked * (r + 1) + answered * (2 * back + PHI_NUMEL if in_parts else back + 1) + rows * r + SUMS_NUMEL


def basis_rows_lent(matrix: SplitMatrix, dp_rank: int) -> int:
    """Rows of P that a rank sends to those which borrow them."""
    return sum(len(t.entries) for t in matrix.basis_transfers(dp_rank) if t.keeper == dp_rank)
