"""The parts of a lean cut matrix without processes: they cover it, and make together the step of the whole."""

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
from ds_fira.sharding.geometry import MatrixShard, cut
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.lowrank.shard_step import ShardStep
from ds_fira.sharding.lowrank.step import squares_of
from ds_fira.sharding.row_blocks import inside, row_blocks
from ds_fira.sharding.split_matrix import SplitMatrix, plan_split, state_numel


def planned(
    shape: tuple[int, int], begin: int, size: int, changed: dict[str, Any], spread: bool = False
) -> SplitMatrix | None:
    """A matrix at an offset of a buffer in partitions of a size, None where it is not cut."""
    partitions = -(-(begin + math.prod(shape)) // size)
    fragments = cut(MatrixShard("w", shape, begin, 0, math.prod(shape)), size, partitions)
    if len(fragments) == 1:
        return None
    owner = max(fragments, key=lambda holder: (holder * 7) % 5)
    return plan_split(fragments, owner, partitions, GroupSettings(rank=2, **changed), spread)


sizes = (
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 20),
    st.integers(1, 40),
    st.sampled_from(["left", "right"]),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(*sizes, st.booleans())
def test_pieces_and_links_cover_the_matrix(m: int, n: int, begin: int, size: int, side: str, spread: bool) -> None:
    """Pieces tile the fragments and alias them; every entry of R is kept once, and lent by its keeper; P likewise."""
    matrix = planned((m, n), begin, size, {"proj_type": side}, spread)
    if matrix is None:
        return
    numbers = torch.arange(m * n).view(m, n)
    covered = torch.zeros(m, n)
    entries = range(n if side == "left" else m)
    keepers = torch.full((len(entries),), -1)
    for rank, fragment in matrix.fragments:
        flat = numbers.view(-1)[fragment.start : fragment.stop]
        pieces = row_blocks(fragment)
        assert 1 <= len(pieces) <= 3
        assert sum(len(piece.rows) * len(piece.columns) for piece in pieces) == fragment.numel
        for piece in pieces:
            block = inside(piece.rows, range(m)), inside(piece.columns, range(n))
            assert torch.equal(piece.view(flat), numbers[block])
            assert piece.view(flat).data_ptr() == numbers[block].data_ptr()
            covered[block] += 1
        share = LocalShardPlan.of(matrix, 0, 0, rank)
        assert keepers[inside(share.kept, entries)].eq(-1).all()
        keepers[inside(share.kept, entries)] = rank
        borrowed = [entry for link in share.borrowed for entry in link.entries]
        needed = set(matrix.touched(rank)) | set(share.kept)
        assert set(borrowed) | set(share.kept) == needed <= set(share.region)
        assert len({*borrowed, *share.kept}) == len(borrowed) + len(share.kept)
        rows = [row for link in share.basis_borrowed for row in link.entries]
        assert set(share.basis_span) <= {*rows, *share.basis_rows}
        assert len({*rows, *share.basis_rows}) == len(rows) + len(share.basis_rows)
        assert {row for piece in share.pieces for row in (piece.rows if side == "left" else piece.columns)} <= set(
            share.basis_span
        )
    assert covered.eq(1).all()
    assert keepers.ge(0).all()
    for rank, _ in matrix.fragments:
        for links in (matrix.links, matrix.basis_links):
            assert list(links(rank)) == [link for link in links() if rank in (link.borrower, link.keeper)]
        sent = sum(len(link.entries) * (matrix.rank + 1) for link in matrix.links(rank))
        sent += sum(len(link.entries) * matrix.rank for link in matrix.basis_links(rank) if link.keeper == rank)
        assert matrix.lean_elements(rank) == sent + 2 * (2 + 3)
    for link in matrix.links():
        assert keepers[inside(link.entries, entries)].eq(link.keeper).all()
        assert link.borrower != link.keeper
    held, once = sum(matrix.state_numel(rank) for rank, _ in matrix.fragments), state_numel((m, n), 2, side)
    if matrix.way == "base":
        assert held == once
    elif spread:  # but |S|, and rows of P on the left whose row of the matrix is cut
        twice = [f.start % n != 0 for _, f in matrix.fragments] if side == "left" else []
        assert held == once + len(matrix.fragments) - 1 + sum(twice) * matrix.rank
    else:
        assert held > once


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    *sizes,
    st.sampled_from([{}, {"formulation": "paper"}, {"scaling": "matrix"}, {"scaling": "none"}]),
    st.booleans(),
    st.booleans(),
)
def test_parts_make_the_step_of_the_whole(
    m: int, n: int, begin: int, size: int, side: str, changed: dict[str, Any], exact: bool, spread: bool
) -> None:
    """In float64 and without processes: what parts give each other is `ds_fira.core.step.update`, any split."""
    changed = {**changed, "proj_type": side, "lr": 0.1, "weight_decay": 0.1, "alpha": 0.5}
    matrix, group = planned((m, n), begin, size, changed, spread), GroupSettings(rank=2, **changed)
    if matrix is None:
        return
    generator = torch.Generator().manual_seed(m * 100 + n)
    weight, *grads = (torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(3))
    basis = torch.linalg.qr(torch.randn(*basis_shape((m, n), 2, side), generator=generator, dtype=torch.float64))[0]
    low_rank = low_rank_shape((m, n), 2, side)
    whole = state_views(allocate_matrices(weight, tuple(basis.shape), low_rank, "float32", ()), side)
    whole.basis.copy_(basis)
    whole.refresh_step.fill_(0)
    flat, expected = weight.clone().view(-1), weight.clone()
    metrics, counted = StepMetrics(), StepMetrics()
    shares = [LocalShardPlan.of(matrix, 0, 0, rank) for rank, _ in matrix.fragments]
    states = []
    for share in shares:
        shape = matrix.basis_shape(share.dp_rank)
        state = state_views(allocate_matrices(weight, shape, share.low_rank_shape, "float32", ()), side)
        rows = matrix.basis_rows(share.dp_rank)
        state.basis.copy_(basis[rows.start : rows.stop])
        state.refresh_step.fill_(0)
        states.append(state)
    for grad in grads:
        metrics.record(update(MatrixTask(expected, grad, whole, group, 1e-4)), group.residual_scale)
        parts = {}
        for share, state in zip(shares, states, strict=True):
            bounds = slice(share.fragment.start, share.fragment.stop)
            parts[share.dp_rank] = ShardStep(share, flat[bounds], grad.view(-1)[bounds], state, group, 1e-4)
        for part in parts.values():
            part.borrow_basis(
                {link: parts[link.keeper].basis_payload(link)[0].reshape(-1) for link in part.plan.basis_borrowed}
            )
            part.project()
        for link in matrix.links():
            giver = parts[link.borrower]
            payload = giver.payload(link, giver.low_rank, giver.grad_sq.sqrt(), giver.plan.region)
            parts[link.keeper].add(link, torch.cat([tensor.reshape(-1) for tensor in payload]))
        sums = sum(torch.stack(part.advance()) for part in parts.values())
        squares = squares_of({0: sums}, {0: float(grad.square().sum())}, group)[0]
        scaled = torch.stack([part.scale(sums, squares) for part in parts.values()])[0]
        kept = {rank: part.kept_residual() for rank, part in parts.items()}
        if exact:
            exact_square = sum(part.residual_square(*hand_over(parts, kept, rank)) for rank, part in parts.items())
            torch.testing.assert_close(exact_square, scaled[0])
        total = float(grad.square().sum())
        answers = {}
        for rank, part in parts.items():
            stats, answers[rank] = part.finish(*scaled, sums[0], total)
            if part.plan.owns:
                counted.record(stats, group.residual_scale)
        for rank, part in parts.items():
            part.apply(*hand_over(parts, answers, rank))
        for state in states:
            torch.testing.assert_close(state.residual_norm, whole.residual_norm)
    assert asdict(counted.totals()) == pytest.approx(asdict(metrics.totals()), rel=1e-6, abs=1e-9)
    # Below this the moments hold rounding alone, and their quotient is of any size.
    if float(whole.moments["exp_avg_sq"][""].min()) > 1e-12:
        torch.testing.assert_close(flat.view(m, n), expected, rtol=1e-9, atol=1e-9)


def hand_over(parts: dict[int, ShardStep], kept: dict[int, Any], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What one rank has of its region once its keeper has answered."""
    part, arrived = parts[rank], {}
    for link in part.plan.borrowed:
        keeper = parts[link.keeper]
        payload = keeper.payload(link, *kept[link.keeper], keeper.plan.kept)
        arrived[link] = torch.cat([tensor.reshape(-1) for tensor in payload])
    return part.complete(kept[rank], arrived)
