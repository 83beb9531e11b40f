"""The parts of a low-rank matrix without processes: they cover it, and make together the step of the whole."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import allocate_matrices, state_views
from ds_fira.core.step import MatrixTask, update
from ds_fira.core.subspace import basis_shape, low_rank_shape
from ds_fira.observe.metrics import StepMetrics
from ds_fira.sharding.geometry import MatrixShard, split
from ds_fira.sharding.lowrank.answer_form import answer_form, low_rank_elements
from ds_fira.sharding.lowrank.answers import (
    answer,
    answer_in_parts,
    borrowed_answer,
    squares_of,
    step_stats,
    unpack_parts,
)
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.lowrank.shard_step import ShardStep
from ds_fira.sharding.projection import state_numel
from ds_fira.sharding.row_blocks import inside, row_blocks, touched_columns
from ds_fira.sharding.split_matrix import SplitMatrix, plan_split

UNLIMITED = GroupSettings(rank=2, limiter="none")


def planned(
    shape: tuple[int, int], begin: int, size: int, changed: dict[str, Any], evenly: bool = False
) -> SplitMatrix | None:
    """A matrix at an offset of a buffer in partitions of a size, None where it is not split."""
    partitions = -(-(begin + math.prod(shape)) // size)
    fragments = split(MatrixShard("w", shape, begin, 0, math.prod(shape)), size, partitions)
    if len(fragments) == 1:
        return None
    owner = max(fragments, key=lambda holder: (holder * 7) % 5)
    return plan_split(fragments, owner, partitions, GroupSettings(rank=2, **changed), evenly)


sizes = (
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 20),
    st.integers(1, 40),
    st.sampled_from(["left", "right"]),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(*sizes, st.booleans())
def test_blocks_and_transfers_cover_the_matrix(m: int, n: int, begin: int, size: int, side: str, evenly: bool) -> None:
    """Blocks tile the fragments and alias them; every entry of R is kept once, and lent by its keeper; P likewise."""
    matrix = planned((m, n), begin, size, {"proj_type": side}, evenly)
    if matrix is None:
        return
    numbers = torch.arange(m * n).view(m, n)
    covered = torch.zeros(m, n)
    entries = range(n if side == "left" else m)
    keepers = torch.full((len(entries),), -1)
    for rank, fragment in matrix.fragments:
        flat = numbers.view(-1)[fragment.start : fragment.stop]
        blocks = row_blocks(fragment)
        assert 1 <= len(blocks) <= 3
        assert sum(len(block.rows) * len(block.columns) for block in blocks) == fragment.numel
        for block in blocks:
            where = inside(block.rows, range(m)), inside(block.columns, range(n))
            assert torch.equal(block.view(flat), numbers[where])
            assert block.view(flat).data_ptr() == numbers[where].data_ptr()
            covered[where] += 1
        columns = [column for block in blocks for column in block.columns]
        assert touched_columns(fragment) == range(min(columns), max(columns) + 1)
        plan = LocalShardPlan.of(matrix, 0, 0, rank)
        assert keepers[inside(plan.kept, entries)].eq(-1).all()
        keepers[inside(plan.kept, entries)] = rank
        borrowed = [entry for transfer in plan.borrowed for entry in transfer.entries]
        needed = set(matrix.touched(rank)) | set(plan.kept)
        assert set(borrowed) | set(plan.kept) == needed <= set(plan.region)
        assert len({*borrowed, *plan.kept}) == len(borrowed) + len(plan.kept)
        rows = [row for transfer in plan.basis_borrowed for row in transfer.entries]
        assert set(plan.basis_span) <= {*rows, *plan.basis_rows}
        assert len({*rows, *plan.basis_rows}) == len(rows) + len(plan.basis_rows)
        rows = {row for block in plan.blocks for row in (block.rows if side == "left" else block.columns)}
        assert rows <= set(plan.basis_span)
    assert covered.eq(1).all()
    assert keepers.ge(0).all()
    for rank, _ in matrix.fragments:
        for transfers in (matrix.transfers, matrix.basis_transfers):
            assert list(transfers(rank)) == [
                transfer for transfer in transfers() if rank in (transfer.borrower, transfer.keeper)
            ]
        sent = sum(len(transfer.entries) * (matrix.rank + 1) for transfer in matrix.transfers(rank))
        sent += sum(
            len(transfer.entries) * matrix.rank for transfer in matrix.basis_transfers(rank) if transfer.keeper == rank
        )
        lent = sum(len(transfer.entries) for transfer in matrix.transfers(rank) if transfer.keeper == rank)
        # N beside R, and phi in float64; without a limiter C and phi alone.
        twice = (matrix.rank + 1) * lent if side == "right" else 0
        assert low_rank_elements(matrix, rank, GroupSettings(rank=2)) == sent + twice + 2 * (2 + 3)
        assert low_rank_elements(matrix, rank, UNLIMITED) == sent + 2 * (2 + 3)
    assert matrix.sums.borrowed_entries == sum(len(transfer.entries) for transfer in matrix.transfers())
    assert matrix.sums.borrowed_basis_rows == sum(len(transfer.entries) for transfer in matrix.basis_transfers())
    borrowed = 2 * (matrix.rank + 1) * matrix.sums.borrowed_entries + matrix.rank * matrix.sums.borrowed_basis_rows
    sums = len(matrix.sharers) * 2 * (2 + 3)
    assert sum(low_rank_elements(matrix, rank, UNLIMITED) for rank in matrix.sharers) == borrowed + sums
    for transfer in matrix.transfers():
        assert keepers[inside(transfer.entries, entries)].eq(transfer.keeper).all()
        assert transfer.borrower != transfer.keeper
    held, once = sum(matrix.state_numel(rank) for rank, _ in matrix.fragments), state_numel((m, n), 2, side)
    if matrix.way == "gathered":
        assert held == once
    elif evenly:  # but |S|, and rows of P on the left whose row of the matrix is split
        twice = [f.start % n != 0 for _, f in matrix.fragments] if side == "left" else []
        assert held == once + len(matrix.fragments) - 1 + sum(twice) * matrix.rank
    else:
        assert held > once


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    *sizes,
    st.sampled_from(
        [
            {},
            {"formulation": "paper"},
            {"scaling": "matrix"},
            {"scaling": "none"},
            {"residual": "none"},
            {"residual": "normalized"},
            {"residual": "normalized", "scaling": "matrix", "limiter": "growth"},
        ]
    ),
    st.booleans(),
    st.booleans(),
)
def test_parts_make_the_step_of_the_whole(
    m: int, n: int, begin: int, size: int, side: str, changed: dict[str, Any], exact: bool, evenly: bool
) -> None:
    """In float64 and without processes: what parts give each other is the step of `update`, however it is split."""
    changed = {**changed, "proj_type": side, "lr": 0.1, "weight_decay": 0.1, "alpha": 0.5}
    matrix, group = planned((m, n), begin, size, changed, evenly), GroupSettings(rank=2, **changed)
    if matrix is None:
        return
    generator = torch.Generator().manual_seed(m * 100 + n)
    weight, *grads = (torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(3))
    basis = torch.linalg.qr(torch.randn(*basis_shape((m, n), 2, side), generator=generator, dtype=torch.float64))[0]
    low_rank = low_rank_shape((m, n), 2, side)
    averages = group.averages_of(low_rank[side == "left"])
    allocated = allocate_matrices(weight, tuple(basis.shape), low_rank, "float32", (), averages=averages)
    whole = state_views(allocated, side)
    whole.basis.copy_(basis)
    whole.refresh_step.fill_(0)
    flat, expected = weight.clone().view(-1), weight.clone()
    metrics, counted = StepMetrics(), StepMetrics()
    plans = [LocalShardPlan.of(matrix, 0, 0, rank) for rank, _ in matrix.fragments]
    states = []
    for plan in plans:
        shape = matrix.basis_shape(plan.dp_rank)
        averages = plan.averages(group)
        allocated = allocate_matrices(weight, shape, plan.low_rank_shape, "float32", (), averages=averages)
        state = state_views(allocated, side)
        rows = matrix.basis_rows(plan.dp_rank)
        state.basis.copy_(basis[rows.start : rows.stop])
        state.refresh_step.fill_(0)
        states.append(state)
    for grad in grads:
        metrics.record(update(MatrixTask(expected, grad, whole, group, 1e-4)), group.residual_scale)
        parts = {}
        for plan, state in zip(plans, states, strict=True):
            bounds = slice(plan.fragment.start, plan.fragment.stop)
            parts[plan.dp_rank] = ShardStep(plan, flat[bounds], grad.view(-1)[bounds], state, group, 1e-4)
        for part in parts.values():
            part.borrow_basis(
                {
                    transfer: parts[transfer.keeper].basis_payload(transfer)[0].reshape(-1)
                    for transfer in part.plan.basis_borrowed
                }
            )
            part.project()
        for transfer in matrix.transfers():
            giver = parts[transfer.borrower]
            payload = giver.payload(transfer, giver.low_rank, giver.grad_sq.sqrt(), giver.plan.region)
            parts[transfer.keeper].add(transfer, torch.cat([tensor.reshape(-1) for tensor in payload]))
        advanced = [part.advance() for part in parts.values()]
        sums = sum(torch.stack(tuple(row)) for row in advanced if row is not None)
        total = grad.square().sum()
        squares = squares_of(sums.unsqueeze(0), total.unsqueeze(0), group)[0]
        in_parts = answer_form(matrix, group) == "in_parts"
        sent = {
            transfer: torch.cat([tensor.reshape(-1) for tensor in answer_in_parts(parts[transfer.keeper], transfer)])
            for transfer in (matrix.transfers() if in_parts else ())
        }
        scaled = torch.stack([part.scale(sums, squares) for part in parts.values()])[0]
        kept = {rank: part.kept_residual() for rank, part in parts.items()}
        if exact and group.measures_residual:
            exact_square = sum(part.residual_square(*hand_over(parts, kept, rank)) for rank, part in parts.items())
            torch.testing.assert_close(exact_square, scaled[0])
        answers, divisors = {}, {}
        for rank, part in parts.items():
            divisors[rank] = part.limit(*scaled)
            if in_parts:
                answers[rank] = answer(part, divisors[rank])
            else:  # a first answer that does not hold leaves what a second one needs
                doubled = answer(part, None if divisors[rank] is None else 2.0 * divisors[rank], again=True)
                answers[rank] = answer(part, divisors[rank])
                assert group.has_limiter or doubled is None or torch.equal(doubled[0], answers[rank][0])
            if part.plan.owns:
                counted.record(step_stats(total, sums[0], scaled[0], divisors[rank]), group.residual_scale)
        for rank, part in parts.items():
            if in_parts:
                borrowed = {
                    transfer: borrowed_answer(part, unpack_parts(part, transfer, sent[transfer]), divisors[rank])
                    for transfer in part.plan.borrowed
                }
                part.apply(*part.complete(answers[rank], borrowed))
            else:
                part.apply(*hand_over(parts, answers, rank))
        for state in states:
            torch.testing.assert_close(state.residual_norm, whole.residual_norm)
        for plan, state in zip(plans, states, strict=True):
            if state.residual_avg_sq is not None:
                own = (
                    whole.residual_avg_sq
                    if group.has_one_factor
                    else whole.residual_avg_sq[inside(plan.kept, range(10**9))]
                )
                torch.testing.assert_close(state.residual_avg_sq, own)
    assert asdict(counted.totals()) == pytest.approx(asdict(metrics.totals()), rel=1e-6, abs=1e-9)
    # Below this the moments hold rounding alone, and their quotient is of any size; so is a residual at full rank.
    if float(whole.moments["exp_avg_sq"][""].min()) > 1e-12:
        torch.testing.assert_close(flat.view(m, n), expected, rtol=1e-9, atol=1e-9)


def hand_over(parts: dict[int, ShardStep], kept: dict[int, Any], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What one rank has of its region once its keeper has answered."""
    part, arrived = parts[rank], {}
    for transfer in part.plan.borrowed:
        keeper = parts[transfer.keeper]
        payload = keeper.payload(transfer, *kept[transfer.keeper], keeper.plan.kept)
        arrived[transfer] = part.unpack(transfer, torch.cat([tensor.reshape(-1) for tensor in payload]))
    return part.complete(kept[rank], arrived)
